"""The reader of checkpoint folders that everybody has: transformers, in a process that never imports this library. Own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..surgery import dequantize_model, independent_copy
from .format import Source
from .report import Check
from .stored import Stored
from .stream import Planned

# of the root mean square of the expected logits; the reader sums in another order
FLOAT32_LIMIT = 1e-4
_PROGRAM = """
import json, os, sys
# what transformers compiles in its bitnet layers is defined by its eager code, and takes a compiler and half a minute
os.environ["TORCHDYNAMO_DISABLE"] = "1"
job = json.loads(sys.argv[1])
if job["package"]:
    sys.path.insert(0, job["package"])
    import hf_bitnet
import torch, transformers
from safetensors.torch import load_file, save_file
assert job["package"] or "hf_bitnet" not in sys.modules
torch.set_num_threads(job["threads"])
transformers.utils.logging.set_verbosity_error()
kind = getattr(transformers, job["class"])
dtype = getattr(torch, job["dtype"])
model, info = kind.from_pretrained(job["folder"], dtype=dtype, output_loading_info=True, **job["options"])
lost = sorted({*info["missing_keys"], *info["unexpected_keys"], *map(str, info["mismatched_keys"])})
assert not lost, f"tensors that do not fit: {lost[:5]}"
inputs = {name: each.to(model.dtype) if each.is_floating_point() else each for name, each in load_file(job["inputs"]).items()}
with torch.no_grad():
    output = model.eval()(**inputs)
logits = output.logits if "logits" in output else output.last_hidden_state
save_file({"logits": logits.float().contiguous()}, job["outputs"])
"""


def run_plain(
    folder: Path,
    kind: str,
    inputs: Mapping[str, Tensor],
    dtype: torch.dtype,
    with_library: bool = False,
    **options: object,
) -> Tensor:
    """Logits float32 of the checkpoint in `folder`, computed by transformers without this library in a process of its own.

    Args:
        kind: name of the model's class. inputs: of its forward. dtype: that it is loaded in.
        with_library: the process imports this library first.
        options: of from_pretrained, as JSON can hold them.

    Raises RuntimeError with the end of what the process said, when it fails.
    """
    with tempfile.TemporaryDirectory() as place:
        save_file({name: each.contiguous() for name, each in inputs.items()}, f"{place}/in.safetensors")
        job: dict[str, object] = {"folder": str(folder), "class": kind, "dtype": str(dtype).removeprefix("torch.")}
        job |= {"options": options}
        job |= {"inputs": f"{place}/in.safetensors", "outputs": f"{place}/out.safetensors"}
        package = str(Path(__file__).resolve().parents[2]) if with_library else None
        job |= {"package": package, "threads": torch.get_num_threads()}
        done = subprocess.run([sys.executable, "-c", _PROGRAM, json.dumps(job)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr.strip()[-600:])
        return load_file(f"{place}/out.safetensors")["logits"]


def compare_tensors(folder: Path, expected: Mapping[str, Planned], what: str) -> Check:
    """Reads tensors by the library safetensors, some rows at a time, and compares them bit for bit."""
    stored = Stored(folder)
    for name, planned in expected.items():
        if (shape := stored.shape(name)) is None:
            return Check("safetensors", what, False, f"{name} is missing")
        if shape != planned.shape or not _is_stored(stored, name, planned):
            return Check("safetensors", what, False, f"{name} is another")
    return Check("safetensors", what, True, f"{len(expected)} tensors, bit for bit")


def _is_stored(stored: Stored, name: str, planned: Planned) -> bool:
    start = 0
    for wanted in planned.parts():
        found = stored.rows(name, start, start + len(wanted)) if planned.shape else stored.get(name)
        start += len(wanted) if planned.shape else 0
        if found is None or found.dtype != wanted.dtype or not torch.equal(found, wanted):
            return False
    return not planned.shape or start == planned.shape[0]


def compare_logits(reader: str, found: Tensor, expected: Tensor, limit: float) -> Check:
    """Root mean square of the difference, over that of the expected logits."""
    error = float((found.float() - expected.float()).square().mean().sqrt() / expected.float().square().mean().sqrt())
    # a NaN is not within any limit
    return Check(reader, "logits", bool(error <= limit), f"relative error {error:.2g}, limit {limit:g}")


def model_logits(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits float32 of a model in this process, in eval mode; on the CPU. Of a model without a head: its last hidden state."""
    was_training = model.training
    given = {k: (v.to(model.dtype) if v.is_floating_point() else v).to(model.device) for k, v in inputs.items()}
    try:
        with torch.no_grad():
            output = model.eval()(**given)
    finally:
        model.train(was_training)
    return (output.logits if "logits" in output else output.last_hidden_state).float().cpu()


def dequantized_logits(source: Source, dtype: torch.dtype) -> Tensor:
    """Logits float32 of the model with plain layers in `dtype`: what a reader that ignores activations has to find."""
    # what stays float is copied, because it is going to be cast
    shared = {id(each): each for each in source.model.parameters() if not each.is_floating_point()}
    model: Any = dequantize_model(independent_copy(source.model, shared), dtype=dtype)
    for parameter in model.parameters():  # not the buffers, which loading does not cast either
        parameter.data = parameter.data.to(dtype)
    return model_logits(as_loaded(model), source.inputs() or {})


def as_loaded(model: Any) -> Any:
    """The model, after it has computed anew what no checkpoint holds: rotary frequencies and the like.

    A call of `model.bfloat16()` has rounded them; loading makes them in float32.
    """
    with torch.no_grad():
        for module in model.modules():
            named = {name: module._buffers[name] for name in module._non_persistent_buffers_set}
            floats = {name: each.float() for name, each in named.items() if each is not None and each.is_floating_point()}
            if floats and not module._parameters:
                module._buffers.update(floats)
                model._init_weights(module)
    return model


def plain_logits(
    source: Source,
    folder: Path,
    dtype: torch.dtype,
    expected: Callable[[], Tensor] | None = None,
    with_library: bool = False,
) -> Check:
    """Logits of `folder` in transformers, without this library or with it, against `expected()`, both in `dtype`.

    Args:
        expected: None stands for the logits of the dequantized model.
    """
    reader = "transformers with hf_bitnet, in another process" if with_library else "transformers without hf_bitnet"
    inputs = source.inputs()
    if inputs is None:
        return Check(reader, "logits", None, f"nobody knows what to feed a model that reads {source.model.main_input_name}")
    try:
        found = run_plain(folder, type(source.model).__name__, inputs, dtype, with_library)
    except RuntimeError as error:
        return Check(reader, "logits", False, str(error))
    return compare_logits(reader, found, dequantized_logits(source, dtype) if expected is None else expected(), FLOAT32_LIMIT)

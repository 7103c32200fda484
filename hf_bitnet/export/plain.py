"""The reader of checkpoint folders that everybody has: transformers, in a process that never imports this library. Own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from .format import Source
from .report import Check
from .running import dequantized, outputs_of, reader_options
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
torch.manual_seed(0)
with torch.no_grad():
    output = model.eval()(**inputs)
if not hasattr(output, "items"):
    output = {f"output {i}": each for i, each in enumerate(output if isinstance(output, tuple) else (output,))}
found = {name: each for name, each in output.items() if isinstance(each, torch.Tensor) and each.is_floating_point()}
save_file({name: each.float().clone(memory_format=torch.contiguous_format) for name, each in found.items()}, job["outputs"])
"""


def run_plain(
    folder: Path,
    kind: str,
    inputs: Mapping[str, Tensor],
    dtype: torch.dtype,
    with_library: bool = False,
    **options: object,
) -> dict[str, Tensor]:
    """What the checkpoint in `folder` returns, float32, run by transformers without this library in a process of its own.

    Args:
        kind: name of the model's class. inputs: of its forward. dtype: that it is loaded in.
        with_library: the process imports this library first.
        options: of from_pretrained, as JSON can hold them.

    Returns name -> tensor, of every float tensor. Raises RuntimeError with the end of what the process said, when it fails.
    """
    with tempfile.TemporaryDirectory() as place:
        save_file({name: each.contiguous() for name, each in inputs.items()}, f"{place}/in.safetensors")
        job: dict[str, object] = {"folder": str(folder), "class": kind, "dtype": str(dtype).removeprefix("torch.")}
        job |= {"options": options}
        job |= {"inputs": f"{place}/in.safetensors", "outputs": f"{place}/out.safetensors"}
        package = str(Path(__file__).resolve().parents[2]) if with_library else None
        job |= {"package": package, "threads": torch.get_num_threads()}
        command = [sys.executable, "-c", _PROGRAM, json.dumps(job)]
        # what it says may hold bytes of any encoding
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            raise RuntimeError(done.stderr.strip()[-600:] or f"it ended with code {done.returncode} and said nothing")
        return load_file(f"{place}/out.safetensors")


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
        if found is None or found.dtype != wanted.dtype or not _are_same_bits(found, wanted):
            return False
    return not planned.shape or start == planned.shape[0]


def _are_same_bits(found: Tensor, wanted: Tensor) -> bool:
    """Of tensors of one dtype. torch.equal takes bfloat16 number by number, and no NaN to be itself."""
    if found.shape != wanted.shape:
        return False
    one, other = (each.contiguous().reshape(-1).view(torch.uint8).numpy() for each in (found, wanted))
    if one.size % 8 == 0:
        one, other = one.view(np.int64), other.view(np.int64)
    return np.array_equal(one, other)


def compare_logits(reader: str, found: Tensor, expected: Tensor, limit: float) -> Check:
    """Root mean square of the difference, over that of the expected logits."""
    return compare_outputs(reader, {"logits": found}, {"logits": expected}, limit)


def compare_outputs(reader: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], limit: float) -> Check:
    """The same for all that a model returns; the largest error counts."""
    if found.keys() != expected.keys():
        return Check(reader, "outputs", False, f"it returns {', '.join(found)} instead of {', '.join(expected)}")
    errors = {name: _relative_error(found[name].float(), each.float()) for name, each in expected.items()}
    # a NaN is not within any limit
    worst = next((name for name, error in errors.items() if error != error), max(errors, key=errors.__getitem__))
    where = f" in {worst}" if len(errors) > 1 else ""
    detail = f"relative error {errors[worst]:.2g}{where}, limit {limit:g}"
    return Check(reader, ", ".join(expected), bool(errors[worst] <= limit), detail)


def _relative_error(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float("nan")
    if torch.equal(found, expected):
        return 0.0  # of zeros and infinities too
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def plain_logits(
    source: Source,
    folder: Path,
    dtype: torch.dtype,
    twin: Callable[[], Any] | None = None,
    with_library: bool = False,
) -> Check:
    """What `folder` computes in transformers, without this library or with it, against a copy of the model, both in `dtype`.

    Args:
        twin: makes the copy, by `as_loaded`; None takes the dequantized model.
    """
    reader = "transformers with hf_bitnet, in another process" if with_library else "transformers without hf_bitnet"
    inputs, kind = source.inputs(), type(source.model)
    if inputs is None:
        return Check(reader, "logits", None, f"nobody knows what to feed a model that reads {source.model.main_input_name}")
    if getattr(transformers, kind.__name__, None) is not kind:
        return Check(reader, "logits", None, f"{kind.__name__} is no class of transformers, which has to know it")
    model = dequantized(source, dtype) if twin is None else twin()
    try:
        expected = outputs_of(model, inputs)
    except Exception as error:  # of any code at all
        return Check(reader, "logits", None, f"the model itself cannot be run on the CPU: {type(error).__name__}: {error}")
    wrong = next((name for name, each in expected.items() if bool(each.isnan().any())), None)
    if not expected or wrong is not None:
        computes = "no float tensor" if wrong is None else f"NaN as {wrong} in {str(dtype).removeprefix('torch.')}"
        return Check(reader, "logits", None, f"the model itself computes {computes}")
    options = reader_options(model)
    del model
    try:
        found = run_plain(folder, kind.__name__, inputs, dtype, with_library, **options)
    except RuntimeError as error:
        return Check(reader, "logits", False, str(error))
    return compare_outputs(reader, found, expected, FLOAT32_LIMIT)

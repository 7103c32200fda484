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
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..surgery import dequantize_model, independent_copy
from .format import Source
from .report import Check

# of the root mean square of the expected logits; the reader sums in another order
FLOAT32_LIMIT = 1e-4
_PROGRAM = """
import json, sys
import torch, transformers
from safetensors.torch import load_file, save_file
job = json.loads(sys.argv[1])
assert "hf_bitnet" not in sys.modules
transformers.utils.logging.set_verbosity_error()
kind = getattr(transformers, job["class"])
dtype = getattr(torch, job["dtype"])
model, info = kind.from_pretrained(job["folder"], dtype=dtype, output_loading_info=True, **job["options"])
lost = sorted({*info["missing_keys"], *info["unexpected_keys"], *map(str, info["mismatched_keys"])})
assert not lost, f"tensors that do not fit: {lost[:5]}"
with torch.no_grad():
    logits = model.eval()(**load_file(job["inputs"])).logits
save_file({"logits": logits.float().contiguous()}, job["outputs"])
"""


def run_plain(folder: Path, kind: str, inputs: Mapping[str, Tensor], dtype: torch.dtype, **options: object) -> Tensor:
    """Logits float32 of the checkpoint in `folder`, computed by transformers without this library in a process of its own.

    Args:
        kind: name of the model's class. inputs: of its forward. dtype: that it is loaded in.
        options: of from_pretrained, as JSON can hold them.

    Raises RuntimeError with the end of what the process said, when it fails.
    """
    with tempfile.TemporaryDirectory() as place:
        save_file(dict(inputs), f"{place}/in.safetensors")
        job: dict[str, object] = {"folder": str(folder), "class": kind, "dtype": str(dtype).removeprefix("torch.")}
        job |= {"options": options}
        job |= {"inputs": f"{place}/in.safetensors", "outputs": f"{place}/out.safetensors"}
        done = subprocess.run([sys.executable, "-c", _PROGRAM, json.dumps(job)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr.strip()[-600:])
        return load_file(f"{place}/out.safetensors")["logits"]


def compare_tensors(source: Source, folder: Path, expected: Mapping[str, Callable[[], Tensor]], what: str) -> Check:
    """Reads tensors by the library safetensors, one at a time, and compares them bit for bit."""
    names = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            names |= dict.fromkeys(opened.keys(), file)
    for name, make in expected.items():
        if name not in names:
            return Check("safetensors", what, False, f"{name} is missing")
        with safe_open(names[name], "pt") as opened:
            found = opened.get_tensor(name)
        wanted = make().detach().cpu()
        if found.dtype != wanted.dtype or not torch.equal(found, wanted):
            return Check("safetensors", what, False, f"{name} is another")
    return Check("safetensors", what, True, f"{len(expected)} tensors, bit for bit")


def compare_logits(reader: str, found: Tensor, expected: Tensor, limit: float) -> Check:
    """Root mean square of the difference, over that of the expected logits."""
    error = float((found.float() - expected.float()).square().mean().sqrt() / expected.float().square().mean().sqrt())
    # a NaN is not within any limit
    return Check(reader, "logits", bool(error <= limit), f"relative error {error:.2g}, limit {limit:g}")


def dequantized_logits(source: Source, dtype: torch.dtype) -> Tensor:
    """Logits float32 of the model with plain layers in `dtype`: what a reader that ignores activations has to find."""
    # what stays float is copied, because it is going to be cast
    shared = {id(each): each for each in source.model.parameters() if not each.is_floating_point()}
    model: Any = dequantize_model(independent_copy(source.model, shared), dtype=dtype)
    for parameter in model.parameters():  # not the buffers, which loading does not cast either
        parameter.data = parameter.data.to(dtype)
    with torch.no_grad():
        return model.eval()(input_ids=source.probe().to(model.device)).logits.float().cpu()


def plain_logits(source: Source, folder: Path, dtype: torch.dtype, expected: Tensor | None = None) -> Check:
    """Logits of `folder` in plain transformers against `expected` (None: of the dequantized model), both in `dtype`."""
    reader = "transformers without hf_bitnet"
    try:
        found = run_plain(folder, type(source.model).__name__, {"input_ids": source.probe()}, dtype)
    except RuntimeError as error:
        return Check(reader, "logits", False, str(error))
    return compare_logits(reader, found, dequantized_logits(source, dtype) if expected is None else expected, FLOAT32_LIMIT)

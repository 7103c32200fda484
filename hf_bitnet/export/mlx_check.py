"""Reads an mlx checkpoint: its bytes with numpy, the folder with mlx-lm in a process of its own, where it is installed. Own.

mlx runs on Linux too. The layout "bitnet" has a kernel for Apple GPUs only; elsewhere plain arithmetic stands in for that one
function, and the rest is mlx-lm's.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..surgery import dequantize_model, independent_copy
from .affine import Affine, Layer
from .format import Source
from .packed_check import codes_of_bytes, holds_codes
from .plain import FLOAT32_LIMIT, compare_logits
from .report import Check
from .running import as_loaded, model_logits
from .stored import Stored

_PROGRAM = """
import hashlib, json, sys
from importlib.metadata import version
from pathlib import Path
import numpy as np
import mlx.core as mx
from mlx_lm.models.bitlinear_layers import BitLinear
from mlx_lm.utils import load_model

job = json.loads(sys.argv[1])
metal = mx.metal.is_available()

def plain(self, x, packed):
    rows = mx.concatenate([(packed >> (2 * i)) & 3 for i in range(4)]).astype(x.dtype) - 1
    scale = self.weight_scale.astype(x.dtype)
    return x @ rows.T * (1 / scale if self.invert_weight_scales else scale)

if not metal:
    BitLinear.execute_matmul_kernel = plain
model, _ = load_model(Path(job["folder"]))
digests, replaced = {}, False
for name, module in model.named_modules():
    if isinstance(module, BitLinear):
        held, replaced = [module.weight], not metal
    elif hasattr(module, "bits"):
        rows = module.weight[:job["rows"]]
        one, sizes = mx.ones((rows.shape[0], *module.scales.shape[1:])), {"group_size": module.group_size, "bits": module.bits}
        held = [module.weight, mx.dequantize(rows, one, mx.zeros(one.shape), **sizes).astype(mx.uint8)]
    else:
        continue
    digest = hashlib.sha256()
    for each in held:
        digest.update(np.array(each).tobytes())
    digests[name] = digest.hexdigest()
if job["ids"]:
    model.set_dtype(mx.float32)
    mx.save_safetensors(job["logits"], {"logits": model(mx.array(job["ids"])).astype(mx.float32)})
reader = "mlx-lm " + version("mlx-lm") + (" on the GPU" if metal else " on the CPU")
Path(job["found"]).write_text(json.dumps({"digests": digests, "reader": reader, "replaced": replaced}))
"""


def compare_levels(layers: Mapping[str, tuple[Layer, Affine]], folder: Path) -> Check:
    """Levels in the files against the codes. `layers`: name -> layer and how it is stored."""
    stored = Stored(folder)
    for name, (layer, affine) in layers.items():
        if stored.shape(f"{name}.weight") is None:
            return Check("numpy", "levels", False, f"{name}.weight is missing")
        table = codes_of_bytes(affine.bits, affine.lowest, layer.quantizer.grid.step)
        if not holds_codes(stored, f"{name}.weight", table, layer):
            return Check("numpy", "levels", False, f"{name}.weight has other levels")
    return Check("numpy", "levels", True, f"{len(layers)} weights, every level")


# of a weight that mlx-lm unpacks, which takes it long without a GPU; of the others the bytes are compared
UNPACKED_ROWS = 32


def is_installed() -> bool:
    """Whether mlx-lm can be run."""
    return all(importlib.util.find_spec(name) is not None for name in ("mlx", "mlx_lm"))


def mlx_checks(
    source: Source, folder: Path, held: Mapping[str, Callable[[], Iterable[Tensor]]], expected: Callable[[], Tensor] | None
) -> list[Check]:
    """What mlx-lm makes of the folder.

    Args:
        held: name of each quantized layer -> what it has to hold: words, and levels uint8 (32, K) of the first rows; or
            bytes of the layout "bitnet".
        expected: logits float32 of the exported values; None compares none.
    """
    if not is_installed():
        return [Check("mlx-lm", "levels and logits", None, "not installed: pip install 'hf_bitnet[mlx]'")]
    ids = [] if expected is None else source.probe().tolist()
    with tempfile.TemporaryDirectory() as place:
        job = {
            "folder": str(folder),
            "ids": ids,
            "rows": UNPACKED_ROWS,
            "logits": f"{place}/logits.safetensors",
            "found": f"{place}/found.json",
        }
        command = [sys.executable, "-c", _PROGRAM, json.dumps(job)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            said = done.stderr.strip()[-600:] or f"it ended with code {done.returncode} and said nothing"
            return [Check("mlx-lm", "loading", False, said)]
        found = json.loads(Path(f"{place}/found.json").read_text())
        checks = [_compare_digests(found, held)]
        if expected is not None:
            reader = found["reader"] + (", plain arithmetic for its GPU kernel" if found["replaced"] else "")
            logits = load_file(f"{place}/logits.safetensors")["logits"]
            checks.append(compare_logits(reader, logits, expected(), FLOAT32_LIMIT))
    return checks


def _compare_digests(found: dict[str, Any], held: Mapping[str, Callable[[], Iterable[Tensor]]]) -> Check:
    reader, digests = found["reader"], found["digests"]
    if digests.keys() != held.keys():
        other = min(digests.keys() ^ held.keys())
        return Check(reader, "levels", False, f"{other} is {'quantized' if other in digests else 'not quantized'} there")
    for name, make in held.items():
        digest = hashlib.sha256()
        for each in make():
            digest.update(each.cpu().contiguous().numpy().data)
        if digest.hexdigest() != digests[name]:
            return Check(reader, "levels", False, f"{name} holds other levels")
    return Check(reader, "levels", True, f"{len(held)} weights, every level")


def exported_logits(
    source: Source, values: Mapping[str, Callable[[], Tensor]], dtype: torch.dtype, rounds_embedding: bool
) -> Tensor:
    """Logits, computed in float32, of plain layers that hold these values; all other floats are rounded to `dtype`.

    Args:
        values: name of a layer or table -> float32 (N, K).
        rounds_embedding: round the factor of the embeddings to bfloat16.
    """
    shared = {id(each): each for each in source.model.parameters() if not each.is_floating_point()}
    model: Any = dequantize_model(independent_copy(source.model, shared), dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()
    for name, make in values.items():
        model.get_submodule(name).weight.data = make().to(model.device)
    table = model.get_input_embeddings()
    if rounds_embedding and isinstance(getattr(table, "embed_scale", None), Tensor):
        table.embed_scale = table.embed_scale.bfloat16().float()
    return model_logits(as_loaded(model), {"input_ids": source.probe()})

"""Another default device (`torch.set_default_device`, `with torch.device(...)`): what is of a model stays where the model is.

"meta" stands in for a GPU: nothing that lands there by mistake has numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_bitnet as hb
from hf_bitnet.kernels import cases, dispatch, parity
from hf_bitnet.modules.faster_layer import _PLANS, _Plan
from tests.cpu_kernels import needs_cpu_kernels
from tests.test_kernels import _assert_equal
from tests.tiny import tiny

SCHEMES = ("binary", "ternary", "int2", "int4", "int8")


@pytest.fixture
def elsewhere() -> Iterator[None]:
    with torch.device("meta"):
        assert torch.zeros(1).is_meta
        yield


@pytest.mark.parametrize("operation", cases.CASES)
def test_every_body_of_every_operation(operation: str) -> None:
    given = [list(cases.CASES[operation](0))[index] for index in (0, 3, -2)]
    for body in dispatch.bodies(operation):
        if body.why_unavailable("cpu") is not None:
            continue
        for name, args in given:
            expected = body.function(*args)
            with torch.device("meta"):
                found = body.function(*parity.moved(args, "cpu"))
            _assert_equal(found, expected, f"{body.name}: {name}", operation)


def _quantized(weight: str, **fields: Any) -> tuple[Any, dict[str, Tensor]]:
    """A model on the CPU, quantized wherever new tensors go."""
    with torch.device("cpu"):
        model, batch = tiny("llama", labels=True, hidden_size=256, intermediate_size=256)
    return hb.quantize_model(model, hb.BitNetQuantizationConfig(weight=weight, **fields)), batch


def _lived(weight: str) -> list[Tensor]:
    """What comes of a model that is quantized, trained a step, packed, run, unpacked, taken off."""
    model, batch = _quantized(weight, embeddings="int8", output_head="int8")
    loss = model(**batch).loss
    loss.backward()
    gradients = [each.grad for each in model.parameters() if each.grad is not None]
    packed = hb.pack_model(copy.deepcopy(model).eval())
    unpacked = hb.unpack_model(copy.deepcopy(packed))
    with torch.no_grad():
        logits = [each.eval()(**batch).logits for each in (packed, unpacked, hb.dequantize_model(model))]
    return [loss.detach(), *gradients, *logits]


@pytest.mark.parametrize("weight", SCHEMES)
def test_models(weight: str) -> None:
    expected = _lived(weight)
    with torch.device("meta"):
        found = _lived(weight)
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))


@needs_cpu_kernels
@torch.no_grad()
def test_generation_takes_the_fast_way(elsewhere: None) -> None:
    model, batch = _quantized("ternary")
    model = hb.optimize_for_generation(hb.pack_model(model.eval()))
    ids = batch["input_ids"][:1]
    past = model(input_ids=ids, use_cache=True).past_key_values
    model(input_ids=ids[:, :1], past_key_values=past, use_cache=True)
    assert all(isinstance(_PLANS.get(layer), _Plan) for layer in model.model.layers)


@pytest.mark.parametrize(
    "format", ["gguf", "i2_s", "hf_bitnet", "bitnet", "dense", "mlx", pytest.param("onnx", marks=pytest.mark.slow)]
)
def test_exports(format: str, tmp_path: Path) -> None:
    for package in {"gguf": ["gguf"], "i2_s": ["gguf"], "onnx": ["onnx", "onnxscript"]}.get(format, []):
        pytest.importorskip(package, reason=f"the export needs {package}")
    model, _ = _quantized("ternary")
    hb.export_model(model, tmp_path / "expected", format=format, name="model", verify=False)
    with torch.device("meta"):
        hb.export_model(model, tmp_path / "found", format=format, name="model", verify=False)
    files = [path for path in (tmp_path / "expected").iterdir() if path.suffix in (".gguf", ".safetensors", ".onnx", ".data")]
    assert files
    for path in files:
        assert path.read_bytes() == (tmp_path / "found" / path.name).read_bytes(), path.name

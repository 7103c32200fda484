"""Exports in float16: a number that it cannot hold is refused, not written as infinity or 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hf_bitnet as hb
from hf_bitnet.export.rounding import rounded
from tests.tiny import tiny

_WIDE = {"hidden_size": 64, "intermediate_size": 128}
_OTHER = "export with dtype='float32' or 'bfloat16'"


def scaled(factor: float, scheme: str = "int8") -> Any:
    """A model whose second down_proj is that many times as large."""
    model: Any = tiny("llama", **_WIDE)[0]
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(factor)
    return hb.quantize_model(model, hb.BitNetQuantizationConfig(weight=scheme))


@pytest.mark.parametrize("packed", [False, True])
def test_dense_refuses_what_becomes_infinite(tmp_path: Path, packed: bool) -> None:
    model = scaled(1e7)
    model = hb.pack_model(model) if packed else model
    words = r"format 'dense': model\.layers\.1\.mlp\.down_proj\.weight: .* is no number of float16, which ends at 65504"
    with pytest.raises(ValueError, match=rf"{words}.*; {_OTHER}"):
        hb.export_model(model, tmp_path / "out", format="dense", dtype="float16", progress=False)
    assert not any(tmp_path.iterdir())
    report = hb.export_model(model, tmp_path / "out", format="dense", progress=False, verify="codes")
    assert report.checks[0].passed


def test_dense_refuses_other_tensors_that_become_infinite(tmp_path: Path) -> None:
    model = scaled(1.0)
    with torch.no_grad():
        model.model.norm.weight[3] = 1e5
    with pytest.raises(ValueError, match=r"format 'dense': model\.norm\.weight: 1e\+05 is no number of float16"):
        hb.export_model(model, tmp_path / "out", format="dense", dtype="float16", progress=False)


@pytest.mark.parametrize("factor", [1e9, 1.0])
def test_mlx_refuses_scales_that_float16_does_not_hold(tmp_path: Path, factor: float) -> None:
    model = scaled(factor)
    if factor == 1.0:  # smaller than any scheme makes them, as a foreign checkpoint may have them
        model = hb.pack_model(model)
        model.model.layers[1].mlp.down_proj.weight_scale.data.fill_(1e-9)
    words = r"format 'mlx': the scale of model\.layers\.1\.mlp\.down_proj: .* is no number of float16"
    with pytest.raises(ValueError, match=rf"{words}.*; {_OTHER}"):
        hb.export_model(model, tmp_path / "out", format="mlx", dtype="float16", progress=False, verify=False)


def test_bitnet_refuses_a_reciprocal_that_float16_does_not_hold(tmp_path: Path) -> None:
    """transformers casts it to the dtype of the model."""
    model = scaled(1e-6, "ternary").half()
    words = r"format 'bitnet': the scale of model\.layers\.1\.mlp\.down_proj: 1e\+05 is no number of float16"
    with pytest.raises(ValueError, match=rf"{words}.*; make the model float32 or bfloat16 first"):
        hb.export_model(model, tmp_path / "out", format="bitnet", progress=False)
    hb.export_model(model.bfloat16(), tmp_path / "out", format="bitnet", progress=False, verify="codes")


@pytest.mark.parametrize("name", ["gguf", "i2_s", pytest.param("onnx", marks=pytest.mark.slow)])
def test_other_formats_refuse_kept_numbers_that_become_infinite(name: str, tmp_path: Path) -> None:
    """An embedding, which these write in float16 by default or when asked to."""
    if name == "onnx":
        pytest.importorskip("onnx")
    model = scaled(1.0, "ternary")
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 2] = -1e5
    options: dict[str, Any] = {"dtype": "float16"} if name == "onnx" else {}
    way_out = "dtype='float32'" if name == "onnx" else "other='f32'"
    words = rf"model\.embed_tokens\.weight: -1e\+05 is no number of float16.*; export with {way_out}"
    with pytest.raises(ValueError, match=words):
        hb.export_model(model, tmp_path / "out", format=name, progress=False, verify=False, **options)
    assert not any(tmp_path.iterdir())


def test_what_is_refused() -> None:
    infinite = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e-9])
    assert rounded("a", infinite, torch.float16)[:2].isinf().all()  # they were before
    with pytest.raises(ValueError, match="a: 1e-09 is no number of float16"):
        rounded("a", infinite, torch.float16, is_scale=True)
    assert rounded("a", torch.tensor(7e4), torch.bfloat16).isfinite()
    assert isinstance(rounded("a", nn.Parameter(torch.ones(2)), torch.float16), torch.Tensor)

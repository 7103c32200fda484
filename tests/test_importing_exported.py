"""There and back: what `export_model` writes, `import_model` reads with the same codes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hf_bitnet import BitNetQuantizationConfig, export_model, import_model, quantize_model
from hf_bitnet.quantizers import WEIGHT_SCHEMES
from hf_bitnet.surgery import quantized_layers
from tests.foreign import values_of, wide

SCHEMES = list(WEIGHT_SCHEMES)


@pytest.mark.parametrize("scales", ["channel", "tensor", 64])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gguf(scheme: str, scales: str | int, tmp_path: Path) -> None:
    """Equal codes; the scale is the file's, rounded to half precision."""
    pytest.importorskip("gguf", reason="pip install 'hf_bitnet[gguf]'")
    model, _ = wide("llama", num_hidden_layers=1)
    size = {"group_size": scales} if isinstance(scales, int) else {"granularity": scales}
    quantize_model(model, BitNetQuantizationConfig(weight=scheme, form="packed", activation="none", **size))
    export_model(model, tmp_path / "out", format="gguf", verify=False)
    layers, originals = dict(quantized_layers(import_model(tmp_path / "out"))), dict(quantized_layers(model))
    assert layers.keys() == originals.keys()
    for name, layer in layers.items():
        got, wanted = layer.quantized_weight(), originals[name].quantized_weight()
        assert layer.quantizer.scheme == scheme and torch.equal(got.codes, wanted.codes), name
        assert torch.allclose(got.scale, wanted.scale, rtol=2**-10, atol=0), name


@pytest.mark.parametrize("scheme", SCHEMES)
def test_dense(scheme: str, tmp_path: Path) -> None:
    model, _ = wide("qwen3", num_hidden_layers=1)
    quantize_model(model, BitNetQuantizationConfig(weight=scheme, granularity="channel", form="packed", activation="none"))
    export_model(model, tmp_path / "out", format="dense", dtype="float32", verify=False)
    imported, expected = import_model(tmp_path / "out"), values_of(model)
    assert values_of(imported).keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in values_of(imported).items())
    assert all(layer.quantizer.scheme == scheme for _, layer in quantized_layers(imported))

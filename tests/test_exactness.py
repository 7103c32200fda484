"""One set of codes from training to serving: train == packed == saved and loaded again, for every scheme and family.

Codes and scales are equal, and so are the logits, bit for bit: both forms run the same integer product.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_bitnet import BitNetQuantizationConfig, pack_model, quantize_model
from hf_bitnet.quantizers import GRANULARITIES, WEIGHT_SCHEMES
from hf_bitnet.surgery import choose, quantized_layers
from tests.tiny import tiny

FAMILIES = ("llama", "qwen3", "gemma3", "gpt2", "bert", "t5", "vit", "whisper", "mixtral")
GROUP = 16  # divides 48, 64 and 80, the widths of the tiny models
COMBINATIONS = [
    {"weight": scheme, "granularity": granularity, "group_size": GROUP if granularity == "group" else None}
    for scheme, granularity in product(WEIGHT_SCHEMES, GRANULARITIES)
]


def _codes(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: tuple(layer.quantized_weight()[:2]) for name, layer in quantized_layers(model)}


def _assert_same(name: str, model: nn.Module, batch: dict[str, Tensor], codes: Any, logits: Tensor) -> None:
    found = _codes(model)
    assert found.keys() == codes.keys(), name
    for layer, (expected_codes, expected_scale) in codes.items():
        assert torch.equal(found[layer][0], expected_codes), (name, layer)
        assert torch.equal(found[layer][1], expected_scale), (name, layer)
    with torch.no_grad():
        assert torch.equal(model(**batch)[0], logits), name


def _check(model: Any, batch: dict[str, Tensor], config: BitNetQuantizationConfig, folder: Path) -> None:
    """Train, packed, and both of them saved and loaded again."""
    quantize_model(model, config)
    codes = _codes(model)
    with torch.no_grad():
        logits = model(**batch)[0]
    model.save_pretrained(folder / "train")
    _assert_same("train, reloaded", type(model).from_pretrained(folder / "train"), batch, codes, logits)
    pack_model(model)
    _assert_same("packed", model, batch, codes, logits)
    model.save_pretrained(folder / "packed")
    _assert_same("packed, reloaded", type(model).from_pretrained(folder / "packed"), batch, codes, logits)


def _one_for_each_layer(model: nn.Module) -> Iterator[BitNetQuantizationConfig]:
    """Configs that deal the combinations out to the layers, until each has been on some layer of the model."""
    names = [choice.name for choice in choose(model, BitNetQuantizationConfig()) if choice.kept is None]
    dealt = cycle(COMBINATIONS)
    for _ in range(-(-len(COMBINATIONS) // len(names))):
        yield BitNetQuantizationConfig(
            overrides={rf"^{re.escape(name)}$": change for name, change in zip(names, islice(dealt, len(names)), strict=True)}
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_combination_in_every_family(family: str, tmp_path: Path) -> None:
    model, batch = tiny(family)
    seen = set()
    for number, config in enumerate(_one_for_each_layer(model)):
        quantized = copy.deepcopy(model)
        _check(quantized, batch, config, tmp_path / str(number))
        seen |= {(layer.quantizer.scheme, layer.quantizer.granularity) for _, layer in quantized_layers(quantized)}
    assert seen == set(product(WEIGHT_SCHEMES, GRANULARITIES))


@pytest.mark.parametrize("fields", COMBINATIONS, ids=lambda fields: f"{fields['weight']}-{fields['granularity']}")
def test_every_combination_alone(fields: dict[str, Any], tmp_path: Path) -> None:
    model, batch = tiny("llama")
    _check(model, batch, BitNetQuantizationConfig(**fields), tmp_path)


@pytest.mark.parametrize("preset", ["bitnet_b158", "w1a8", "w2a8", "w4a8", "w8a8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_presets_in_half_precision(preset: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, batch = tiny("llama")
    model.to(dtype).save_pretrained(tmp_path / "float")
    model = type(model).from_pretrained(tmp_path / "float")  # `.to` has cast the rotary frequencies too; loading does not
    assert model.dtype == dtype
    _check(model, batch, getattr(BitNetQuantizationConfig, preset)(), tmp_path)


def test_trained_state_travels(tmp_path: Path) -> None:
    """What training moved besides the weights: learned scales, temperatures, norms, blends."""
    model, batch = tiny("llama", labels=True)
    config = BitNetQuantizationConfig.w2a8(ste="learnable", sub_norm=["o_proj", "down_proj"])
    quantize_model(model, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for module in model.modules():
        if hasattr(module, "blend"):
            module.blend.fill_(0.75)  # type: ignore[operator, union-attr]
    for _ in range(2):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    codes = _codes(model)
    with torch.no_grad():
        loss = model(**batch)[0]
    model.save_pretrained(tmp_path / "train")
    reloaded = type(model).from_pretrained(tmp_path / "train")
    _assert_same("train, reloaded", reloaded, batch, codes, loss)
    assert all(torch.equal(value, state[name]) for name, value in reloaded.state_dict().items())
    pack_model(model)
    _assert_same("packed", model, batch, codes, loss)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_product(family: str, tmp_path: Path) -> None:
    model, batch = tiny(family)
    for fields in COMBINATIONS:
        folder = tmp_path / f"{fields['weight']}-{fields['granularity']}"
        _check(copy.deepcopy(model), batch, BitNetQuantizationConfig(**fields), folder)

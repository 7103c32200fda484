"""Every scheme in every format, for five families: the export passes its parity gate, or is refused with this reason."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import hf_bitnet as hb
from hf_bitnet.export import EXPORT_FORMATS
from tests.tiny import tiny

SCHEMES = {
    "binary": hb.BitNetQuantizationConfig.w1a8,
    "ternary": hb.BitNetQuantizationConfig.bitnet_b158,
    "int2_seq": hb.BitNetQuantizationConfig.w2a8,
    "int4": hb.BitNetQuantizationConfig.w4a8,
    "int8": hb.BitNetQuantizationConfig.w8a8,
}
FAMILIES = ("llama", "qwen3", "gemma3", "mistral", "bitnet")
# a multiple of 256 in every direction, which is what the largest blocks of any format ask for
_SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "head_dim": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

# (format, scheme, family) -> words of the refusal; "*" stands for all. The first that fits counts; what fits none must pass.
REFUSED: list[tuple[tuple[str, str, str], str]] = [
    *(
        (("bitnet", scheme, "*"), "the format holds ternary weights with one scale")
        for scheme in SCHEMES
        if scheme != "ternary"
    ),
    *(
        (("mlx", scheme, "bitnet"), "the format holds ternary weights with one scale")
        for scheme in SCHEMES
        if scheme != "ternary"
    ),
    (("gguf", "*", "bitnet"), "the activation is 'relu2', llama.cpp's architecture 'bitnet' computes 'silu'"),
    (("i2_s", "*", "qwen3"), "bitnet.cpp has no architecture for a Qwen3ForCausalLM"),
    (("i2_s", "*", "gemma3"), "bitnet.cpp has no architecture for a Gemma3ForCausalLM"),
    (("i2_s", "binary", "*"), "I2_S has one scale for the tensor"),
    *((("i2_s", scheme, "*"), "I2_S holds the levels -1, 0, 1 only") for scheme in ("int2_seq", "int4", "int8")),
]

# one of each format in the fast tests
_FAST = {("hf_bitnet", "ternary", "gemma3"), ("gguf", "ternary", "qwen3"), ("i2_s", "ternary", "bitnet")}


def refusal(format: str, scheme: str, family: str) -> str | None:
    given = (format, scheme, family)
    fits = (words for pattern, words in REFUSED if all(p in ("*", g) for p, g in zip(pattern, given, strict=True)))
    return next(fits, None)


CELLS = [(format, scheme, family) for format in EXPORT_FORMATS for scheme in SCHEMES for family in FAMILIES]


@pytest.mark.parametrize(
    ("format", "scheme", "family"),
    [cell if cell in _FAST or refusal(*cell) else pytest.param(*cell, marks=pytest.mark.slow) for cell in CELLS],
)
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:onnxscript", "ignore::FutureWarning", "ignore:.*torch.onnx.*:UserWarning"
)
def test_cell(format: str, scheme: str, family: str, tmp_path: Path) -> None:
    sizes = {key: value for key, value in _SIZES.items() if family != "bitnet" or key != "head_dim"}
    if family == "bitnet":
        sizes["tie_word_embeddings"] = True  # as the published models have it, and bitnet.cpp wants it
    model = hb.pack_model(hb.quantize_model(tiny(family, **sizes)[0], SCHEMES[scheme]()))
    words = refusal(format, scheme, family)
    if words is not None:
        with pytest.raises(ValueError, match=rf"format '{re.escape(format)}' cannot hold this model: .*{re.escape(words)}"):
            hb.export_model(model, tmp_path / "out", format=format)
        assert not any(tmp_path.iterdir())
        return
    report = hb.export_model(model, tmp_path / "out", format=format, progress=False)
    assert any(check.passed for check in report.checks) and all(check.passed is not False for check in report.checks)


def test_at_least_sixty_cells_pass() -> None:
    assert sum(refusal(*cell) is None for cell in CELLS) >= 60

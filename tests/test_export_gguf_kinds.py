"""Kinds of GGUF tensors: blocks that hold every level of every grid, and the choice among them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_bitnet.export.gguf.contents import CodesPart
from hf_bitnet.export.gguf.kinds import KINDS, LEGAL, choose, stored_steps
from hf_bitnet.quantizers import WEIGHT_SCHEMES, make_weight_quantizer
from tests import gguf_models

gguf = pytest.importorskip("gguf", reason="needs the package gguf: pip install gguf")
SCHEMES = ("binary", "ternary", "int2", "int2_seq", "int4", "int8")
OWN = {"Q2_0": gguf_models.q2_0, "Q1_0": gguf_models.q1_0, "I2_S": gguf_models.i2_s}


# ---- blocks ----


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", [name for name in KINDS if KINDS[name].encode is not None])
def test_blocks_hold_every_level(scheme: str, name: str) -> None:
    """Each level in each place of a block, decoded by the package gguf, or weight by weight where it has no decoder."""
    kind, grid = KINDS[name], WEIGHT_SCHEMES.get(scheme).grid
    steps = stored_steps(kind, grid)
    if steps is None:
        assert name not in (choose(grid, (1, 256), (1, 1), None).kind.name, "Q8_0")
        return
    rows = steps.levels + 3
    codes = torch.arange(rows)[:, None] * 5 + torch.arange(512)
    codes[-1] = torch.randint(0, 1000, (512,))
    codes = (codes % steps.levels * grid.step + grid.lowest).to(torch.int8)
    scale = (torch.rand(rows, 512 // kind.block) + 0.125).half().float()
    levels = ((codes.float() - grid.zero_point) * steps.factor).to(torch.int8)
    d = torch.ones_like(scale) if kind.tail else scale
    data = CodesPart("layer", kind, steps, levels, (d / steps.factor).to(kind.scale_dtype)).bytes().numpy()
    assert data.dtype == np.uint8 and data.nbytes == kind.size((rows, 512)) - kind.tail
    if name in OWN:
        found = torch.tensor([OWN[name](row.tobytes()) for row in data])
        own = KINDS[name].decode
        assert own is not None and torch.equal(own(torch.from_numpy(data)), found)
    else:
        found = torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType(kind.id)))
    wanted = (codes.float() - grid.zero_point).unflatten(1, (d.shape[1], -1)) * d.unsqueeze(2)
    assert torch.equal(found, wanted.flatten(1))


def test_package_agrees_on_ids_and_sizes() -> None:
    for name, kind in KINDS.items():
        if name in gguf.GGMLQuantizationType.__members__:
            known = gguf.GGMLQuantizationType[name]
            assert (kind.id, gguf.GGML_QUANT_SIZES[known]) == (known.value, (kind.block, kind.bytes))
        if f"MOSTLY_{name}" in gguf.LlamaFileType.__members__:
            assert gguf.LlamaFileType[f"MOSTLY_{name}"].value == kind.file_type


# ---- choice ----


@pytest.mark.parametrize(
    ("scheme", "columns", "group", "kind", "why"),
    [
        ("ternary", 512, None, "TQ2_0", ""),
        ("ternary", 896, None, "Q2_0", "TQ2_0 has blocks of 256, which do not divide the 896 input features"),
        ("ternary", 512, 64, "Q2_0", "TQ2_0 has one scale for 256 weights, here are groups of 64"),
        ("ternary", 96, None, "Q4_0", "TQ2_0 has blocks of 256"),
        ("ternary", 512, 32, "Q4_0", "here are groups of 32"),
        ("ternary", 40, None, "F16", "do not divide the 40 input features"),
        ("binary", 384, None, "Q1_0", ""),
        ("binary", 64, None, "Q2_0", "Q1_0 has blocks of 128"),
        ("binary", 512, 64, "Q2_0", "Q1_0 has one scale for 128 weights"),
        ("int2", 512, None, "Q2_K", ""),
        ("int2", 64, None, "Q2_0", "Q2_K has blocks of 256"),
        ("int2", 32, None, "Q4_0", "Q2_K has blocks of 256"),
        ("int2", 48, None, "F16", "Q2_K has blocks of 256"),
        ("int2_seq", 512, 256, "Q2_K", ""),
        ("int2_seq", 64, None, "Q4_0", "Q2_K has blocks of 256"),
        ("int2_seq", 48, None, "F32", "Q2_K has blocks of 256"),
        ("int4", 96, 32, "Q4_0", ""),
        ("int4", 48, None, "F32", "Q4_0 has blocks of 32"),
        ("int8", 32, None, "Q8_0", ""),
        ("int8", 96, 48, "F32", "here are groups of 48"),
    ],
)
def test_default_kind(scheme: str, columns: int, group: int | None, kind: str, why: str) -> None:
    quantizer = make_weight_quantizer(scheme, group_size=group)
    choice = choose(quantizer.grid, (64, columns), quantizer.scale_shape(64, columns), None)
    assert choice.kind.name == kind and (why in choice.why if why else choice.why == "")


def test_asked_kind_or_the_reason() -> None:
    grid = WEIGHT_SCHEMES.get("ternary").grid
    for name in ("TQ1_0", "Q2_0", "Q2_K", "Q4_0", "Q8_0", "F16", "F32"):
        assert choose(grid, (4, 256), (1, 1), name) == (choose(grid, (4, 256), (4, 1), name)) and name in LEGAL
        assert (choice := choose(grid, (4, 256), (1, 1), name)).kind.name == name and not choice.why
    choice = choose(grid, (4, 256), (1, 1), "Q1_0")
    assert (choice.kind.name, choice.why) == ("TQ2_0", "Q1_0 holds the levels -1, 1 only")

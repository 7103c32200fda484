"""What of packed embeddings and output heads is refused, and how it is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_bitnet import BitNetQuantizationConfig, export_model, quantize_model
from tests.checkpoints import edit_tensors, logits, read_config
from tests.test_vocabulary import config
from tests.tiny import tiny


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"embeddings": 8}, TypeError, r"embeddings must be a weight scheme.*got 8\. Write embeddings='int8' or"),
        ({"embeddings": {"group_size": 16}}, TypeError, r"embeddings must be a weight scheme, or a dict that names one"),
        ({"embeddings": "int3"}, ValueError, r"embeddings: unknown weight scheme 'int3'"),
        ({"embeddings": {"weight": "int4", "bits": 4}}, ValueError, r"embeddings names 'bits'; fields: weight, weight_scale"),
        ({"embeddings": {"weight": "int8", "activation": "int8"}}, ValueError, r"embeddings names 'activation'; fields"),
        ({"embeddings": {"weight": "int8", "granularity": "tensor"}}, ValueError, r"one scale a row \('channel'\) or a group"),
        ({"embeddings": {"weight": "int4", "weight_scale": "learned"}}, ValueError, r"computed, not learned"),
        ({"output_head": {"weight": "int8", "sub_norm": True}}, ValueError, r"output_head names 'sub_norm'; fields"),
    ],
)
def test_config_errors(fields: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        BitNetQuantizationConfig(**fields)


@pytest.mark.parametrize(
    ("family", "fields", "text"),
    [
        ("qwen3", {"output_head": "int8"}, r"tied to its embeddings.*write embeddings='int8' alone, which quantizes both"),
        ("qwen3", {"embeddings": "int8", "output_head": "int4"}, r"embeddings='int8' and output_head='int4'"),
        ("bert", {"output_head": "int8"}, r"names no output head.*overrides=\{r'classifier'"),
        ("vit", {"embeddings": "int8"}, r"names no table of token embeddings; leave embeddings out"),
        (
            "llama",
            {"embeddings": {"weight": "int4", "group_size": 32}},
            r"model.embed_tokens: group_size=32 does not divide the 48",
        ),
        ("llama", {"output_head": "int8", "keep": ["lm_head"]}, r"lm_head is asked for by.*keep or overrides too; say it once"),
        ("llama", {"embeddings": "int8", "keep": ["embed"]}, r"model.embed_tokens is asked for by"),
        ("llama", {"output_head": "int8", "overrides": {"lm_head": {"weight": "int4"}}}, r"lm_head is asked for by"),
    ],
)
def test_models_that_do_not_fit(family: str, fields: dict[str, Any], text: str) -> None:
    model, batch = tiny(family)
    before = logits(model, batch)
    with pytest.raises(ValueError, match=text):
        quantize_model(model, BitNetQuantizationConfig(**fields))
    assert torch.equal(logits(model, batch), before)


class _Odd(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


@pytest.mark.parametrize(
    ("table", "text"),
    [
        (_Odd(96, 48), "model.embed_tokens is a _Odd with a forward of its own"),
        (nn.Embedding(96, 48, max_norm=1.0), "model.embed_tokens has max_norm=1.0"),
        (nn.Embedding(96, 48, sparse=True), "has sparse gradients"),
    ],
)
def test_tables_that_do_something_else(table: nn.Embedding, text: str) -> None:
    model, _ = tiny("llama")
    model.model.embed_tokens = table
    with pytest.raises(ValueError, match=text):
        quantize_model(model, config())


def test_native_format_has_no_packed_embeddings(tmp_path: Path) -> None:
    model, _ = tiny("llama")
    quantize_model(model, config())
    with pytest.raises(ValueError, match=r"no packed embeddings, and model\.embed_tokens is quantized"):
        export_model(model, tmp_path / "native", format="bitnet")
    model.save_pretrained(tmp_path / "train")  # plain transformers would compute other logits: it must refuse
    assert "hf_bitnet" in read_config(tmp_path / "train")["linear_class"]


def test_a_damaged_table_is_an_error(tmp_path: Path) -> None:
    model, _ = tiny("qwen3")
    quantize_model(model, config(form="packed")).save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.pop("model.embed_tokens.weight_scale"))
    with pytest.raises(ValueError, match=r"the checkpoint lacks .*model\.embed_tokens\.weight_scale"):
        type(model).from_pretrained(tmp_path)

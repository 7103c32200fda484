"""What a user may give an export is checked before anything is written; the text says what came and what is legal."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import hf_bitnet as hb
from hf_bitnet.export import Check, ExportReport, stream
from tests.tiny import tiny

_SHARDS = "legal: '5GB', '200MB' and the like, or a number of bytes"


@pytest.fixture(scope="module")
def model() -> Any:
    return hb.quantize_model(tiny("llama")[0], hb.BitNetQuantizationConfig())


def refusal(model: Any, folder: Path, format: str, error: type[Exception] = ValueError, **options: Any) -> str:
    with pytest.raises(error) as caught:
        hb.export_model(model, folder / "out", format=format, progress=False, **options)
    assert not any(folder.iterdir())
    return str(caught.value)


@pytest.mark.parametrize(
    ("format", "option", "value", "legal"),
    [
        ("gguf", "other", ["f16"], "legal: f16, bf16, f32"),
        ("gguf", "kind", ["TQ2_0"], "legal: "),
        ("gguf", "strict", "no", "legal: True, False"),
        ("gguf", "file_name", 5, "a name that ends in .gguf, without folders"),
        ("i2_s", "strict", 1, "legal: True, False"),
        ("i2_s", "file_name", None, "a name that ends in .gguf, without folders"),
        ("dense", "dtype", ["float32"], "legal: bfloat16, float16, float32"),
        ("dense", "dtype", torch.bfloat16, "legal: bfloat16, float16, float32"),
        ("dense", "max_shard_size", None, _SHARDS),
        ("dense", "max_shard_size", "5 gigs", _SHARDS),
        ("dense", "max_shard_size", "0GB", _SHARDS),
        ("hf_bitnet", "max_shard_size", -1, _SHARDS),
        ("hf_bitnet", "storage", {}, "legal: bits, trits"),
        ("bitnet", "max_shard_size", True, _SHARDS),
        ("bitnet", "packed", "no", "legal: True, False"),
        ("bitnet", "kind", 1, "legal: bitlinear, autobitlinear, online"),
        ("mlx", "min_bits", True, "legal: 1, 2, 4, 8"),
        ("mlx", "group_size", [64], "legal: None, 128, 64, 32"),
        ("mlx", "max_shard_size", 2.5, _SHARDS),
        ("onnx", "opset", [20], "legal: 18, 19, 20, 21, 22, 23"),
    ],
)
def test_options_of_another_type_are_refused(
    model: Any, tmp_path: Path, format: str, option: str, value: object, legal: str
) -> None:
    words = refusal(model, tmp_path, format, **{option: value})
    assert words.startswith(f"format {format!r}: {option}={value!r}; {legal}")


def test_sizes_of_files_that_are_legal(model: Any, tmp_path: Path) -> None:
    for number, size in enumerate(("5KB", " 1.5 mb ", 5000)):
        report = hb.export_model(
            model, tmp_path / str(number), format="dense", max_shard_size=size, progress=False, verify=False
        )
        assert report.options["max_shard_size"] == size


@pytest.mark.parametrize("format", ["dense", "gguf"])
def test_a_tokenizer_that_is_none_is_refused(model: Any, tmp_path: Path, format: str) -> None:
    words = refusal(model, tmp_path, format, TypeError, tokenizer="gpt2")
    assert words.startswith("tokenizer='gpt2' is a str; pass a tokenizer itself, for example tokenizer=AutoTokenizer.")


@pytest.mark.parametrize("format", ["dense", "hf_bitnet", "bitnet"])
def test_a_generation_config_that_cannot_be_saved_is_refused(
    tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any weight is written."""
    model: Any = hb.quantize_model(tiny("llama")[0], hb.BitNetQuantizationConfig())
    model.generation_config.temperature = 0.5
    monkeypatch.setattr(stream, "_write_file", None)
    words = refusal(model, tmp_path, format)
    assert "its generation_config cannot be saved; change model.generation_config: " in words
    assert "`temperature`: `do_sample` is not set to `True`" in words


def test_a_complex_buffer(tmp_path: Path) -> None:
    """Safetensors holds those of 64 bits; others are refused by name."""
    for dtype in (torch.complex64, torch.complex128):
        model: Any = hb.quantize_model(tiny("llama")[0], hb.BitNetQuantizationConfig())
        model.register_buffer("turns", torch.tensor([1 + 2j, 3], dtype=dtype))
        if dtype == torch.complex64:
            hb.export_model(model, tmp_path / "held", format="dense", progress=False, verify="codes")
            assert torch.equal(load_file(tmp_path / "held" / "model.safetensors")["turns"], model.turns)
            continue
        (tmp_path / "empty").mkdir()
        words = refusal(model, tmp_path / "empty", "dense")
        assert re.match(r"turns is complex128, which safetensors cannot hold; legal: float64, .*\. Convert it first", words)


def test_details_of_checks_do_not_break_the_table() -> None:
    check = Check("reader", "logits", None, "Traceback:\n  File a | b")
    report = ExportReport("gguf", "p", {}, [], [check, Check("reader", "codes", True, "a | b")], [], {}, 1.0)
    assert report.markdown().splitlines()[-2:] == [
        "| reader | logits | not run | Traceback: |",
        r"| reader | codes | equal | a \| b |",
    ]

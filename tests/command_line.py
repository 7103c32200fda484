"""The command line run in this process, and a saved model for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hf_bitnet as hb
from hf_bitnet.cli import main
from tests import corpus
from tests.tiny import tiny

Captured = pytest.CaptureFixture[str]


def save_base(folder: Path) -> Path:
    """A full-precision model with its tokenizer, and two texts beside it."""
    tiny("llama")[0].save_pretrained(folder)
    corpus.tokenizer().save_pretrained(folder)
    corpus.write(folder, 800, seed=1, name="train.txt")
    corpus.write(folder, 400, seed=2, name="valid.txt")
    return folder


def save_quantized(folder: Path, form: str = "packed", **fields: Any) -> Path:
    """The same model quantized, with its tokenizer."""
    hb.quantize_model(tiny("llama")[0], hb.BitNetQuantizationConfig(form=form, **fields)).save_pretrained(folder)
    corpus.tokenizer().save_pretrained(folder)
    return folder


def run(capsys: Captured, *words: Any) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    capsys.readouterr()
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def windows(base: Path) -> torch.Tensor:
    return hb.text_windows(corpus.tokenizer(), base / "valid.txt", 16)

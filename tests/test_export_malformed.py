"""Damaged checkpoints: a clear error each, no output, nothing executed, nothing outside touched."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch

import hf_bitnet as hb
from hf_bitnet.surgery import check_codes
from tests.malformed import DAMAGES
from tests.tiny import tiny


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    hb.pack_model(hb.quantize_model(tiny("llama")[0], hb.BitNetQuantizationConfig())).save_pretrained(folder)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoint(name: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where a program in the checkpoint would leave its mark
    shutil.copytree(good, tmp_path / "damaged")
    shutil.copy(good / "model.safetensors", tmp_path / "elsewhere.safetensors")
    damage, words = DAMAGES[name]
    damage(tmp_path / "damaged")
    before = files(tmp_path)
    with pytest.raises((ValueError, OSError)) as caught:
        hb.export_model(tmp_path / "damaged", tmp_path / "out", format="dense", verify=False, progress=False)
    assert re.search(words, str(caught.value), re.DOTALL), str(caught.value)
    assert files(tmp_path) == before


def test_linked_target(good: Path, tmp_path: Path) -> None:
    """The folder that a link leads to is written, and only when it may be replaced."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    options = {"format": "dense", "verify": False, "progress": False}
    hb.export_model(good, tmp_path / "link", **options)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "export.json").is_file()
    with pytest.raises(ValueError, match="is not empty; choose another one"):
        hb.export_model(good, tmp_path / "link", **options)
    hb.export_model(good, tmp_path / "link", overwrite=True, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_export_onto_its_own_checkpoint(good: Path, tmp_path: Path) -> None:
    for out in (good, good / "inside", good.parent):
        with pytest.raises(ValueError, match=r"overlap; choose another folder|holds no model"):
            hb.export_model(good, out, format="dense", overwrite=True)


def test_model_that_was_damaged_in_memory(tmp_path: Path) -> None:
    model = hb.pack_model(hb.quantize_model(tiny("llama")[0], hb.BitNetQuantizationConfig(weight="int4", embeddings="int8")))
    check_codes(model)
    model.model.embed_tokens.weight[3, 5] = 255
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight holds a code that int8 weights do not have"):
        hb.export_model(model, tmp_path / "out", format="dense")
    model.model.embed_tokens.weight_scale.data[2] = torch.nan
    with pytest.raises(ValueError, match=r"embed_tokens\.weight_scale holds nan; scales are finite and above 0"):
        hb.export_model(model, tmp_path / "out", format="dense")
    assert not any(tmp_path.iterdir())

"""push_to_hub where something is already: an earlier push in another form, a repository of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, ModelCard

import hf_bitnet as hb
from hf_bitnet.surgery import config_of
from tests.command_line import save_quantized
from tests.hub_server import LoopbackHub
from tests.tiny import tiny

REPO = "org/model"


def gguf(folder: Path, name: str = "model.gguf") -> Path:
    """What an export to GGUF leaves, but for its size and the reading back."""
    folder.mkdir(parents=True)
    (folder / name).write_bytes(b"GGUF" + bytes(99))
    report = hb.export.ExportReport("gguf", folder.name, {}, [], [], [], {name: 103}, 0.0)
    hb.files.write_json(folder / "export.json", report.to_dict())
    (folder / "README.md").write_text("# by hand\n")
    return folder


def test_the_model_of_an_earlier_push_in_another_form_goes(hub: LoopbackHub, tmp_path: Path) -> None:
    packed = save_quantized(tmp_path / "packed")
    hb.push_to_hub(packed, REPO)
    HfApi().upload_file(path_or_fileobj=b"x", path_in_repo="adapter_model.safetensors", repo_id=REPO)
    HfApi().upload_file(path_or_fileobj=b"x", path_in_repo="other/model.safetensors", repo_id=REPO)
    report = hb.push_to_hub(gguf(tmp_path / "gguf"), REPO)
    assert report.repos[0].deleted == ["config.json", "model.safetensors"]
    assert {"model.gguf", "adapter_model.safetensors", "other/model.safetensors"} <= hub.files(REPO).keys()
    report = hb.push_to_hub(gguf(tmp_path / "renamed", "other.gguf"), REPO)
    assert report.repos[0].deleted == ["model.gguf"]
    report = hb.push_to_hub({"packed": packed, "gguf": tmp_path / "gguf"}, REPO)
    assert report.repos[0].deleted == ["export.json", "other.gguf"] and "gguf/model.gguf" in hub.files(REPO)
    hb.push_to_hub({"packed": packed, "gguf": tmp_path / "renamed"}, REPO)
    assert "gguf/model.gguf" not in hub.files(REPO) and "gguf/other.gguf" in hub.files(REPO)
    assert config_of(hb.open_model(REPO)).form == "packed"

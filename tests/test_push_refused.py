"""push_to_hub and its neighbours given what they cannot take: each says what came and what is legal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import hf_bitnet as hb
from tests.command_line import save_quantized
from tests.hub_server import LoopbackHub
from tests.test_push_again import gguf

REPO = "org/model"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_quantized(tmp_path_factory.mktemp("model") / "packed")


def test_no_forms_and_no_id(packed: Path) -> None:
    with pytest.raises(ValueError, match=r"an empty mapping; give \{form: folder\}, for example \{'packed': 'out/packed'\}"):
        hb.push_to_hub({}, REPO)
    with pytest.raises(TypeError, match="takes the id of a repository, got NoneType; for example 'me/model'"):
        hb.push_to_hub(packed, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("changes", [{"files": [1]}, {"files": {"model.gguf": "1"}}, {"notes": 3}, {"checks": [3]}])
def test_reports_that_are_none(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = gguf(tmp_path / "gguf")
    values = json.loads((folder / "export.json").read_text())
    (folder / "export.json").write_text(json.dumps(values | changes))
    with pytest.raises(ValueError, match=r"export\.json was not written by export_model \(.*\); export the model again"):
        hb.push_to_hub(folder, REPO, dry_run=True)


@pytest.mark.parametrize("text", [b"---\na: [1\n---\nhi", b"\xff\xfe", b"---\n- a\n---\nhi", b"---\ntags: 5\n---\nhi"])
def test_cards_that_the_hub_does_not_read(packed: Path, tmp_path: Path, text: bytes) -> None:
    folder = shutil.copytree(packed, tmp_path / "model")
    (folder / "README.md").write_bytes(text)
    with pytest.raises(ValueError, match=r"model/README\.md is no card that the Hub reads \(.*\); correct or remove it, or"):
        hb.push_to_hub(folder, REPO, dry_run=True)
    hb.push_to_hub(folder, REPO, dry_run=True, card=False)


def test_an_auto_map_of_nothing(packed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(packed, tmp_path / "model")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"auto_map": None}))
    with pytest.raises(ValueError, match=r"config\.json: auto_map=None; it is an object, .*: remove it"):
        hb.push_to_hub(folder, REPO, dry_run=True, remote_code=True)  # the model is opened for its card
    (folder / "README.md").write_text("# mine\n")
    assert "config.json" in hb.push_to_hub(folder, REPO, dry_run=True, remote_code=True).files


def test_an_export_without_a_card_gets_one_from_its_report(hub: LoopbackHub, tmp_path: Path) -> None:
    folder = gguf(tmp_path / "gguf")
    (folder / "README.md").unlink()
    hb.push_to_hub(folder, REPO, base_model="org/base")
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    assert "# model\n" in card.text and "## Export" in card.text
    assert card.data.base_model == "org/base" and card.data.tags == ["hf_bitnet", "bitnet", "quantized", "gguf"]


def test_private_onto_a_public_repository(hub: LoopbackHub, packed: Path) -> None:
    hb.push_to_hub(packed, REPO)
    commits = hub.commits(REPO)
    with pytest.raises(ValueError, match=r"private=True, but org/model is there already and public, so nothing was pushed"):
        hb.push_to_hub(packed, REPO, private=True, card=False)
    assert hub.commits(REPO) == commits
    hb.push_to_hub(packed, "org/private", private=True)
    hb.push_to_hub(packed, "org/private", private=True)

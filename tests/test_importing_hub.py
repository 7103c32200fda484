"""import_model of a repository on the Hub that holds GGUF files and no name of one is given."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants

import hf_bitnet as hb
from tests import gguf_models
from tests.hub_server import LoopbackHub

pytest.importorskip("gguf", reason="needs the package gguf: pip install gguf")
REPO = "org/model"


def test_the_only_gguf_file_of_a_repository_is_fetched(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hb.export_model(gguf_models.made("llama"), tmp_path / "gguf", format="gguf", verify=False, progress=False)
    hb.push_to_hub(tmp_path / "gguf", REPO, revision="v2")
    expected = str(hb.coverage(hb.import_model(tmp_path / "gguf")))
    assert str(hb.coverage(hb.import_model(REPO, revision="v2"))) == expected
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert str(hb.coverage(hb.import_model(REPO, revision="v2"))) == expected  # as it was fetched before
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    HfApi().upload_file(path_or_fileobj=b"x", path_in_repo="b.gguf", repo_id=REPO, revision="v2")
    with pytest.raises(ValueError, match=r"org/model holds several GGUF files; name one: file='b\.gguf', or model\.gguf"):
        hb.import_model(REPO, revision="v2")

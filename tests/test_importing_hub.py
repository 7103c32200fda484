"""Repositories on the Hub that hold GGUF files, where no name of one is given."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants

import hf_bitnet as hb
from hf_bitnet.publish.importing import holds_gguf
from hf_bitnet.publish.opening import tokenizer_at
from tests import gguf_models
from tests.hub_server import LoopbackHub
from tests.tokenizers_made import over_bytes

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


def test_such_a_repository_is_opened_like_any_other(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the model and its tokenizer; a repository that is not there is asked for, and named."""
    tokenizer = over_bytes()
    fields = {"weight": "ternary", "form": "packed"}
    model = gguf_models.made("llama", fields, vocab_size=len(tokenizer))
    hb.export_model(model, tmp_path / "gguf", format="gguf", tokenizer=tokenizer, verify=False, progress=False)
    hb.push_to_hub(tmp_path / "gguf", REPO)
    assert str(hb.coverage(hb.open_model(REPO))) == str(hb.coverage(hb.import_model(tmp_path / "gguf")))
    assert hb.import_tokenizer(REPO).encode("the dog</s>") == tokenizer.encode("the dog</s>")
    assert tokenizer_at(REPO).encode("the dog</s>") == tokenizer.encode("the dog</s>")
    assert holds_gguf(REPO) and not holds_gguf("org/nothing") and not holds_gguf("nothing")
    hb.export_model(REPO, tmp_path / "again", format="hf_bitnet", verify=False, progress=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert holds_gguf(REPO)
    assert str(hb.coverage(hb.open_model(REPO))) == str(hb.coverage(hb.import_model(tmp_path / "gguf")))  # as fetched before
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for opened in (hb.open_model, tokenizer_at):
        with pytest.raises(OSError, match="cannot load 'org/nothing': there is no such folder here, and of the Hub: "):
            opened("org/nothing")


def test_a_tokenizer_is_fetched_without_weights(hub: LoopbackHub, tmp_path: Path) -> None:
    """Of a repository in safetensors: with its chat template, and no weight is touched."""
    tokenizer = over_bytes()
    tokenizer.chat_template = "{{ messages }}"
    quantized = {"weight": "ternary", "form": "packed"}
    gguf_models.made("llama", quantized, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    hb.push_to_hub(tmp_path / "model", REPO)
    assert hb.import_tokenizer(REPO, revision="main").chat_template == "{{ messages }}"
    cache = Path(constants.HF_HUB_CACHE)
    assert any(cache.rglob("tokenizer.json")) and not any(cache.rglob("*.safetensors"))
    with pytest.raises(TypeError, match="takes no bogus"):
        hb.import_tokenizer(REPO, base=REPO, bogus=1)

"""Repositories on the Hub that hold GGUF files, where no name of one is given."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants

import hf_bitnet as hb
from hf_bitnet.cli import main
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
    with pytest.raises(
        ValueError, match=r"holds several GGUF files; name one: org/model/b\.gguf, or in place of it model\.gguf"
    ):
        hb.import_model(REPO, revision="v2")


def test_one_of_several_files_is_named(hub: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = over_bytes()
    model = gguf_models.made("llama", {"weight": "ternary", "form": "packed"}, vocab_size=len(tokenizer))
    hb.export_model(model, tmp_path / "gguf", format="gguf", tokenizer=tokenizer, verify=False, progress=False)
    hb.push_to_hub(tmp_path / "gguf", REPO)
    at = {"path_or_fileobj": tmp_path / "gguf/model.gguf", "repo_id": REPO}
    for name in ("other.gguf", "small/other.gguf"):
        HfApi().upload_file(path_in_repo=name, **at)
    expected = str(hb.coverage(hb.import_model(tmp_path / "gguf")))
    for name in ("org/model/other.gguf", "org/model/small/other.gguf"):
        assert holds_gguf(name)
        for opened in (hb.import_model(name), hb.open_model(name)):
            assert str(hb.coverage(opened)) == expected
        assert tokenizer_at(name).encode("the dog") == tokenizer.encode("the dog")
    assert main(["chat", REPO, "--prompt", "the dog"]) == 1
    assert "name one: org/model/model.gguf" in capsys.readouterr().err
    assert main(["chat", "org/model/other.gguf", "--prompt", "the dog", "--max-new-tokens", "2"]) == 0
    with pytest.raises(ValueError, match=r"names a GGUF file already, and file='model\.gguf' another one"):
        hb.import_model("org/model/other.gguf", file="model.gguf")
    for opened in (hb.open_model, hb.import_model):
        with pytest.raises(OSError, match=r"there is no file 'org/model/missing\.gguf', and the Hub"):
            opened("org/model/missing.gguf")
    with pytest.raises(ValueError, match=r"there is no folder or file 'some/missing\.gguf'"):
        hb.import_model("some/missing.gguf")


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

"""open_model: what a checkpoint brings is not run, and it is read from where the caller says it is."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hf_bitnet as hb
from hf_bitnet.publish.opening import open_tokenizer
from hf_bitnet.surgery import config_of
from hf_bitnet.training.distillation import teacher
from tests.command_line import save_quantized
from tests.hub_server import LoopbackHub
from tests.tiny import tiny


def evil(folder: Path) -> Path:
    """A checkpoint of a type that transformers does not know, with code that leaves a mark when it is run."""
    tiny("llama")[0].save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    values |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}}
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", None]}}))
    (folder / "evil.py").write_text(
        f"open({str(folder / 'ran')!r}, 'w').close()\nfrom transformers import LlamaConfig\n\n\n"
        "class EvilConfig(LlamaConfig):\n    model_type = 'evil'\n\n\nclass EvilTokenizer:\n    pass\n"
    )
    return folder


@pytest.mark.parametrize(
    "open_it",
    [
        hb.open_model,
        hb.load_native,
        lambda folder: hb.open_model(folder, trust_remote_code=None),
        lambda folder: teacher._load(folder, tiny("llama")[0], None),
    ],
    ids=["open_model", "load_native", "None", "teacher"],
)
def test_nobody_is_asked_whether_to_run_a_checkpoints_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, open_it: Callable[[Path], Any]
) -> None:
    folder = evil(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        open_it(folder)
    assert open_tokenizer(folder) is None
    assert not (folder / "ran").exists()


def test_code_of_a_checkpoint_is_run_where_the_caller_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = evil(tmp_path)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    hb.open_model(folder, trust_remote_code=True)
    assert (folder / "ran").exists()


@pytest.mark.parametrize("form", ["packed", "train"])
def test_a_model_is_opened_from_its_branch_and_its_folder(hub: LoopbackHub, tmp_path: Path, form: str) -> None:
    save_quantized(tmp_path / "run" / form, form)
    hb.push_to_hub(tmp_path / "run" / form, "org/model", revision="v2")  # its main branch has no config
    model = hb.open_model("org/model", revision="v2")
    assert config_of(model).form == form
    with pytest.raises(ValueError, match="Unrecognized model in org/model"):
        hb.open_model("org/model")
    assert config_of(hb.open_model(tmp_path / "run", subfolder=form)).form == form
    (tmp_path / "run" / form / "config.json").write_text("{")
    with pytest.raises(ValueError, match=rf"{form}/config\.json is damaged or incomplete"):
        hb.open_model(tmp_path / "run", subfolder=form)

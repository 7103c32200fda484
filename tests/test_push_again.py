"""push_to_hub where something is already: an earlier push in another form, a repository of others."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

import hf_bitnet as hb
from hf_bitnet.export import ExportReport
from hf_bitnet.files import write_json
from hf_bitnet.surgery import config_of
from tests.command_line import save_quantized
from tests.hub_server import LoopbackHub, Refused

REPO = "org/model"
_MADE = ("README.md", ".gitattributes")


def gguf(folder: Path, name: str = "model.gguf") -> Path:
    """What an export to GGUF leaves, but for its size and the reading back."""
    folder.mkdir(parents=True)
    (folder / name).write_bytes(b"GGUF" + bytes(99))
    report = ExportReport("gguf", folder.name, {}, [], [], [], {name: 103}, 0.0)
    write_json(folder / "export.json", report.to_dict())
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


def downloaded(hub: LoopbackHub, folder: Path, repo_id: str = REPO) -> Path:
    for path, content in hub.files(repo_id).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def test_what_was_pushed_with_remote_code_can_be_pushed_again(hub: LoopbackHub, tmp_path: Path) -> None:
    save_quantized(tmp_path / "packed")
    hb.export_model(tmp_path / "packed", tmp_path / "export", verify=False, progress=False)
    hb.push_to_hub(tmp_path / "export", REPO, remote_code=True)
    report = json.loads(hub.files(REPO)["export.json"])
    assert report["files"]["config.json"] == len(hub.files(REPO)["config.json"])
    assert report["bytes"] == sum(report["files"].values())
    hb.push_to_hub(downloaded(hub, tmp_path / "again"), "org/again")
    assert hub.files("org/again")["config.json"] == hub.files(REPO)["config.json"]


def test_a_push_that_stops_between_two_repositories_says_so(hub: LoopbackHub, tmp_path: Path) -> None:
    packed, train = save_quantized(tmp_path / "packed"), save_quantized(tmp_path / "train", "train")

    def refuse(number: int, method: str, path: str) -> None:
        if path.endswith("m-train/commit/main"):
            raise Refused(403, "Forbidden", "not now")

    hub.before = refuse
    with pytest.raises(HfHubHTTPError) as caught:
        hb.push_to_hub({"packed": packed, "train": train}, "org/m-{form}")
    oid = hub.repositories["org/m-packed"].branches["main"][-1].oid
    if sys.version_info >= (3, 11):
        assert caught.value.__notes__ == [
            f"pushed before this: {hub.url}/org/m-packed/commit/{oid}\nmade, and empty: org/m-train"
        ]
    with pytest.raises(HfHubHTTPError) as caught:
        hb.push_to_hub(tmp_path / "train", "org/m-train")
    if sys.version_info >= (3, 11):
        assert caught.value.__notes__ == ["made, and empty: org/m-train"]


def test_several_forms_as_they_lie_on_the_hub_can_be_pushed_again(hub: LoopbackHub, tmp_path: Path) -> None:
    save_quantized(tmp_path / "run" / "packed")
    save_quantized(tmp_path / "run" / "train", "train")
    gguf(tmp_path / "run" / "gguf")
    (tmp_path / "run" / "packed" / "training_args.bin").write_bytes(bytes(9_000_000))  # stays here
    hb.push_to_hub(tmp_path / "run", REPO, forms=("packed", "train", "gguf"))
    card = hub.files(REPO)["README.md"].decode()
    size = sum(len(content) for path, content in hub.files(REPO).items() if "/" not in path and path not in _MADE) / 1e6
    assert f"| (root) | packed | packed low-bit weights, to deploy | {size:.2f} |" in card and size < 1
    again = downloaded(hub, tmp_path / "again")
    report = hb.push_to_hub(again, "org/again", forms=("packed", "train", "gguf"))
    assert report.repos[0].left_out == {}
    assert hub.files("org/again").keys() == hub.files(REPO).keys()
    assert hub.files("org/again")["README.md"].decode() == card.replace("org/model", "org/again")
    elsewhere = {"packed": again, "train": tmp_path / "run" / "train"}
    assert hb.push_to_hub(elsewhere, "org/one", dry_run=True).repos[0].left_out.keys() == {"gguf/"}
    report = hb.push_to_hub(again, "org/one")  # the form that the folder has, and nothing else
    assert report.repos[0].forms == ("packed",) and report.repos[0].left_out.keys() == {"gguf/", "train/"}
    alone = hub.files("org/one")["README.md"].decode()
    assert "## Files" not in alone and "## Export in" not in alone and "## Quantization" in alone
    shutil.copytree(again / "train", again / "train2")
    assert hb.push_to_hub(again, "org/one").repos[0].forms == ("packed",)
    with pytest.raises(ValueError, match=r"'train' and 'train2' in .* are both in form 'train'; push one of them"):
        hb.push_to_hub(again, "org/one", forms=("train",))
    hb.push_to_hub(again / "train", "org/two")
    trained = downloaded(hub, tmp_path / "trained", "org/two")
    save_quantized(trained / "packed")
    assert hb.push_to_hub(trained, "org/two").repos[0].forms == ("train",)

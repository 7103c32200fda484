"""Files and folders are whole or not there, also when the process that writes them is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_bitnet import files
from hf_bitnet.files import beside, new_folder, put_in_place, refuse_existing, write_json
from hf_bitnet.hub import write_card


def test_files_are_written_whole(tmp_path: Path) -> None:
    assert json.loads(write_json(tmp_path / "results.json", {"a": [1.5]}).read_text()) == {"a": [1.5]}
    with pytest.raises(TypeError):
        write_json(tmp_path / "results.json", {"a": object()})
    assert json.loads((tmp_path / "results.json").read_text()) == {"a": [1.5]}
    with pytest.raises(UnicodeEncodeError):
        write_card(tmp_path, ModelCard("# lone surrogate \udc80"))
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_new_folder_is_complete_or_absent(tmp_path: Path) -> None:
    with new_folder(tmp_path / "deep" / "out") as folder:
        (folder / "config.json").write_text("1")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "config.json").read_text() == "1"
    with pytest.raises(KeyError), new_folder(tmp_path / "deep" / "other") as folder:
        (folder / "config.json").write_text("1")
        raise KeyError
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_new_folder_replaces_a_model_only_when_allowed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    with (
        pytest.raises(ValueError, match="is not empty; choose another one, or replace it: --force"),
        new_folder(out, advice="--force"),
    ):
        pass
    with pytest.raises(KeyError), new_folder(out, overwrite=True):
        raise KeyError
    assert (out / "config.json").read_text() == "old"
    with new_folder(out, overwrite=True) as folder:
        (folder / "new").write_text("")
    assert [path.name for path in out.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(ValueError, match=r"holds no model \(no config.json\), so it is not replaced"):
        refuse_existing(out, overwrite=True)
    with pytest.raises(ValueError, match="is a file; give a folder"):
        refuse_existing(out / "new", overwrite=True)


def test_what_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for overwrite, words in ((False, "is not empty; choose another one"), (True, "holds no model")):
        with pytest.raises(ValueError, match=words), new_folder(out, overwrite=overwrite):
            out.mkdir(exist_ok=True)
            (out / "precious.txt").write_text("x")
        assert [path.name for path in tmp_path.rglob("*")] == ["out", "precious.txt"]
    (tmp_path / "new").mkdir()
    with pytest.raises(OSError, match="not empty"):  # even between the last look and the renaming
        put_in_place(tmp_path / "new", out, overwrite=False)
    assert (out / "precious.txt").exists()


def test_the_present_folder_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("", ".", str(tmp_path)):
        with pytest.raises(ValueError, match="the folder that this process is in, which is not replaced; name another"):
            refuse_existing(name, overwrite=True)
    refuse_existing("out", overwrite=False)


def test_only_a_model_is_replaced(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {})
    files_of_users = [(name, "file") for name in ("adapter_model.safetensors", "notes.md", "prepare.py", "rows.csv")]
    for name, made in ((".git", "folder"), ("checkpoint-500", "folder"), ("optimizer.pt", "file"), *files_of_users):
        (tmp_path / name).mkdir() if made == "folder" else (tmp_path / name).write_text("")
        with pytest.raises(ValueError, match=f"holds '{name}' beside a model, so it is not replaced; move that"):
            refuse_existing(tmp_path, overwrite=True)
        (tmp_path / name).rmdir() if made == "folder" else (tmp_path / name).unlink()
    for name in (
        "training_args.bin",
        "prophetnet.tokenizer",
        "vocab.json",
        "merges.txt",
        "README.md",
        "model-00001.safetensors",
    ):
        (tmp_path / name).write_text("")
    refuse_existing(tmp_path, overwrite=True)
    for name in (".cache", "pictures"):  # of huggingface_hub, and of an export
        (tmp_path / name).mkdir()
    write_json(tmp_path / "export.json", {"files": {"pictures/curve.svg": 1}})
    refuse_existing(tmp_path, overwrite=True)
    (tmp_path / "export.json").write_text("[]")
    with pytest.raises(ValueError, match="holds 'pictures' beside a model"):
        refuse_existing(tmp_path, overwrite=True)


def test_a_process_of_another_container_counts_as_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "readlink", lambda path: "pid:[1]")
        files._machine.cache_clear()
        elsewhere = beside(tmp_path / "out").with_name(beside(tmp_path / "out").name.replace(f".{os.getpid()}.", ".999999."))
    files._machine.cache_clear()
    elsewhere.mkdir()
    with new_folder(tmp_path / "out"):
        pass
    assert elsewhere.is_dir()


def test_what_was_there_comes_back_when_renaming_fails(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("")
    with pytest.raises(FileNotFoundError):
        put_in_place(tmp_path / "missing", tmp_path / "out")
    assert (tmp_path / "out" / "old").exists()


def test_old_folder_comes_back_without_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system cannot exchange two names."""
    monkeypatch.setattr(files, "_renameat2", lambda: None)
    test_what_was_there_comes_back_when_renaming_fails(tmp_path)
    (tmp_path / "new").mkdir()
    put_in_place(tmp_path / "new", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and not any((tmp_path / "out").iterdir())


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    code = "import os, sys, pathlib, hf_bitnet.files as f; p = f.beside(pathlib.Path(sys.argv[1])); p.mkdir(); os._exit(9)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    running, other = beside(tmp_path / "out"), tmp_path / ".out.elsewhere.1.00000000"
    running.mkdir()
    other.mkdir()
    with new_folder(tmp_path / "out"):
        pass
    assert sorted(tmp_path.iterdir()) == sorted([running, other, tmp_path / "out"])


def test_names_beside_say_who_writes(tmp_path: Path) -> None:
    assert f".{os.getpid()}." in beside(tmp_path / "out").name and beside(tmp_path / "out").parent == tmp_path

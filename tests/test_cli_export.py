"""`hf-bitnet export` and `push`: what they hand on, what they print, exit code 3."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import hf_bitnet as hb
from hf_bitnet.cli.options import FORMATS
from hf_bitnet.export import EXPORT_FORMATS, Check, ExportFormat, ExportReport, Source, WrittenTensor, plain
from tests.command_line import Captured, run, save_quantized
from tests.hub_server import LoopbackHub


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_quantized(tmp_path_factory.mktemp("packed"))


@dataclass(frozen=True)
class Slip(ExportFormat):
    """A format of one small file."""

    summary: ClassVar[str] = "a slip of paper"
    readers: ClassVar[str] = "people"
    why: ClassVar[str] = ""
    passed: ClassVar[bool] = True

    note: str = "none"
    copies: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.copies, int):
            raise TypeError(f"format 'slip': copies={self.copies!r}; give a whole number")

    def refusals(self, source: Source) -> list[str]:
        return [self.why] if self.why else []

    def write(self, source: Source, folder: Path, progress: Any) -> list[WrittenTensor]:
        (folder / "slip.txt").write_text(f"{source.name}: {self.note}\n" * self.copies)
        assert source.tokenizer is not None
        return [WrittenTensor("a", "a", "ink", (2,), 7)]

    def compare(self, source: Source, folder: Path, written: list[WrittenTensor], logits: bool) -> list[Check]:
        return [
            Check("a child", "every word", True),
            Check("a teacher", "logits" if logits else "spelling", self.passed, "1 slip"),
        ]


@pytest.fixture(autouse=True)
def slip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXPORT_FORMATS._members, "slip", Slip)


def logits_here(folder: Path, kind: str, inputs: Any, dtype: torch.dtype, with_library: bool = False, **options: Any) -> Any:
    """In place of another process."""
    with torch.no_grad():
        return {"logits": hb.open_model(folder, dtype=dtype, **options)(**inputs).logits.float()}


def test_export(packed: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "run_plain", logits_here)
    out = tmp_path / "out"
    words = ["export", packed, out, "--format", "dense", "--set", "dtype=float32", "--set", 'max_shard_size="1MB"']
    code, printed, err = run(capsys, *words)
    assert (code, err) == (0, "")
    assert f"dense: {out}" in printed and "tensors: 21 x float32" in printed
    assert "parity: equal    safetensors: quantized values (14 tensors, bit for bit)" in printed
    assert "parity: equal    transformers without hf_bitnet: logits" in printed
    report = json.loads((out / "export.json").read_text())
    assert report["options"] == {"dtype": "float32", "max_shard_size": "1MB"}
    code, printed, _ = run(capsys, *words, "--force", "--json", "--verify", "codes")
    result = json.loads(printed)
    assert code == 0 and result["exports"][0]["options"] == report["options"] and len(result["exports"][0]["checks"]) == 1
    code, printed, _ = run(capsys, *words, "--force", "--verify", "none", "--base-model", "org/base")
    assert code == 0 and "parity: not checked (--verify none)" in printed
    assert "base_model: org/base" in (out / "README.md").read_text()


def test_export_of_several_formats(packed: Path, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "out"
    words = ["export", packed, out, "--format", "dense", "slip", "dense", "--verify", "codes", "--name", "Ada"]
    code, printed, _ = run(capsys, *words, "--set", "copies=2", "--set", "slip.note=true", "--set", "dense.dtype=float16")
    assert code == 0 and f"dense: {out / 'dense'}" in printed and f"slip: {out / 'slip'}" in printed
    assert sorted(path.name for path in out.iterdir()) == ["dense", "slip"]
    assert (out / "slip" / "slip.txt").read_text() == "Ada: True\nAda: True\n"
    assert json.loads((out / "dense" / "export.json").read_text())["options"]["dtype"] == "float16"
    code, _, err = run(capsys, *words)
    assert code == 1 and "is not empty; choose another one, or replace it: --force" in err


@pytest.mark.parametrize("several", [False, True])
def test_a_difference_is_exit_3(
    packed: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch, several: bool
) -> None:
    monkeypatch.setattr(Slip, "passed", False)
    out = tmp_path / "out"
    formats = ["slip", "dense"] if several else ["slip"]
    words = ["export", packed, out, "--verify", "codes", "--format", *formats]
    code, printed, err = run(capsys, *words)
    assert code == 3
    assert "slip: not written\nparity: equal    a child: every word\nparity: DIFFERS  a teacher: spelling (1 slip)\n" in printed
    assert err.startswith("hf-bitnet export: error: format 'slip': what was read back is not the model that was written")
    assert err.count("\n") == 1
    # the other format is there all the same
    assert [path.name for path in tmp_path.rglob("export.json")] == ["export.json"] * several
    code, printed, err = run(capsys, *words, "--json", "--force")
    failed = json.loads(printed)["exports"][0]
    assert code == 3 and "not the model that was written" in failed["error"]
    assert [check["passed"] for check in failed["checks"]] == [True, False]


def test_a_refusal_is_exit_1(packed: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Slip, "why", "a norm in front")
    code, printed, err = run(capsys, "export", packed, tmp_path / "out", "--format", "slip")
    assert (code, printed) == (1, "") and "format 'slip' cannot hold this model: a norm in front" in err
    assert not list(tmp_path.iterdir())
    code, _, err = run(capsys, "export", packed, tmp_path / "out", "--format", "slip", "--set", "copies=many")
    assert code == 2 and "copies='many'; give a whole number" in err


def test_a_missing_package_is_one_line(packed: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*unused: Any) -> list[WrittenTensor]:
        raise ImportError("format 'slip' needs ink: pip install 'hf_bitnet[ink]'")

    monkeypatch.setattr(Slip, "write", write)
    code, _, err = run(capsys, "export", packed, tmp_path / "out", "--format", "slip")
    assert (code, err) == (1, "hf-bitnet export: error: format 'slip' needs ink: pip install 'hf_bitnet[ink]'\n")


def test_list_of_formats(capsys: Captured) -> None:
    code, printed, err = run(capsys, "export", "--list")
    assert (code, err) == (0, "")
    for name in EXPORT_FORMATS:
        assert EXPORT_FORMATS.get(name).summary in printed and f"\n  {name}: " in printed
    assert '  slip: note="none"  copies=1' in printed
    found = json.loads(run(capsys, "export", "--list", "--json")[1])
    assert found["slip"] == {"summary": "a slip of paper", "readers": "people", "options": {"note": "none", "copies": 1}}


def test_completion_knows_the_formats() -> None:
    assert {*EXPORT_FORMATS} - {"slip"} <= {*FORMATS}


def test_info_of_an_export(packed: Path, tmp_path: Path, capsys: Captured) -> None:
    run(capsys, "export", packed, tmp_path / "slip", "--format", "slip")
    code, printed, err = run(capsys, "info", tmp_path / "slip")
    assert (code, err) == (0, "") and f"slip: {tmp_path / 'slip'}" in printed
    assert "parity: equal    a teacher: logits (1 slip)" in printed and "LlamaForCausalLM" not in printed
    result = json.loads(run(capsys, "info", tmp_path / "slip", "--json")[1])
    saved = json.loads((tmp_path / "slip" / "export.json").read_text())
    assert result["export"] == {**saved, "path": str(tmp_path / "slip")} and isinstance(saved["tensors"], list)
    run(capsys, "export", packed, tmp_path / "quiet", "--format", "slip", "--verify", "none")
    assert "parity: was not checked" in run(capsys, "info", tmp_path / "quiet")[1]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"tensors": [], "checks": []}', '{"tensors": [{}], "checks": []}'])
def test_info_of_a_broken_report(tmp_path: Path, capsys: Captured, text: str) -> None:
    (tmp_path / "export.json").write_text(text)
    code, _, err = run(capsys, "info", tmp_path)
    assert code == 1 and "export.json' is not what export_model writes" in err


def test_a_report_is_found_again_as_it_was_written(packed: Path, tmp_path: Path) -> None:
    from hf_bitnet.cli.info import _report

    written = hb.export_model(packed, tmp_path / "out", format="slip", progress=False)
    found = _report(tmp_path / "out" / "export.json")
    assert isinstance(found, ExportReport) and found == written


# ---- push ----


def test_push(packed: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch, hub: LoopbackHub) -> None:
    monkeypatch.setattr(plain, "run_plain", logits_here)
    code, printed, err = run(capsys, "push", packed, "me/model", "--dry-run")
    assert (code, err) == (0, "") and "model.safetensors" in printed and printed.endswith("not pushed (dry run)\n")
    assert not hub.repositories
    code, printed, err = run(capsys, "push", packed, "me/model", "--private", "--message", "First", "--base-model", "org/base")
    assert (code, err) == (0, "") and printed.startswith("me/model: packed; ") and f"{hub.url}/me/model/commit/" in printed
    assert hub.commits("me/model") == ["First"] and hub.repositories["me/model"].private
    assert hub.files("me/model")["model.safetensors"] == (packed / "model.safetensors").read_bytes()
    assert b"base_model: org/base" in hub.files("me/model")["README.md"]
    words = ["push", packed, "me/{form}", "--forms", "packed", "dense", "--no-card", "--remote-code", "--revision", "next"]
    code, printed, err = run(capsys, *words, "--json")
    assert code == 0, err
    result = json.loads(printed)
    assert [repo["repo_id"] for repo in result["repos"]] == ["me/packed", "me/dense"] and result["dry_run"] is False
    assert result["url"] == result["repos"][0]["url"]
    assert "export.json" in hub.files("me/dense", "next") and "README.md" not in hub.files("me/packed", "next")
    assert any(name.endswith(".py") for name in hub.files("me/packed", "next"))


def test_push_that_fails(
    packed: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch, hub: LoopbackHub
) -> None:
    code, _, err = run(capsys, "push", tmp_path, "me/model")
    assert code == 1 and err.startswith("hf-bitnet push: error: ") and err.count("\n") == 1
    monkeypatch.setattr(Slip, "passed", False)
    code, printed, err = run(capsys, "push", packed, "me/model", "--forms", "slip", "--json")
    assert code == 3 and "not the model that was written" in err and "parity: DIFFERS  a teacher: logits (1 slip)" in err
    assert [check["passed"] for check in json.loads(printed)["checks"]] == [True, False]
    assert not hub.repositories

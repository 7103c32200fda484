"""Each benchmark runs, on sizes at which its figures mean nothing; and writes nothing then.

Those that measure in processes of their own do so in the slow tests; the fast ones run the same code in this process.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import hf_bitnet as hb
from benchmarks import (
    cpu_kernels,
    distillation_memory,
    experts,
    export_llama_cpp,
    export_speed,
    generate,
    gpu,
    gpu_generate,
    gpu_parity,
    gpu_step,
    monitor_overhead,
    ptq_table,
    saved_memory,
    schedule_overhead,
    starts,
    train_memory,
    train_step,
    vocabulary,
)
from benchmarks.common import RESULTS, commit
from benchmarks.gpu_common import Section, Settings
from hf_bitnet.kernels import dispatch
from hf_bitnet.kernels.cpu import library

Captured = pytest.CaptureFixture[str]
# torchao, a peer that is measured where it is installed, warns about what it could do on other machines
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _writes_nothing():
    before = {path: path.stat().st_mtime_ns for path in RESULTS.glob("*")}
    yield
    assert {path: path.stat().st_mtime_ns for path in RESULTS.glob("*")} == before


def test_experts(capsys: Captured) -> None:
    experts.main(["--smoke"])
    printed = capsys.readouterr().out
    assert "decode_tokens_per_s" in printed and printed.count("hf_bitnet") == 5


def test_train_step(capsys: Captured) -> None:
    train_step.main(["--smoke", "--modes", "float32 eager"])
    rows = capsys.readouterr().out.splitlines()[1:]
    arms = {"full precision", "hf_bitnet"}
    assert all(any(arm in row and "fails" not in row for row in rows) for arm in arms)


def test_saved_memory(capsys: Captured) -> None:
    saved_memory.main(["--smoke"])
    out = capsys.readouterr().out
    assert "hf_bitnet" in out and "bfloat16 autocast" in out


def test_schedule_overhead(capsys: Captured) -> None:
    schedule_overhead.main(["--smoke"])
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows if "step" not in row] == list(schedule_overhead.SCHEDULES)


def test_vocabulary(shared_dir: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "EMBEDDINGS", {"full precision": None, "int4": "int4"})
    vocabulary.main(["--smoke"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("novels-llama-small")]
    assert len(lines) == 8  # four while it runs, four in the table


def test_distillation_memory(capsys: Captured) -> None:
    distillation_memory.main(["--smoke"])
    rows = [line.rsplit(maxsplit=2) for line in capsys.readouterr().out.splitlines() if ":" in line]
    peaks = {name: float(peak) for name, peak, _ in rows}
    assert 0 < peaks["chunks of 16: CE + KL"] < peaks["transformers: CE + KL"]
    assert peaks["chunks of 16: CE + KL"] < 1.1 * peaks["chunks of 16: CE"]
    assert peaks["relations: 1024 rows"] > 0


@pytest.mark.parametrize("arm", train_memory.ARMS[:2])
def test_train_memory_of_one_arm(arm: str, capsys: Captured) -> None:
    size = {"hidden": 64, "ffn": 96, "layers": 2, "vocabulary": 128}
    train_memory.main(["--one", json.dumps({"arm": arm, "size": size, "batch": 1, "length": 16, "steps": 2})])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    # weights, gradients and Adam's two moments, all float32; and a step counter of each tensor
    assert found["counted"] // found["parameters"] == 4 * 4 and found["before"] > 0


@pytest.mark.slow
def test_train_memory(capsys: Captured) -> None:
    train_memory.main(["--smoke"])
    full, ours, lean = capsys.readouterr().out.splitlines()[1:]
    assert "fails" not in full + ours
    assert "full precision" in full and "lean" in lean


def test_monitor_overhead(capsys: Captured) -> None:
    monitor_overhead.main(["--smoke"])
    assert "overhead" in capsys.readouterr().out


def test_ptq_table(shared_dir: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    # all rows are a matter of minutes; one of each form is enough to see that it runs
    configurations = ptq_table.configurations()
    assert len(configurations) > 20
    monkeypatch.setattr(ptq_table, "configurations", lambda: configurations[:2])
    ptq_table.main(["--smoke"])
    assert "novels-llama-small: full precision" in capsys.readouterr().out


@pytest.mark.usefixtures("tiny_shared")
def test_starts(capsys: Captured) -> None:
    _check_starts(capsys)


@pytest.mark.slow
def test_starts_of_a_real_model(shared_dir: Path, capsys: Captured) -> None:
    _check_starts(capsys)


def _check_starts(capsys: Captured) -> None:
    starts.main(["--smoke"])
    out = capsys.readouterr().out
    assert "least_squares, weighted" in out and "gptq" in out


def test_generate(tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    def here(given: argparse.Namespace, *flags: str) -> dict[str, Any]:
        return generate.work(given.folder, given.prompt, given.tokens, "--optimized" in flags, "--breakdown" in flags)

    monkeypatch.setattr(generate, "in_a_process", here)
    _check_generate(tmp_path, capsys)


@pytest.mark.slow
def test_generate_in_processes_of_its_own(tmp_path: Path, capsys: Captured) -> None:
    _check_generate(tmp_path, capsys)


def test_export_speed(tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    def here(folder: Path, format: str, verify: str | bool, options: dict[str, Any]) -> dict[str, float]:
        return export_speed.work(folder, tmp_path / f"{format}-{verify}", format, verify, options)

    monkeypatch.setattr(export_speed, "measure", here)
    export_speed.main(["--folder", str(tmp_path / "tiny"), "--smoke", "--formats", "dense"])
    assert capsys.readouterr().out.count("dense ") == 2


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_shared")
def test_export_llama_cpp(tmp_path: Path, capsys: Captured) -> None:
    pytest.importorskip("gguf", reason="needs the package gguf: pip install gguf")
    pytest.importorskip("llama_cpp", reason="needs llama.cpp: pip install llama-cpp-python")
    path = tmp_path / "models" / "novels-llama-small"
    hb.pack_model(hb.quantize_model(hb.open_model(path), hb.BitNetQuantizationConfig())).save_pretrained(tmp_path / "packed")
    AutoTokenizer.from_pretrained(path).save_pretrained(tmp_path / "packed")
    export_llama_cpp.main([str(tmp_path / "packed"), "--kind", "Q2_0", "--smoke", "--windows", "1", "--prompts", "1"])
    assert "top-1 agreement" in capsys.readouterr().out


def _check_generate(folder: Path, capsys: Captured) -> None:
    generate.main(["--folder", str(folder), "--smoke", "--layers", "2", "--rounds", "1", "--tokens", "4", "--prompt", "8"])
    out = capsys.readouterr().out
    assert "decode_tokens_per_s" in out and "decoder layers in one call, norm" in out and "output head" in out


# ---- on GPUs: the same code at tiny sizes on the CPU ----


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The definitions' losses, too; compiling is left to the slow test."""
    here = Settings(smoke=True).device
    monkeypatch.setattr(gpu_parity, "losses_of_the_definitions", lambda steps, smoke: gpu_parity.losses(steps, here))
    monkeypatch.setattr(gpu_step, "SMOKE", gpu_step.SMOKE._replace(backend="eager", layers=1))
    monkeypatch.setattr(gpu_generate, "SMOKE", gpu_generate.SMOKE._replace(tokens=2))


@pytest.mark.usefixtures("in_this_process")
def test_gpu(capsys: Captured) -> None:
    assert gpu.main(["--smoke"]) == 0
    out = capsys.readouterr().out
    for title in (
        "parity: operations",
        "parity: losses",
        "training step",
        "packed products, few rows",
        "products",
        "quantization",
    ):
        assert f"\n{title}\n" in out
    assert "generate, one sequence" in out and "skipped: needs CUDA" in out and "\nbars\n" in out
    mistakes = [line for line in out.splitlines() if "Error" in line or "not timed" in line]
    assert not mistakes


@pytest.mark.slow
def test_gpu_in_processes(capsys: Captured) -> None:
    assert gpu.main(["--smoke"]) == 0
    section = gpu.run_in_a_process("parity", Settings(seconds=1.0), limit=300.0)
    checked = section.tables["parity: operations"]
    assert {row["operation"] for row in checked} == set(gpu_parity.OPERATIONS)


@pytest.mark.usefixtures("in_this_process")
def test_gpu_times_nothing_that_is_wrong(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    serving = gpu_parity.serving

    def wrong(operation: str, device: Any) -> dispatch.Body:
        body = serving(operation, device)
        if operation != "packed_linear":
            return body
        return dispatch.Body("wrong", lambda *args: body.function(*args) + 1, body.why_unavailable)

    monkeypatch.setattr(gpu_parity, "serving", wrong)
    assert gpu.main(["--smoke", "--only", "packed"]) == 1
    out = capsys.readouterr().out
    assert "WRONG RESULTS: packed_linear" in out and "not timed: parity failed for packed_linear" in out
    assert "torch bfloat16" not in out


@pytest.mark.usefixtures("in_this_process")
def test_gpu_goes_on_after_an_arm_that_cannot(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(stack: gpu_step.Stack) -> Any:
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setitem(gpu_step.ARMS, gpu_step.TORCHAO, broken)
    assert gpu.main(["--smoke", "--only", "step"]) == 0
    out = capsys.readouterr().out
    assert "RuntimeError: out of memory " in out and "and more" not in out


def test_gpu_wants_a_gpu(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "torch sees no GPU here; --smoke runs" in capsys.readouterr().err


def test_a_section_whose_process_dies_has_failed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu.sys, "executable", "false")
    section = gpu.run_in_a_process("parity", Settings(), limit=60.0)
    assert "exit code 1" in section.tables["parity"][0]["wrong"] and set(section.failed) > set(gpu_parity.OPERATIONS)
    assert gpu.run_in_a_process("step", Settings(), limit=60.0).failed == []


def test_what_comes_after_a_broken_gpu_is_not_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    def compare(operation: str, *_: Any) -> str | None:
        return "illegal memory access" if operation == "pack" else None

    monkeypatch.setattr(gpu_parity, "compare", compare)
    monkeypatch.setattr(gpu_parity, "is_broken", lambda device: True)
    results = gpu_parity.work(Settings(smoke=True), ["quantize_rows", "pack", "unpack"], 0, 1)
    rows = {row["operation"]: row for row in gpu_parity.operations_rows(results, Settings().device)}
    assert (rows["quantize_rows"]["cases"], rows["quantize_rows"]["wrong"]) == (1, 0) and rows["quantize_rows"]["left out"]
    assert rows["pack"]["wrong"] == 1 and "illegal memory access" in rows["pack"]["first"]
    assert rows["unpack"]["first"] == "never checked"


def test_a_configuration_too_large_for_the_gpu_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    class OutOfResources(Exception):
        pass

    calls: list[str] = []

    def large_at_first(*args: Any) -> Any:
        calls.append("call")
        if len(calls) == 1:
            raise OutOfResources
        return gpu_parity.reference.int_matmul(*args)

    body = dispatch.Body("triton", large_at_first, lambda device: None)
    monkeypatch.setattr(gpu_parity, "serving", lambda operation, device: body)
    _, args = next(gpu_parity.cases.CASES["int_matmul"]())
    assert gpu_parity.compare("int_matmul", args, Settings().device, lambda: calls.append("forget")) is None
    assert calls == ["call", "forget", "call"]


def test_bars_say_whether_they_are_met() -> None:
    section = Section()
    section.bar("time", 0.9, 1.0, at_least=False)
    section.bar("time", 1.1, 1.0, at_least=False)
    section.bar("speed", 3.0, 4.0, at_least=True)
    section.bar("speed", None, 4.0, at_least=True)
    assert [bar["met"] for bar in section.bars] == ["yes", "no", "no", "-"]


def test_losses_that_differ_are_seen() -> None:
    same = [5.0 - 0.01 * step for step in range(200)]
    assert gpu_parity.compare_losses(same, same)["means differ by (1e-3)"] == 0
    off = [loss * (1.002 if step > 100 else 1) for step, loss in enumerate(same)]
    assert gpu_parity.compare_losses(off, same)["means differ by (1e-3)"] == pytest.approx(2.0, rel=1e-3)


def test_commit_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert commit() == "unknown"


needs_kernels = pytest.mark.skipif(library.why_unavailable() is not None, reason="there are no CPU kernels to measure")


@needs_kernels
def test_cpu_kernels(capsys: Captured) -> None:
    level = library.level()
    cpu_kernels.main(["--smoke", "--threads", "1"])
    out = capsys.readouterr().out
    assert library.level() == level
    for name in (*library.legal_levels(), "torch bfloat16", "torch int4pack", "torch._int_mm", "quantize_model + pack_model"):
        assert name in out


@needs_kernels
def test_cpu_kernels_without_a_compiler(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    cpu_kernels.main(["--smoke", "--threads", "1", "--only", "rows", "--levels", "portable"])
    out = capsys.readouterr().out
    assert "no C++ compiler" in out and "portable" in out and "from C" not in out

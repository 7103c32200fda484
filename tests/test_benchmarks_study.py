"""The study runs, chooses rates, pairs seeds; every arm trains; the models of the convergence benchmark do too."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from benchmarks import convergence
from benchmarks.study import __main__ as study_main
from benchmarks.study import run as study_run
from benchmarks.study.arms import ARMS
from benchmarks.study.plan import STUDIES, Run, missing
from benchmarks.study.tables import table_of
from hf_bitnet import BitNetQuantizationConfig

Captured = pytest.CaptureFixture[str]
# transformers' AutoBitLinear, a peer, brings warnings of its own
pytestmark = pytest.mark.filterwarnings("ignore")

# of the small studies: an arm of ours, one that fits its start, one without quantization
_FAST_ARMS = ("all", "GPTQ start", "full-precision twin")


@pytest.mark.usefixtures("tiny_shared")
@pytest.mark.parametrize("arm", [each if each in _FAST_ARMS else pytest.param(each, marks=pytest.mark.slow) for each in ARMS])
def test_study_of(arm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_run, "RESULTS", tmp_path)
    monkeypatch.setattr(study_run, "UNREAD", 1)
    study_run.text_of.cache_clear()
    row = study_run.execute(Run("ternary", arm, 1e-3, 0), batch=2, limit=2, tokens=1024)
    study_run.text_of.cache_clear()
    assert Run("ternary", arm, 1e-3, 0).is_row(row)
    assert len(row["ratios"]) == 2 and min(row["ratios"]) > 0.5 and min(row["perplexities"]) > 1


@pytest.mark.parametrize("name", STUDIES)
def test_arms_fit_their_study(name: str) -> None:
    """TWN's scale, say, is for ternary weights."""
    for arm in map(ARMS.__getitem__, STUDIES[name].arms):
        if arm.quantization is not None and arm.peer is None:
            BitNetQuantizationConfig(**{**STUDIES[name].quantization, **arm.quantization})


def _row(arm: str, rate: float, seed: int, *ratios: float) -> dict[str, Any]:
    return {**vars(Run("channel", arm, rate, seed)), "ratios": ratios if len(ratios) == 2 else ratios * 2}


def test_study_tries_rates_then_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STUDIES, "channel", dataclasses.replace(STUDIES["channel"], arms=("plain",), seeds=3, rates=(1.0, 2.0)))
    assert missing("channel", []) == [Run("channel", "plain", 1.0, 0), Run("channel", "plain", 2.0, 0)]
    rows = [_row("plain", 1.0, 0, 1.1), _row("plain", 2.0, 0, 1.2)]
    assert missing("channel", rows) == [Run("channel", "plain", 1.0, 1), Run("channel", "plain", 1.0, 2)]
    assert missing("channel", [*rows, _row("plain", 1.0, 1, 1.2), _row("plain", 1.0, 2, 1.3)]) == []


def test_study_reports_each_half_at_the_rate_of_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STUDIES, "channel", dataclasses.replace(STUDIES["channel"], arms=("plain",), seeds=2, rates=(1.0, 2.0)))
    rows = [_row("plain", 1.0, 0, 1.1, 1.4), _row("plain", 2.0, 0, 1.3, 1.2)]
    assert missing("channel", rows) == [Run("channel", "plain", 2.0, 1), Run("channel", "plain", 1.0, 1)]
    (line,) = table_of("channel", rows)
    assert line["rate"] == "2 and 1" and line["ratio"] == pytest.approx((1.3 * 1.4) ** 0.5)
    (line,) = table_of("channel", [*rows, _row("plain", 1.0, 1, 1.0, 1.1)])
    assert line["seeds"] == 1  # the second seed has only one of the two rates


def test_study_table_pairs_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        STUDIES, "channel", dataclasses.replace(STUDIES["channel"], arms=("plain", "cautious"), seeds=2, rates=(1.0,))
    )
    rows = [_row("plain", 1.0, seed, ratio) for seed, ratio in enumerate((1.10, 1.20))]
    rows += [_row("cautious", 1.0, seed, ratio) for seed, ratio in enumerate((1.08, 1.16))]
    best, plain = table_of("channel", rows)
    assert (best["arm"], best["seeds"], round(best["ratio"], 6)) == ("cautious", 2, 1.12)
    assert best["difference"] == "-0.0300 +- 0.0100" and plain["difference"] == "-"


def test_study_lists_what_is_missing(capsys: Captured) -> None:
    study_main.main(["ternary", "--list"])
    assert "ternary: 1.58 bits" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        study_main.main(["tenary"])
    assert "unknown: tenary; studies: ternary," in capsys.readouterr().err


@pytest.mark.parametrize("bits", ["full precision", "1.58"])
def test_convergence(bits: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convergence, "STEPS", 4)
    convergence.main(["--models", "llama", "--bits", bits, "--seeds", "1", "--try"])
    assert f"llama, {bits} bits, seed 0" in capsys.readouterr().out  # four steps are too few


@pytest.mark.slow
@pytest.mark.parametrize("model", convergence.MODELS)
def test_convergence_builds(model: str) -> None:
    assert convergence.run(model, "2", 0, 1e-3)["finite"]

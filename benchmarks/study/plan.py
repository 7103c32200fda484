"""Which arms are compared in which study, on how many tokens, with how many seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.study.arms import ARMS

SMALL, LARGE = "novels-llama-small", "novels-llama"
# what the parts of "all" do by themselves is in the ablation
_COMPARED = (
    "plain",
    "full-precision twin",
    "labels only",
    "AutoBitLinear, ramp",
    "learned scale",
    "softmax relaxation",
    "annealed residual",
    "pull and noise",
    "all",
    "all, softmax relaxation",
)
_CONVERSIONS = ("plain", "learned scale", "GPTQ start", "all but TWN's scale")
_BATCHES = {"per_device_train_batch_size"}
_TEXT_ONLY = ("full-precision twin", "labels only")


@dataclass(frozen=True)
class Study:
    """One table.

    Attributes:
        purpose: one line.
        quantization: fields of BitNetQuantizationConfig of every arm, below the arm's own.
        arms: names of `ARMS`; the first is what others are compared with.
        tokens: that pass through the student in each run. seeds: how many.
        model: of ../shared/models. scratch: its shape with random weights in place of its weights.
        rates: None tries each arm's own; else these, the same for all arms.
    """

    purpose: str
    quantization: Mapping[str, Any]
    arms: tuple[str, ...]
    tokens: int = 1_500_000
    seeds: int = 5
    model: str = SMALL
    scratch: bool = False
    rates: tuple[float, ...] | None = field(default=None)


_TERNARY = {"weight": "ternary"}

STUDIES: dict[str, Study] = {
    "ternary": Study("1.58 bits, one scale a tensor: the comparison", _TERNARY, _COMPARED),
    "ternary-6m": Study("the best, four times the tokens", _TERNARY, ("all", "all, softmax relaxation"), tokens=6_000_000),
    "channel": Study("1.58 bits, one scale a channel", {**_TERNARY, "granularity": "channel"}, (*_CONVERSIONS, "all")),
    "2-bit": Study(
        "2 bits, one scale a channel",
        {"weight": "int2_seq", "granularity": "channel"},
        (*_CONVERSIONS, "all, learned scale"),
        rates=(1.25e-4, 2.5e-4, 5e-4, 1e-3),  # higher ones lose, the more the higher
    ),
    "1-bit": Study(
        "1 bit, one scale a channel",
        {"weight": "binary", "granularity": "channel"},
        ("plain", "GPTQ start", "all but TWN's scale", "all, learned scale"),
    ),
    "4-bit": Study(
        "4 bits, one scale a channel", {"weight": "int4", "granularity": "channel"}, _CONVERSIONS, rates=(1e-4, 3e-4, 1e-3)
    ),
    "scratch": Study(
        "from random weights, 1.58 bits against full precision",
        _TERNARY,
        _TEXT_ONLY,
        tokens=10_000_000,
        seeds=1,
        scratch=True,
        rates=(1e-3, 2e-3, 4e-3, 8e-3),
    ),
    "large": Study(
        "1.58 bits, a model that is less full", _TERNARY, ("plain",), tokens=2_000_000, seeds=1, model=LARGE, rates=(1e-3,)
    ),
    "ablation": Study(
        "what each part does, 1.58 bits, one learning rate",
        _TERNARY,
        # those with other batches want other rates
        tuple(name for name, arm in ARMS.items() if arm.quantization is not None and not arm.arguments.keys() & _BATCHES),
        tokens=500_000,
        seeds=3,
        rates=(2e-3,),
    ),
}


@dataclass(frozen=True)
class Run:
    """One training."""

    study: str
    arm: str
    rate: float
    seed: int

    def is_row(self, row: Mapping[str, Any]) -> bool:
        return all(row[key] == value for key, value in vars(self).items())


def missing(name: str, rows: list[dict[str, Any]], arms: list[str] | None = None) -> list[Run]:
    """The runs of a study that have no row yet. Those of further seeds appear once an arm's rates have all been tried."""
    study, found = STUDIES[name], []
    for arm in arms or study.arms:
        grid = [Run(name, arm, rate, 0) for rate in rates_of(study, arm)]
        open_ones = [run for run in grid if not any(run.is_row(row) for row in rows)]
        if not open_ones:
            rates = dict.fromkeys(best_rates(name, arm, rows))
            seeds = [Run(name, arm, rate, seed) for rate in rates for seed in range(1, study.seeds)]
            open_ones = [run for run in seeds if not any(run.is_row(row) for row in rows)]
        found += open_ones
    return found


def rates_of(study: Study, arm: str) -> tuple[float, ...]:
    return study.rates or ARMS[arm].rates


def best_rates(name: str, arm: str, rows: list[dict[str, Any]]) -> tuple[float, float]:
    """For each half of the text that is reported, the rate that does best on the other half, seed 0."""
    tried = [row for row in rows if row["study"] == name and row["arm"] == arm and row["seed"] == 0]
    first, second = (min(tried, key=lambda row: row["ratios"][half])["rate"] for half in range(2))
    return second, first

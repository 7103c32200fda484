"""Tables of what has been run. Own."""

from __future__ import annotations

from math import sqrt
from statistics import mean, stdev
from typing import Any

from benchmarks.study.arms import ARMS
from benchmarks.study.plan import STUDIES, best_rates, missing


def table_of(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each arm that has been tried, the best first.

    "rate" is the chosen one: of both halves of the text, or of the first and of the second. "ratio" is the mean over seeds, at
    that rate, of perplexity over full precision; "spread" its standard deviation; "tried" how many rates were; "difference" the
    mean paired difference to the first arm, with its standard error. "-" where there are too few seeds.
    """
    study, lines = STUDIES[name], []
    chosen = {arm: _chosen(name, arm, rows) for arm in study.arms}
    first = chosen[study.arms[0]]
    for arm, runs in chosen.items():
        if not runs:
            continue
        ratios = list(runs.values())
        pairs = [ratio - first[seed] for seed, ratio in runs.items() if seed in first]
        rates = " and ".join(f"{rate:g}" for rate in dict.fromkeys(best_rates(name, arm, rows)))
        lines.append(
            {
                "arm": arm,
                "rate": rates + ("" if not _open_rates(name, arm, rows) else " (not all tried)"),
                "tried": len({row["rate"] for row in rows if row["study"] == name and row["arm"] == arm}),
                "seeds": len(ratios),
                "ratio": mean(ratios),
                "spread": _spread(ratios),
                "difference": f"{mean(pairs):+.4f} +- {_error(pairs)}" if pairs and arm != study.arms[0] else "-",
                "source": ARMS[arm].source,
            }
        )
    return sorted(lines, key=lambda line: line["ratio"])


def _chosen(name: str, arm: str, rows: list[dict[str, Any]]) -> dict[int, float]:
    """Ratio of the whole text by seed: each half at the rate that the other half has chosen."""
    tried = [row for row in rows if row["study"] == name and row["arm"] == arm]
    if not any(row["seed"] == 0 for row in tried):
        return {}
    # halves are as good as equally long: the ratio of the whole is their geometric mean
    first, second = (
        {row["seed"]: row["ratios"][half] for row in tried if row["rate"] == rate}
        for half, rate in enumerate(best_rates(name, arm, rows))
    )
    return {seed: sqrt(first[seed] * second[seed]) for seed in first if seed in second}


def _open_rates(name: str, arm: str, rows: list[dict[str, Any]]) -> bool:
    return any(run.seed == 0 for run in missing(name, rows, [arm]))


def _spread(values: list[float]) -> str:
    return f"{stdev(values):.4f}" if len(values) > 1 else "-"


def _error(values: list[float]) -> str:
    return f"{stdev(values) / len(values) ** 0.5:.4f}" if len(values) > 1 else "?"

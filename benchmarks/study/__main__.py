"""Command line of the study; see the package."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from benchmarks import study
from benchmarks.common import RESULTS, table, write_results
from benchmarks.study.arms import ARMS
from benchmarks.study.plan import STUDIES, missing
from benchmarks.study.run import execute
from benchmarks.study.tables import table_of


def read_rows() -> list[dict[str, Any]]:
    path = RESULTS / "study.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def add_row(row: dict[str, Any]) -> None:
    """Puts the row into study.json, which may have grown meanwhile."""
    key = ("study", "arm", "rate", "seed")
    rows = [old for old in read_rows() if any(old[name] != row[name] for name in key)]
    write_results("study", {"rows": sorted([*rows, row], key=lambda each: [str(each[name]) for name in key])})


def run_missing(names: list[str], arms: list[str] | None, minutes: float) -> None:
    """Runs what is missing, in the order of the studies, until no run that is as long as the longest so far would fit."""
    end, longest = time.monotonic() + 60 * minutes, 0.0
    while time.monotonic() + longest < end:
        waiting = [run for name in names for run in missing(name, read_rows(), arms)]
        if not waiting:
            return
        start = time.monotonic()
        row = execute(waiting[0])
        longest = max(longest, time.monotonic() - start)
        print(table([row]), flush=True)
        add_row(row)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=study.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", help=f"{', '.join(STUDIES)}; default: all, in this order")
    parser.add_argument("--arms", nargs="+", help="only these")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--list", action="store_true", help="what is missing; runs nothing")
    parser.add_argument("--table", action="store_true", help="the tables; runs nothing")
    args = parser.parse_args(argv)
    names = args.studies or list(STUDIES)
    unknown = [name for name in names if name not in STUDIES] + [arm for arm in args.arms or () if arm not in ARMS]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; studies: {', '.join(STUDIES)}; arms: {', '.join(ARMS)}")
    if args.list:
        for name in names:
            found = missing(name, read_rows(), args.arms)
            print(f"{name}: {STUDIES[name].purpose}; {STUDIES[name].tokens:,} tokens a run; missing now: {len(found)}")
            print("\n".join(f"    {run.arm}, rate {run.rate:g}, seed {run.seed}" for run in found))
        return
    if not args.table:
        run_missing(names, args.arms, args.minutes)
    for name in names:
        lines = table_of(name, read_rows())
        print(f"\n{name}: {STUDIES[name].purpose}, {STUDIES[name].tokens:,} tokens\n{table(lines) if lines else 'no run yet'}")


if __name__ == "__main__":
    main()

"""All GPU benchmarks in one command of less than ten minutes: parity first, then what may be timed after it.

parity    every serving kernel against its definition on the CPU, and the losses of 200 steps (`gpu_parity.py`)
step      a QAT training step: time, memory, host syncs, graph breaks (`gpu_step.py`)
packed    products with packed weights, one row to thousands (`gpu_packed.py`)
experts   the experts of a mixture (`gpu_experts.py`)
kernels   integer products, products of backward, quantization (`gpu_kernels.py`)
generate  decoding of a 1B model, where time is left (`gpu_generate.py`)

Each section runs in a process of its own, so that a kernel that breaks the GPU's context ends one section and no more. What
rests on an operation with a wrong result is not timed. Results are written after each section; exit code 1 if parity failed.

    python -m benchmarks.gpu                                 # everything
    python -m benchmarks.gpu --only step kernels             # these, and parity before them
    python -m benchmarks.gpu --only step --skip-parity       # to work on a kernel; writes no results
    python -m benchmarks.gpu --smoke                         # tiny sizes, also on a CPU, to see that it runs; writes no results
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, ROOT, machine, table, write_results
from benchmarks.gpu_common import Section, Settings, say
from hf_bitnet import kernels

# name -> share of the time that is left when it begins
SECTIONS = {"parity": 0.3, "step": 0.5, "packed": 0.45, "experts": 0.25, "kernels": 0.6, "generate": 1.0}
# beyond the whole time, before a section's process is ended
_GRACE = 30.0


def run_here(name: str, settings: Settings) -> Section:
    return importlib.import_module(f"benchmarks.gpu_{name}").measure(settings)


def run_in_a_process(name: str, settings: Settings, limit: float) -> Section:
    """`run_here` in a fresh interpreter; a section that ends badly is a row that says so, and has failed where it is parity.

    Args:
        limit: seconds after which it is ended. Longer than `settings.left()`: what was begun by then may finish.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "section.json"
        command = [sys.executable, "-m", "benchmarks.gpu", "--section", name, str(path), "--seconds", str(settings.left())]
        command += ["--refused", *settings.refused] if settings.refused else []
        try:
            code = subprocess.run(command, cwd=ROOT, timeout=limit, check=False).returncode
            wrong = f"the process ended with exit code {code}"
        except subprocess.TimeoutExpired:
            wrong = "ended: far beyond its time"
        if path.is_file():
            return Section(**json.loads(path.read_text()))
    everything = ["losses", *importlib.import_module("benchmarks.gpu_parity").OPERATIONS] if name == "parity" else []
    return Section(tables={name: [{"section": name, "wrong": wrong}]}, failed=everything)


def show(section: Section) -> None:
    for title, rows in section.tables.items():
        say(f"\n{title}\n{table(rows)}")


def run(names: list[str], args: argparse.Namespace) -> int:
    """The sections in turn, tables as they come; 1 if something computed a wrong result."""
    began, whole = time.monotonic(), args.minutes * 60
    bars: list[Any] = []
    results: dict[str, Any] = {"minutes": args.minutes, "sections": {}}
    refused: tuple[str, ...] = ()
    say(f"{machine()}\n\n{kernels.explain('cuda' if torch.cuda.is_available() else 'cpu')}")
    for name in names:
        left = whole - (time.monotonic() - began)
        say(f"\n==> {name}, {left / 60:.1f} minutes left")
        last = name == names[-1]
        settings = Settings(smoke=args.smoke, seconds=left if last else left * SECTIONS[name], refused=refused)
        start = time.monotonic()
        section = run_here(name, settings) if args.smoke else run_in_a_process(name, settings, left + _GRACE)
        show(section)
        bars += section.bars
        refused += tuple(section.failed)
        results["sections"][name] = {"seconds": time.monotonic() - start, **asdict(section)}
        if not args.smoke and not args.skip_parity:
            path = write_results("gpu" if not args.only else f"gpu_{'_'.join(args.only)}", results, args.folder)
            say(f"\nwritten: {path.name}")
    if bars:
        say(f"\nbars\n{table(bars)}")
    say(f"\n{(time.monotonic() - began) / 60:.1f} minutes")
    if refused:
        say(f"WRONG RESULTS: {', '.join(refused)}")
    return 1 if refused else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="these sections, and parity before them")
    parser.add_argument("--minutes", type=float, default=9.5, help="of everything; what would not fit is skipped and says so")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where results are written")
    parser.add_argument("--skip-parity", action="store_true", help="time without the check; nothing is written")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes in this process, nothing written")
    parser.add_argument("--section", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--refused", nargs="+", default=[], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.section:
        name, path = args.section
        section = run_here(name, Settings(seconds=args.seconds, refused=tuple(args.refused)))
        Path(path).write_text(json.dumps(asdict(section)))
        return 0
    if not args.smoke and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --smoke runs tiny sizes on the CPU")
    chosen = args.only or list(SECTIONS)
    names = [name for name in SECTIONS if name in chosen or (name == "parity" and not args.skip_parity)]
    return run([name for name in names if not (args.skip_parity and name == "parity")], args)


if __name__ == "__main__":
    sys.exit(main())

"""Whether the bodies that serve on this device return what `kernels/reference.py` returns on the CPU. Own.

cases   every operation on all of `kernels/cases.py`, then on random shapes while there is time: integers equal, floats by the
        ratio of root mean squares (`kernels/parity.py`). Several processes, because compiling is most of the work; each
        kernel takes its configurations in turn there instead of measuring which is fastest.
losses  200 steps of a small model with the serving bodies, and with the definitions (HF_BITNET_KERNELS=reference, in a process
        of its own). Ternary codes flip at a rounding, so single steps scatter: what is compared is the mean of 20 steps.

    python -m benchmarks.gpu --only parity
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count, zip_longest
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_bitnet as hb
from benchmarks.common import ROOT, table
from benchmarks.gpu_cases import MAKERS, random_case
from benchmarks.gpu_common import Row, Section, Settings, first_line, say, synchronize
from hf_bitnet.kernels import cases, dispatch, parity, reference

OPERATIONS = tuple(cases.CASES)
# 200 and more of random shapes in all
RANDOM_CASES, LARGEST = 24, 1500
_WORKERS, _CONFIGS_TRIED = 14, 12
# what Triton raises for a configuration that this GPU is too small for; its tuner passes over those
_TOO_SMALL = ("OutOfResources", "PTXASError")
# of the section's time, what the losses need
_LOSSES_SECONDS = 60.0
_STEPS, _WINDOW, LOSS_BAR = 200, 20, 1e-3
LOSSES = "losses"


def serving(operation: str, device: torch.device) -> dispatch.Body:
    """The body that the dispatch table gives to layers on this device."""
    function = dispatch._select(operation, device.type)
    return next(body for body in dispatch.bodies(operation) if body.function is function)


# ---- operations ----


@contextmanager
def configurations_in_turn() -> Iterator[Any]:
    """Inside, Triton's tuner takes a configuration without measuring, another one for each shape; yields what forgets them.

    Measuring takes a second a shape, and only what is fastest here would be checked. These are internals of Triton: where
    they have other names, shapes are measured as usual.
    """
    try:
        from triton.runtime.autotuner import Autotuner  # pyright: ignore[reportMissingImports]
    except ImportError:
        yield lambda: None
        return
    names = ("prune_configs", "_bench")
    theirs: dict[str, Any] = {name: getattr(Autotuner, name, None) for name in names}
    if None in theirs.values():
        yield lambda: None
        return
    turns, seen = count(), []

    def one(self: Any, given: Any) -> list[Any]:
        found = theirs["prune_configs"](self, given)
        seen.append(self)
        return [found[next(turns) % len(found)]]

    def forget() -> None:
        for tuner in seen:
            tuner.cache.clear()
        seen.clear()

    # older tuners measure a single configuration, too
    ours = {"prune_configs": one, "_bench": lambda self, *args, **given: [1.0, 1.0, 1.0]}
    try:
        for name in names:
            setattr(Autotuner, name, ours[name])
        yield forget
    finally:
        for name in names:
            setattr(Autotuner, name, theirs[name])


def compare(operation: str, args: Any, device: torch.device, forget: Any) -> str | None:
    """What the serving body gets wrong on these arguments; None if nothing."""
    body, expected = serving(operation, device), getattr(reference, operation)(*args)
    for _ in range(_CONFIGS_TRIED):
        try:
            found = body.function(*parity.moved(args, device))
            return parity.difference(parity.moved(found, "cpu"), expected, operation)
        except Exception as error:
            if type(error).__name__ not in _TOO_SMALL:
                return first_line(error)
            forget()
    return f"none of {_CONFIGS_TRIED} configurations fits this GPU"


def is_broken(device: torch.device) -> bool:
    """Whether a kernel left the GPU unusable for this process: whatever came next would be blamed for it."""
    try:
        synchronize(device)
    except RuntimeError:
        return True
    return False


def listed(settings: Settings, operations: list[str], part: int, parts: int) -> list[tuple[str, str, Any, str]]:
    """(operation, case, arguments, kind) of every `parts`-th case, the operations in turn; then of the random shapes.

    In turn, so that where time runs out each has been looked at.
    """
    by_operation = []
    for operation in operations:
        every = list(cases.CASES[operation]())[: 12 if settings.smoke else None]
        by_operation.append([(operation, case, args, "cases") for case, args in every[part::parts]])
    found = [each for turn in zip_longest(*by_operation) for each in turn if each is not None]
    for seed in range(part, 2 if settings.smoke else RANDOM_CASES, parts):
        for operation in [name for name in operations if name in MAKERS]:
            case, args = random_case(operation, seed, 40 if settings.smoke else LARGEST)
            found.append((operation, case, args, "random"))
    return found


def work(settings: Settings, operations: list[str], part: int, parts: int) -> list[dict[str, Any]]:
    """Counts and failures of each operation over its share of the cases and random shapes, while there is time."""
    found = {name: {"operation": name, "cases": 0, "random": 0, "left out": 0, "failures": []} for name in operations}
    todo, broken = listed(settings, operations, part, parts), False
    with configurations_in_turn() as forget:
        for i, (operation, case, args, kind) in enumerate(todo):
            if part == 0 and i % 50 == 0:
                say(f"    about {i / len(todo):.0%}: {operation}, {case}")
            entry: dict[str, Any] = found[operation]
            if broken or settings.left() <= 0:
                entry["left out"] += 1
                continue
            entry[kind] += 1
            if wrong := compare(operation, args, settings.device, forget):
                entry["failures"].append(f"{case}: {wrong}")
                broken = is_broken(settings.device)
    return list(found.values())


def work_in_processes(settings: Settings, operations: list[str]) -> list[dict[str, Any]]:
    """`work`, cut over processes."""
    parts = max(1, min(_WORKERS, (os.cpu_count() or 1) - 1))
    seconds = str(max(1.0, settings.left() - _LOSSES_SECONDS))
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{part}.json" for part in range(parts)]
        running = []
        for part, file in enumerate(files):
            command = [sys.executable, "-m", "benchmarks.gpu_parity", "--part", str(part), str(parts), "--json", str(file)]
            command += ["--seconds", seconds, "--operations", *operations]
            running.append(subprocess.Popen(command, cwd=ROOT))
        for process, file in zip(running, files, strict=True):
            process.wait()
            if file.is_file():
                results += json.loads(file.read_text())
            else:  # a kernel that kills its process is as wrong as can be, and this does not say which
                text = f"a process that checks parity ended with exit code {process.returncode}"
                results += [{"operation": name, "failures": [text]} for name in operations]
    return results


def operations_rows(results: list[dict[str, Any]], device: torch.device) -> list[Row]:
    """One row of the table for each operation, over all processes."""
    rows = []
    for operation in dict.fromkeys(each["operation"] for each in results):
        mine = [each for each in results if each["operation"] == operation]
        failures = [text for each in mine for text in each["failures"]]
        counts = {kind: sum(each.get(kind, 0) for each in mine) for kind in ("cases", "random", "left out")}
        if not counts["cases"] and not failures:
            failures = ["never checked"]
        body = serving(operation, device).name
        rows.append({"operation": operation, "body": body, **counts, "wrong": len(failures), "first": (failures or ["-"])[0]})
    return rows


# ---- losses ----


def losses(steps: int, device: torch.device) -> list[float]:
    """Of a small ternary Llama that learns to count, with the bodies of this process."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_key_value_heads=2, **shape))
    model = hb.quantize_model(model, hb.BitNetQuantizationConfig.bitnet_b158(), progress=False).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    generator, found = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        start, stride = (torch.randint(low, high, (8, 1), generator=generator) for low, high in ((0, 256), (1, 8)))
        tokens = ((start + stride * torch.arange(32)) % 256).to(device)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return torch.stack(found).tolist()


def losses_of_the_definitions(steps: int, smoke: bool) -> list[float]:
    """`losses` in a process that has no other bodies."""
    command = [sys.executable, "-m", "benchmarks.gpu_parity", "--losses", str(steps), *(["--smoke"] if smoke else [])]
    environment = os.environ | {"HF_BITNET_KERNELS": "reference"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(f"the process with the definitions failed: {lines[-1] if lines else done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def compare_losses(found: list[float], expected: list[float]) -> Row:
    """Relative differences of the means over windows of steps, and of single steps."""
    ours, theirs = torch.tensor(found, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64)
    window = min(_WINDOW, len(found))
    means = [each.unfold(0, window, window).mean(dim=1) for each in (ours, theirs)]
    worst = float(((means[0] - means[1]) / means[1]).abs().max())
    single = float(((ours - theirs) / theirs).abs().max())
    row: Row = {"steps": len(found), "first loss": found[0], "last loss": found[-1], "last loss, definition": expected[-1]}
    return row | {"means differ by (1e-3)": worst * 1e3, "steps differ by (1e-3)": single * 1e3}


def measure_losses(settings: Settings, section: Section) -> None:
    steps = 2 if settings.smoke else _STEPS
    say(f"  losses over {steps} steps, serving bodies and definitions")
    try:
        row = compare_losses(losses(steps, settings.device), losses_of_the_definitions(steps, settings.smoke))
    except Exception as error:
        section.tables["parity: losses"] = [{"steps": steps, "wrong": first_line(error)}]
        section.failed.append(LOSSES)
        return
    section.tables["parity: losses"] = [row]
    difference = row["means differ by (1e-3)"] / 1e3
    section.bar("losses: relative difference", difference, LOSS_BAR, at_least=False)
    if not difference <= LOSS_BAR:
        section.failed.append(LOSSES)


# ---- the section ----


def measure(settings: Settings) -> Section:
    section = Section()
    say(f"  {len(OPERATIONS)} operations on {settings.device.type} against the definitions on the CPU")
    operations = list(OPERATIONS)
    results = work(settings, operations, 0, 1) if settings.smoke else work_in_processes(settings, operations)
    rows = operations_rows(results, settings.device)
    section.tables["parity: operations"] = rows
    section.failed += [row["operation"] for row in rows if row["wrong"]]
    measure_losses(settings, section)
    return section


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--smoke", action="store_true", help="few cases of small sizes")
    parser.add_argument("--part", nargs=2, type=int, default=(0, 1), help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--losses", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    settings = Settings(smoke=args.smoke, seconds=args.seconds)
    if args.losses:
        print(json.dumps(losses(args.losses, settings.device)))
        return
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.part[1]))
    results = work(settings, args.operations, *args.part)
    if args.json:
        args.json.write_text(json.dumps(results))
    else:
        print(table(operations_rows(results, settings.device)))


if __name__ == "__main__":
    main()

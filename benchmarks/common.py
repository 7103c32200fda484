"""What every benchmark shares: interleaved timing, the machine's description, tables, JSON. Own.

Timings on shared machines are noisy, so arms are run in turn, round after round, and compared by the ratio of medians.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import hf_bitnet as hb

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
RESULTS = ROOT / "benchmarks" / "results"


def model_and_windows(
    name: str, dtype: torch.dtype = torch.float32, **splits: int | None
) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A model of ../shared/models, and windows of the novels for it, int64 (count, 256).

    Args:
        splits: of the novels, "train" or "valid": how many windows from the start of the text; None takes all.

    Raises SystemExit where ../shared is missing.
    """
    if not SHARED.is_dir():
        raise SystemExit("the models and texts beside the checkout (../shared) are missing: nothing to measure")
    path, novels = SHARED / "models" / name, SHARED / "data" / "novels"
    tokenizer = AutoTokenizer.from_pretrained(path)
    windows = {split: hb.text_windows(tokenizer, novels / f"{split}.txt", max_windows=most) for split, most in splits.items()}
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype), windows


def interleave(arms: dict[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Runs every arm once a round, in turn, after `warmup` rounds that do not count. Seconds per call."""
    for _ in range(warmup):
        for call in arms.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, call in arms.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(seconds: dict[str, list[float]], baseline: str) -> dict[str, dict[str, float]]:
    """Median milliseconds and ratio of medians to the baseline's, per arm."""
    base = median(seconds[baseline])
    return {name: {"median_ms": median(s) * 1e3, "ratio": median(s) / base} for name, s in seconds.items()}


def machine() -> dict[str, Any]:
    """Processor, threads and versions, without anything that names a person or a place."""
    cpu = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    versions = {}
    for package in ("torch", "triton", "transformers", "accelerate", "torchao", "onebitllms"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "processor": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        **gpu(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit(),
    }


def gpu() -> dict[str, Any]:
    """Name, memory and CUDA of the GPU in use; nothing where there is none."""
    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    memory, cache = properties.total_memory / 2**30, getattr(properties, "L2_cache_size", 0) / 2**20
    return {"gpu": properties.name, "gpu_memory_gib": round(memory, 1), "gpu_l2_mib": cache, "cuda": torch.version.cuda}


def commit() -> str:
    """The checkout's commit, with "+" when files differ from it; "unknown" where there is no git or no checkout."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    if not shutil.which("git") or not git("rev-parse", "--git-dir"):
        return "unknown"
    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def table(rows: list[dict[str, Any]]) -> str:
    """Rows with equal keys as an aligned text table."""
    head = list(rows[0])
    cells = [[_cell(row.get(key, "")) for key in head] for row in rows]
    width = [max(len(key), *(len(line[i]) for line in cells)) for i, key in enumerate(head)]
    lines = ["  ".join(key.ljust(w) for key, w in zip(head, width, strict=True))]
    lines += ["  ".join(cell.ljust(w) for cell, w in zip(line, width, strict=True)) for line in cells]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def write_results(name: str, results: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Writes `<folder>/<name>.json` with the machine beside the results; a temporary file is renamed at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False) as file:
        json.dump({"machine": machine(), **results}, file, indent=1)
        file.write("\n")
    os.replace(file.name, path)
    return path

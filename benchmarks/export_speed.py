"""Time and memory of exporting a packed model of the shape of a 1B Llama: each format in a process of its own.

    python -m benchmarks.export_speed --folder generate-1b
    python -m benchmarks.export_speed --folder generate-tiny --smoke    # a tiny shape, to see that it runs; writes no results

The checkpoint is that of `generate.py`: random ternary linear maps, int8 output head, bfloat16 embeddings. MB/s are of the
bfloat16 weights that the tensors stand for, over the whole call of `export_model`: opening, writing, reading back the codes.
Memory is the highest resident size of the process, which counts the mapped pages of the file that is read.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import ROOT, table, write_results
from benchmarks.generate import SHAPE, SMOKE, build, resident_mb

# "bitnet" holds no int8 output head
FORMATS = ("hf_bitnet", "gguf", "i2_s", "mlx", "dense", "onnx")


def work(folder: Path, out: Path, format: str, verify: str | bool, options: dict[str, Any]) -> dict[str, Any]:
    """One export in this process."""
    import transformers  # noqa: F401

    import hf_bitnet as hb
    from hf_bitnet.publish import exporting  # noqa: F401  imports are not charged to the export

    before = resident_mb()
    start = time.perf_counter()
    report = hb.export_model(folder, out, format=format, verify=verify, progress=False, **options)
    seconds = time.perf_counter() - start
    weights = sum(_numbers(each.shape) for each in report.tensors)
    return {
        "seconds": seconds,
        "mb_per_s": 2 * weights / 1e6 / seconds,
        "written_mb": report.bytes / 1e6,
        "resident_before_mb": before,
        "peak_mb": resident_mb("VmHWM"),
    }


def _numbers(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def measure(folder: Path, format: str, verify: str | bool, options: dict[str, Any]) -> dict[str, Any]:
    """`work` in a fresh process."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        job = json.dumps([str(folder), f"{place}/out", format, verify, options])
        command = [sys.executable, "-m", "benchmarks.export_speed", "--work", job]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{format}: {done.stderr[-2000:]}")
        return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="of the checkpoint; it is made where it is missing")
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.work is not None:
        folder, out, format, verify, options = json.loads(args.work)
        print(json.dumps(work(Path(folder), Path(out), format, verify, options)))
        return
    if args.folder is None:
        parser.error("--folder is missing, for example --folder generate-1b")
    build(args.folder, SMOKE if args.smoke else SHAPE)
    file = sum(path.stat().st_size for path in args.folder.glob("*.safetensors")) / 2**20
    found: dict[tuple[str, Any], list[dict[str, Any]]] = {}
    for _ in range(1 if args.smoke else args.rounds):
        for format in args.formats:
            for verify in (False, "codes"):
                found.setdefault((format, verify), []).append(measure(args.folder, format, verify, {}))
    rows = []
    for (format, verify), runs in found.items():
        figures = {name: median(run[name] for run in runs) for name in runs[0]}
        beyond = {"peak_minus_file_mb": figures["peak_mb"] - file}
        rows.append({"format": format, "read back": verify or "no", **figures, **beyond})
    print(table(rows))
    if not args.smoke:
        write_results("export_speed", {"file_mb": file, "rows": rows})


if __name__ == "__main__":
    main()

"""Perplexity over full precision of weights fitted without training: plain rounding, least squares, GPTQ.

python -m benchmarks.starts                                    # both models of ../shared/models; hours on two busy cores
python -m benchmarks.starts --models novels-llama --weights ternary --granularities tensor channel

Calibration: windows of novels/train.txt; measured on novels/valid.txt. Rows of an earlier run for other settings are kept.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from typing import Any

import torch
from torch import nn

import hf_bitnet as hb
from benchmarks.common import RESULTS, model_and_windows, table, write_results

WEIGHTS = ("binary", "ternary", "int2_seq", "int4")
GROUP = 64


def fitted_rows(model: nn.Module, tokens: torch.Tensor, text: torch.Tensor, fields: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a way to start: the config's own rule, least squares without and with text, GPTQ."""
    full = hb.perplexity(model, tokens, progress=False)
    batches = [{"input_ids": part} for part in text.split(8)]
    rows = []
    for start in ("rounded", "least_squares", "least_squares, weighted", "gptq"):
        quantized = hb.quantize_model(copy.deepcopy(model), hb.BitNetQuantizationConfig(**fields))
        began = time.process_time()
        if start != "rounded":
            hb.fit_weights(
                quantized, None if start == "least_squares" else batches, method=start.partition(",")[0], progress=False
            )
        seconds = time.process_time() - began
        ratio = hb.perplexity(quantized, tokens, progress=False) / full
        rows.append({**fields, "start": start, "ratio": ratio, "CPU seconds": round(seconds, 1)})
        print("  ".join(str(value) for value in rows[-1].values()), flush=True)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["novels-llama-small", "novels-llama"])
    parser.add_argument("--weights", nargs="+", default=list(WEIGHTS))
    parser.add_argument("--granularities", nargs="+", default=["tensor", "channel", "group"])
    parser.add_argument("--windows", type=int, default=64, help="to measure on")
    parser.add_argument("--calibration-windows", type=int, default=64)
    parser.add_argument("--smoke", action="store_true", help="a few windows of the small model, nothing written")
    args = parser.parse_args(argv)
    if args.smoke:
        args.models, args.weights, args.granularities = ["novels-llama-small"], ["ternary"], ["channel"]
        args.windows = args.calibration_windows = 2
    rows: list[dict[str, Any]] = []
    for name in args.models:
        model, windows = model_and_windows(name, valid=args.windows, train=args.calibration_windows)
        for weight in args.weights:
            for granularity in args.granularities:
                fields = {"weight": weight, "granularity": granularity, "group_size": GROUP if granularity == "group" else None}
                rows += [{"model": name, **row} for row in fitted_rows(model, windows["valid"], windows["train"], fields)]
                if not args.smoke:
                    _write(rows, args)
    print(table(rows))


def _write(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """All rows so far, and those of earlier runs that these do not replace."""
    file = RESULTS / "starts.json"
    earlier = json.loads(file.read_text())["rows"] if file.exists() else []

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("model", "weight", "granularity", "start"))

    new = {key(row) for row in rows}
    kept = [row for row in earlier if key(row) not in new]
    settings = {"windows": args.windows, "calibration_windows": args.calibration_windows}
    write_results("starts", {**settings, "rows": [*kept, *rows]})


if __name__ == "__main__":
    main()

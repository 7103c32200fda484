"""Perplexity over full precision of every scheme, scale rule and granularity, without any training.

python -m benchmarks.ptq_table                       # both models of ../shared/models, novels/valid.txt
python -m benchmarks.ptq_table --windows 64 --models novels-llama-small
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import hf_bitnet as hb
from benchmarks.common import model_and_windows, table, write_results
from hf_bitnet.quantizers import SCALE_RULES, WEIGHT_SCHEMES, make_weight_quantizer


def configurations() -> list[dict[str, Any]]:
    """Every legal scheme x scale rule x granularity; "learned" starts where another rule ends, so it is left out."""
    found = []
    for scheme in WEIGHT_SCHEMES:
        for rule in SCALE_RULES:
            for granularity, group in (("tensor", None), ("channel", None), ("group", 64)):
                fields = {"weight": scheme, "weight_scale": rule, "granularity": granularity, "group_size": group}
                try:
                    make_weight_quantizer(scheme, rule, granularity, group)
                except ValueError:
                    continue
                if rule != "learned":
                    found.append(fields)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["novels-llama", "novels-llama-small"])
    parser.add_argument("--windows", type=int, default=256)
    parser.add_argument("--smoke", action="store_true", help="a few windows of the small model, nothing written")
    args = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for name in ["novels-llama-small"] if args.smoke else args.models:
        model, windows = model_and_windows(name, valid=4 if args.smoke else args.windows)
        tokens = windows["valid"]
        full = hb.perplexity(model, tokens, progress=False)
        print(f"{name}: full precision {full:.2f}", flush=True)
        for fields in configurations():
            quantized = hb.quantize_model(copy.deepcopy(model), hb.BitNetQuantizationConfig(**fields))
            bits = hb.coverage(quantized).bits_per_weight
            ratio = hb.perplexity(quantized, tokens, progress=False) / full
            row = {"model": name, **fields, "group_size": fields["group_size"] or "-", "ratio": ratio, "file bits": bits}
            rows.append(row)
            print("  ".join(str(value) for value in row.values()), flush=True)
    print(table(rows))
    if not args.smoke:
        print(write_results("ptq_table", {"windows": args.windows, "rows": rows}))


if __name__ == "__main__":
    main()

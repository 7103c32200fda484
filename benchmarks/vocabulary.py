"""What packed token embeddings and output heads cost and save: perplexity, size of the file, memory of the weights.

python -m benchmarks.vocabulary                       # both models of ../shared/models (tied), novels/valid.txt, no training
python -m benchmarks.vocabulary --windows 64 --models novels-llama-small

Each model is saved packed and loaded again before it is measured. "linears": what the layers between are.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import hf_bitnet as hb
from benchmarks.common import model_and_windows, table, write_results

LINEARS: dict[str, dict[str, Any]] = {
    "full precision": {"keep": [r"\.layers\."]},
    "ternary": {"weight": "ternary", "weight_scale": "least_squares", "granularity": "channel"},
}
EMBEDDINGS: dict[str, Any] = {
    "full precision": None,
    "int8": "int8",
    "int4": "int4",
    "int4, groups of 32": {"weight": "int4", "group_size": 32},
    "int2_seq, groups of 32": {"weight": "int2_seq", "group_size": 32},
}


def measured(model: Any, fields: dict[str, Any], tokens: torch.Tensor) -> dict[str, Any]:
    """Perplexity of the packed and reloaded model, megabytes of its file and of its weights in memory."""
    quantized = hb.quantize_model(copy.deepcopy(model), hb.BitNetQuantizationConfig(**fields, form="packed"))
    with tempfile.TemporaryDirectory() as folder:
        quantized.save_pretrained(folder)
        file = sum(each.stat().st_size for each in Path(folder).glob("*.safetensors"))
        reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype)
        return {
            "perplexity": hb.perplexity(reloaded, tokens, progress=False),
            "file MB": file / 1e6,
            "weights MB": _held(reloaded),
        }


def _held(model: torch.nn.Module) -> float:
    """Megabytes of all parameters, tied ones once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) / 1e6


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["novels-llama", "novels-llama-small"])
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--smoke", action="store_true", help="a few windows of the small model, nothing written")
    args = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for name in ["novels-llama-small"] if args.smoke else args.models:
        model, windows = model_and_windows(name, torch.bfloat16, valid=2 if args.smoke else args.windows)
        tokens = windows["valid"]
        for linears, fields in LINEARS.items():
            base = None
            for embeddings, value in EMBEDDINGS.items():
                if value is None and "keep" in fields:  # nothing would be quantized
                    found = {"perplexity": hb.perplexity(model, tokens, progress=False), "file MB": _held(model)}
                    found["weights MB"] = found["file MB"]
                else:
                    found = measured(model, {**fields, "embeddings": value}, tokens)
                base = base or found["perplexity"]
                rows.append({"model": name, "linears": linears, "embeddings": embeddings, **found})
                rows[-1]["ratio"] = found["perplexity"] / base
                print("  ".join(str(value) for value in rows[-1].values()), flush=True)
    print(table(rows))
    if not args.smoke:
        print(write_results("vocabulary", {"windows": args.windows, "rows": rows}))


if __name__ == "__main__":
    main()

"""Perplexity over full precision after QAT with QATTrainer, on the real models and text.

    python -m benchmarks.quality --model novels-llama-small --tokens 1500000
    python -m benchmarks.quality --model novels-llama --tokens 2000000
    python -m benchmarks.quality --model novels-llama-small --tokens 1500000 --alpha 0     # without distillation

Every run adds (or replaces) its row in benchmarks/results/quality.json. Perplexity is over the whole of novels/valid.txt,
the same windows of 256 tokens for both, computed in float32 on the packed and reloaded model.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

import hf_bitnet as hb
from benchmarks.common import RESULTS, machine, model_and_windows, table, write_results

PRESETS = {
    "bitnet_b158": hb.BitNetQuantizationConfig.bitnet_b158,
    "w1a8": hb.BitNetQuantizationConfig.w1a8,
    "w2a8": hb.BitNetQuantizationConfig.w2a8,
    "w4a8": hb.BitNetQuantizationConfig.w4a8,
    "w8a8": hb.BitNetQuantizationConfig.w8a8,
}


def run(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    model, windows = model_and_windows(args.model, valid=args.valid_windows or None, train=None)
    valid = windows["valid"]
    full = hb.perplexity(model, valid)
    config = PRESETS[args.preset]()
    for field in args.set:
        name, value = field.split("=")
        setattr(config, name, value)
    hb.quantize_model(model, hb.BitNetQuantizationConfig(**config.fields()))
    before = hb.perplexity(model, valid)
    steps = args.tokens // (args.batch * 256)
    arguments = hb.QATArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=args.batch,
        learning_rate=args.lr,
        weight_decay=args.weight_decay,
        adam_beta2=0.95,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, math.ceil(args.warmup * steps)),
        max_grad_norm=1.0,
        bf16=args.bf16,
        distillation={"alpha": args.alpha},
        quantization_schedule=args.schedule,
        logging_steps=25,
        save_strategy="no",
        seed=args.seed,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
    )
    teacher = "self" if args.alpha > 0 else None
    trainer = hb.QATTrainer(model=model, args=arguments, train_dataset=hb.TokenWindows(windows["train"]), teacher=teacher)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    trained = hb.perplexity(model, valid)
    hb.pack_model(model).save_pretrained(f"{folder}/packed")
    reloaded: nn.Module = AutoModelForCausalLM.from_pretrained(f"{folder}/packed")
    after = hb.perplexity(reloaded, valid)
    return {
        "model": args.model,
        "preset": args.preset,
        "changes": " ".join(args.set) or "-",
        "tokens": steps * args.batch * 256,
        "batch": args.batch,
        "lr": args.lr,
        "alpha": args.alpha,
        "schedule": args.schedule,
        "seed": args.seed,
        "dtype": "bfloat16 autocast" if args.bf16 else "float32",
        "full": full,
        "before ratio": before / full,
        "train form ratio": trained / full,
        "ratio": after / full,
        "seconds": seconds,
    }


_KEYS = ("model", "preset", "changes", "tokens", "batch", "lr", "alpha", "schedule", "seed", "dtype")


def add_row(row: dict[str, Any]) -> None:
    """Puts the row into quality.json; every row carries the machine and commit it was measured at."""
    path = RESULTS / "quality.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [old for old in rows if any(old[key] != row[key] for key in _KEYS)]
    rows.append({**row, "commit": machine()["commit"]})
    write_results("quality", {"rows": sorted(rows, key=lambda r: (r["model"], r["preset"], r["ratio"]))})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="novels-llama-small")
    parser.add_argument("--preset", choices=PRESETS, default="bitnet_b158")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="e.g. weight_scale=threshold")
    parser.add_argument("--tokens", type=int, default=1_500_000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--warmup", type=float, default=0.05, help="fraction of the steps")
    parser.add_argument("--alpha", type=float, default=1.0, help="1 is KL to the full-precision self only, 0 cross entropy")
    parser.add_argument("--schedule", default="none", help="ramp's name, JSON or file; see QuantizationSchedule")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--valid-windows", type=int, default=0, help="0 takes all")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--try", dest="trial", action="store_true", help="print the row, do not write it")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        row = run(args, folder)
    print(table([row]))
    if not args.trial:
        add_row(row)


if __name__ == "__main__":
    main()

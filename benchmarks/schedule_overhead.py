"""Time of a quantization schedule over the time of the training step that it steers, on the CPU.

The callback runs once before each step: it is timed inside real runs, with all layers moving together, with each layer by
itself (the most work: strengths of all layers, several of them moving), and in stages. Target: under 0.1 %.

    python -m benchmarks.schedule_overhead             # ../shared/models/novels-llama-small, 16 x 256 tokens
    python -m benchmarks.schedule_overhead --smoke     # a tiny random model, to see that it runs
"""

from __future__ import annotations

import argparse
import tempfile
import time
from statistics import median
from typing import Any

import torch
from transformers import LlamaForCausalLM, TrainerCallback

import hf_bitnet as hb
from benchmarks.common import SHARED, table, write_results
from benchmarks.train_step import base_model

SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {"ramp": "linear", "end": 0.9},
    "layers": {"ramp": "cosine", "end": 0.9, "layers": "forward"},
    "stages": {"ramp": "none", "stages": {"int8": 0.3, "int4": 0.6, "int2_seq": 0.9}},
}


class Clock(TrainerCallback):
    """Seconds of each step, from its beginning to its end."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps.append(time.perf_counter() - self._start)


def measure(model: LlamaForCausalLM, schedule: dict[str, Any], steps: int, batch: int, length: int) -> dict[str, float]:
    """Milliseconds of a step and of the callback before it, and their ratio in per cent (medians).

    The largest callback is that of a change of stage, once for each stage in a run: it packs the codes of the new grid, which
    flips are counted from. The first two steps do not count.
    """
    clock, calls = Clock(), []
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 4096, (batch * 4, length))]
    with tempfile.TemporaryDirectory() as folder:
        args = hb.QATArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch,
            quantization_schedule=schedule,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        trainer = hb.QATTrainer(model=model, args=args, train_dataset=data, callbacks=[clock])  # type: ignore[arg-type]
        original = trainer._strength.on_step_begin

        def timed(*given: Any, **named: Any) -> None:
            start = time.perf_counter()
            original(*given, **named)
            calls.append(time.perf_counter() - start)

        trainer._strength.on_step_begin = timed
        trainer.train()
    whole, own = clock.steps[2:], calls[-steps:][2:]
    found = {"step_ms": median(whole), "schedule_ms": median(own), "largest_schedule_ms": max(own)}
    return {name: seconds * 1e3 for name, seconds in found.items()} | {"percent": 100 * median(own) / median(whole)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--smoke", action="store_true", help="a tiny random model; nothing is written")
    args = parser.parse_args(argv)
    path = SHARED / "models" / "novels-llama-small"
    if not args.smoke and not path.is_dir():
        raise SystemExit("the models beside the checkout (../shared) are missing: nothing to measure")
    rows = []
    for name, schedule in SCHEDULES.items():
        model = base_model(True) if args.smoke else LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
        hb.quantize_model(model, hb.BitNetQuantizationConfig.bitnet_b158())
        sizes = (8, 2, 16) if args.smoke else (args.steps, args.batch, 256)
        rows.append({"schedule": name, **measure(model, schedule, *sizes)})
    print(table([{key: f"{value:.4f}" if isinstance(value, float) else value for key, value in row.items()} for row in rows]))
    if not args.smoke:
        write_results("schedule_overhead", {"model": "novels-llama-small", "tokens": args.batch * 256, "rows": rows})


if __name__ == "__main__":
    main()

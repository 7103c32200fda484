"""What watching the quantization costs: one measurement of QuantMonitor beside training steps, in turn in one run.

A round is one training step (forward, backward, AdamW; float32, the model and sizes of train_step) and one measurement of
every layer (flip rate, zeros, SQNR, cosine, latents that moved) with its copy to the host. "overhead" is the median
measurement over `--every` median steps.

    python -m benchmarks.monitor_overhead
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import interleave, ratios, table, write_results
from benchmarks.train_step import base_model, hf_bitnet_arm, make_step
from hf_bitnet.training.monitor import QuantMonitor


def measure(smoke: bool, rounds: int, every: int, batch: int, length: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model: Any = hf_bitnet_arm(base_model(smoke))
    vocabulary = model.config.vocab_size
    monitor = QuantMonitor(True)
    monitor.start(model)

    def look() -> None:
        figures = monitor.measure(model)
        assert figures is not None
        figures.tolist()

    step = make_step(model, torch.randint(0, int(vocabulary), (batch, length)), False, False)
    arms: dict[str, Callable[[], object]] = {"step": step, "measurement": look}
    found = ratios(interleave(arms, rounds), "step")
    overhead = found["measurement"]["ratio"] / every
    return {
        "batch": batch,
        "length": length,
        "every": every,
        "overhead": overhead,
        **{k: v["median_ms"] for k, v in found.items()},
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--every", type=int, default=10, help="logging_steps")
    parser.add_argument("--smoke", action="store_true", help="a tiny random model, nothing written")
    args = parser.parse_args(argv)
    batch, length = (2, 16) if args.smoke else (8, 256)
    row = measure(args.smoke, 2 if args.smoke else args.rounds, args.every, batch, length)
    print(table([row]))
    if not args.smoke:
        print(write_results("monitor_overhead", {"rows": [row]}))


if __name__ == "__main__":
    main()

"""Memory of a training step: full precision, hf_bitnet, hf_bitnet with `lean=True`; each arm in a process of its own.

"peak MB" is by how much the process grows (VmHWM over the resident size with everything imported and, for the lean arm,
torchao's kernels compiled) while Trainer makes some steps of fixed batch and sequence. Two batch sizes give "bytes a token",
the slope between them, and "bytes a parameter", what is left at no tokens. "counted" are the bytes of weights, gradients and
optimizer state themselves, over the number of parameters.

    python -m benchmarks.train_memory
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import hf_bitnet as hb
from benchmarks.common import ROOT, table, write_results

ARMS = ("full precision, float32 AdamW", "hf_bitnet", "hf_bitnet, lean")
LEAN = ARMS[2]


def make_model(size: dict[str, int]) -> LlamaForCausalLM:
    """A random float32 Llama."""
    heads: dict[str, Any] = {"num_attention_heads": size["hidden"] // 64, "num_key_value_heads": size["hidden"] // 64}
    config = LlamaConfig(
        vocab_size=size["vocabulary"],
        hidden_size=size["hidden"],
        intermediate_size=size["ffn"],
        num_hidden_layers=size["layers"],
        tie_word_embeddings=True,
        use_cache=False,
        **heads,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def make_trainer(arm: str, model: LlamaForCausalLM, tokens: torch.Tensor, steps: int, folder: str) -> Trainer:
    fields: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": steps,
        "per_device_train_batch_size": tokens.shape[0],
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "learning_rate": 1e-4,
        "optim": "adamw_torch",
    }
    data: Any = [{"input_ids": row, "labels": row} for row in tokens] * steps
    if arm == ARMS[0]:
        return Trainer(model=model, args=TrainingArguments(**fields), train_dataset=data)
    if arm == LEAN:
        fields |= {"lean": True, "optim": "adamw_torch_8bit"}
    hb.quantize_model(model, hb.BitNetQuantizationConfig.bitnet_b158())
    args = hb.QATArguments(**fields, quant_logging=False)
    return hb.QATTrainer(model=model, args=args, train_dataset=data)


class Counter(TrainerCallback):
    """Bytes of weights, gradients and optimizer state just before a step."""

    bytes = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parameters = list(kwargs["model"].parameters())
        tensors = [*parameters, *(p.grad for p in parameters if p.grad is not None)]
        tensors += [each for values in kwargs["optimizer"].state.values() for each in values.values() if torch.is_tensor(each)]
        self.bytes = sum(inner.numel() * inner.element_size() for tensor in tensors for inner in _inner(tensor))


def _inner(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors inside a tensor subclass."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return [inner for name in names for inner in _inner(getattr(tensor, name))]


def resident(peak: bool = False) -> int:
    """Bytes of this process in memory, now or at most since `forget_peak`."""
    key = "VmHWM:" if peak else "VmRSS:"
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(arm: str, size: dict[str, int], batch: int, length: int, steps: int) -> dict[str, Any]:
    """One arm, in this process."""
    tokens = torch.randint(0, size["vocabulary"], (batch, length), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        # what every process pays once, whatever it trains: imports, threads, and the kernels that torchao compiles
        warm = size if arm == LEAN else {**size, "hidden": 64, "ffn": 64, "layers": 1}
        make_trainer(arm, make_model(warm), tokens[:1, :16], 1, folder).train()
        gc.collect()
        before = resident()
        forget_peak()
        model = make_model(size)
        parameters = sum(p.numel() for p in model.parameters())
        trainer = make_trainer(arm, model, tokens, steps, folder)
        counter = Counter()
        trainer.add_callback(counter)
        del model
        trainer.train()
    return {"parameters": parameters, "peak": resident(peak=True) - before, "before": before, "counted": counter.bytes}


def in_own_process(arm: str, size: dict[str, int], batch: int, length: int, steps: int) -> dict[str, Any]:
    request = json.dumps({"arm": arm, "size": size, "batch": batch, "length": length, "steps": steps})
    # freed memory goes back to the system at once, so that it is not counted for the next arm of a step
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-m", "benchmarks.train_memory", "--one", request]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def rows_of(size: dict[str, int], batches: tuple[int, int], length: int, steps: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    base = 0
    for arm in ARMS:
        small, large = (in_own_process(arm, size, batch, length, steps) for batch in batches)
        if "error" in small or "error" in large:
            rows.append({"arm": arm, "peak MB": f"fails: {small.get('error') or large.get('error')}"})
            continue
        base = base or large["peak"]
        a_token = (large["peak"] - small["peak"]) / ((batches[1] - batches[0]) * length)
        rows.append(
            {
                "arm": arm,
                "peak MB": large["peak"] / 1e6,
                "ratio": large["peak"] / base,
                "bytes a parameter": (large["peak"] - a_token * batches[1] * length) / large["parameters"],
                "counted": large["counted"] / large["parameters"],
                "bytes a token": a_token,
            }
        )
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--ffn", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--batches", type=int, nargs=2, default=(2, 4), help="the second is the one that is compared")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--one", help="one arm, as JSON; how the benchmark calls itself")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, nothing written")
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(measure(**json.loads(args.one))))
        return
    if args.smoke:
        args.hidden, args.ffn, args.layers, args.vocabulary, args.length, args.batches = 64, 96, 2, 128, 16, (1, 2)
    size = {"hidden": args.hidden, "ffn": args.ffn, "layers": args.layers, "vocabulary": args.vocabulary}
    rows = rows_of(size, (args.batches[0], args.batches[1]), args.length, args.steps)
    print(table([{**dict.fromkeys(rows[0], ""), **row} for row in rows]))
    if not args.smoke:
        shape = {**size, "batches": args.batches, "length": args.length}
        print(write_results("train_memory", {"shape": shape, "rows": rows}))


if __name__ == "__main__":
    main()

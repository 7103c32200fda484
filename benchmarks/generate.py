"""Generation with transformers on the CPU: load time, resident memory, prefill, decoding, and where a token's time goes.

The model has the shape of a 1B Llama with random weights: ternary linear maps, int8 output head, bfloat16 embeddings. It is
written once to --folder, tensor by tensor. Every arm runs in a process of its own, in turn, round after round; figures are
medians over the rounds. Peers: llama.cpp on the same shape (TQ2_0, embeddings and head Q8_0), from a folder that holds its
llama-bench; the file is written beside ours, with the package gguf.

    python -m benchmarks.generate --folder generate-1b
    python -m benchmarks.generate --folder generate-1b --llama-cpp llama.cpp/build/bin --rounds 5
    python -m benchmarks.generate --folder generate-tiny --smoke    # a tiny shape, to see that it runs; writes no results
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import hf_bitnet as hb
from benchmarks.common import ROOT, table, write_results
from benchmarks.llama_cpp import build_gguf, run_llama_bench
from hf_bitnet.export.stream import Planned, write_safetensors
from hf_bitnet.modules import PackedBitLinear
from hf_bitnet.modules.faster_stack import FasterStack

SHAPE: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
SMOKE = SHAPE | {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
_SCALE = 0.02


# ---- the checkpoint ----


def build(folder: Path, shape: dict[str, Any]) -> None:
    """Writes the packed checkpoint of `shape`, unless the folder holds it."""
    config = LlamaConfig(**shape, dtype="bfloat16", architectures=["LlamaForCausalLM"], eos_token_id=None, pad_token_id=0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    quantization = hb.BitNetQuantizationConfig.bitnet_b158(form="packed", output_head="int8")
    hb.quantize_model(model, quantization, progress=False)
    marker, wanted = folder / "shape.json", json.dumps(shape, sort_keys=True)
    if marker.is_file() and marker.read_text() == wanted:
        return
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    _write_random(model, folder)
    marker.write_text(wanted)


def _write_random(model: nn.Module, folder: Path) -> None:
    """A checkpoint with random numbers of the right kind for every tensor of a model on the meta device."""
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for name, like in model.state_dict().items():
        bits = getattr(model.get_submodule(name.rpartition(".")[0]), "bits", None)
        make = functools.partial(_random, like, bits, generator)
        tensors.append(Planned(name, like.dtype, tuple(like.shape), make, like.numel()))
    write_safetensors(folder, tensors, max_shard_size="50GB", progress=lambda weights: None)


def _random(like: Tensor, bits: int | None, generator: torch.Generator) -> Tensor:
    if like.dtype == torch.uint8:
        return random_bytes(like.shape, bits or 8, generator)
    if like.dtype == torch.float32:
        return torch.full(like.shape, _SCALE if like.numel() == 1 else _SCALE / 64)
    values = torch.ones(like.shape) if like.dim() == 1 else torch.randn(like.shape, generator=generator)
    return values.to(like.dtype)


def random_bytes(shape: Any, bits: int, generator: torch.Generator) -> Tensor:
    """uint8 of `shape`: four ternary levels 0, 1, 2 in each byte, or the 255 levels of int8 where `bits` is not 2."""
    if bits != 2:
        return torch.randint(0, 255, shape, dtype=torch.uint8, generator=generator)
    left, packed = torch.randint(0, 81, shape, dtype=torch.uint8, generator=generator), torch.zeros(shape, dtype=torch.uint8)
    for i in range(4):
        packed |= (left % 3) << (2 * i)
        left //= 3
    return packed


# ---- one process of ours ----


def resident_mb(kind: str = "VmRSS") -> float:
    """Resident memory of this process in MB; kind "RssAnon" leaves mapped files out. Linux only, else not a number."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{kind}:")), float("nan"))


def work(folder: Path, prompt: int, tokens: int, optimized: bool, breakdown: bool) -> dict[str, Any]:
    """Everything that is measured in one fresh process."""
    from transformers.models.llama import modeling_llama  # noqa: F401  so that loading is not charged with the import

    before = resident_mb()
    start = time.perf_counter()
    model = LlamaForCausalLM.from_pretrained(folder)
    result: dict[str, Any] = {
        "load_s": time.perf_counter() - start,
        "resident_before_mb": before,
        "resident_loaded_mb": resident_mb(),
        "file_mb": (folder / "model.safetensors").stat().st_size / 2**20,
    }
    if optimized:  # as `hf-bitnet chat` does
        hb.optimize_for_generation(model)
        hb.keep_freed_memory()
    ids = torch.randint(0, model.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(1))
    few, start_ids = max(2, tokens // 8), ids[:, : min(prompt, 32)]
    generated_in(model, start_ids, few)
    result["decode_tokens_per_s"] = tokens / (
        generated_in(model, start_ids, few + tokens) - generated_in(model, start_ids, few)
    )
    with torch.no_grad():
        model(ids, logits_to_keep=1)
        start = time.perf_counter()
        model(ids, logits_to_keep=1)
    result["prefill_tokens_per_s"] = prompt / (time.perf_counter() - start)
    result["resident_used_mb"] = resident_mb()
    if breakdown:
        result["breakdown"] = profile_generation(model, start_ids, tokens)
    return result


def generated_in(model: Any, ids: Tensor, tokens: int) -> float:
    """Seconds for `tokens` new tokens, greedily."""
    start = time.perf_counter()
    with torch.no_grad():
        model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    return time.perf_counter() - start


def profile_generation(model: Any, ids: Tensor, tokens: int) -> dict[str, float]:
    """Microseconds per decoded token by kind of module, each without the modules inside it; "generate" is all the rest.

    Clocks around a module cost about a microsecond, which is measured and taken off, so that the parts sum to a little
    less than the whole.
    """
    clock = _Clock()
    handles = []
    whole = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, FasterStack))
    for name, module in model.named_modules():
        if name.startswith(whole):  # a clock on a part would make the model call its parts
            continue
        kind = "embedding, decoder layers in one call, norm" if f"{name}." in whole else _kind(name, module)
        handles.append(module.register_forward_pre_hook(lambda *_, k=kind: clock.enter(k)))
        handles.append(module.register_forward_hook(lambda *_: clock.leave()))
    generated_in(model, ids, 2)
    clock.spent.clear()
    first = generated_in(model, ids, 2)
    prefilled = dict(clock.spent)
    total = generated_in(model, ids, tokens + 2) - first
    for handle in handles:
        handle.remove()
    parts = {kind: (spent - 2 * prefilled[kind]) / tokens * 1e6 for kind, spent in clock.spent.items()}
    parts["generate: sampling, inputs"] = total / tokens * 1e6 - sum(parts.values())
    return dict(sorted(parts.items(), key=lambda item: -item[1]))


class _Clock:
    """Exclusive times of nested calls."""

    def __init__(self) -> None:
        self.spent: defaultdict[str, float] = defaultdict(float)
        self.stack: list[str] = []
        self.last = 0.0

    def _charge(self) -> None:
        now = time.perf_counter()
        if self.stack:
            self.spent[self.stack[-1]] += now - self.last
        self.last = time.perf_counter()

    def enter(self, kind: str) -> None:
        self._charge()
        self.stack.append(kind)

    def leave(self) -> None:
        self._charge()
        self.stack.pop()


def _kind(name: str, module: nn.Module) -> str:
    kind = type(module).__name__.lower()
    if isinstance(module, PackedBitLinear):
        return "output head" if "head" in name else "linear maps"
    for part, title in (
        ("norm", "norms"),
        ("attention", "attention, rotary embedding, cache"),
        ("mlp", "feed-forward: products"),
    ):
        if part in kind:
            return title
    if "embedding" in kind:
        return "embeddings"
    return {"decoderlayer": "layers: residuals", "activation": "feed-forward: activation"}.get(
        next((key for key in ("decoderlayer", "activation") if key in kind), ""), "model: mask, positions"
    )


# ---- all together ----


def in_a_process(arguments: argparse.Namespace, *flags: str) -> dict[str, Any]:
    """`work` in a fresh interpreter."""
    command = [sys.executable, "-m", "benchmarks.generate", "--worker", "--folder", str(arguments.folder), *flags]
    command += ["--prompt", str(arguments.prompt), "--tokens", str(arguments.tokens), "--threads", str(arguments.threads)]
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"a measuring process failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(arguments: argparse.Namespace, shape: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{arm: {figure: median over the rounds}}, the arms in turn."""
    arms: dict[str, Callable[[], dict[str, Any]]] = {
        "hf_bitnet": lambda: in_a_process(arguments, "--optimized"),
        "hf_bitnet, without optimize_for_generation": lambda: in_a_process(arguments),
    }
    if arguments.llama_cpp:
        gguf_file = arguments.folder / "peer-tq2_0.gguf"
        build_gguf(gguf_file, shape)
        arms["llama.cpp TQ2_0"] = lambda: run_llama_bench(
            arguments.llama_cpp, gguf_file, arguments.prompt, arguments.tokens, arguments.threads
        )
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    for _ in range(arguments.rounds):
        for name, run in arms.items():
            found[name].append(run())
    return {name: {key: median(each[key] for each in runs) for key in runs[0]} for name, runs in found.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the checkpoint is, or will be written")
    parser.add_argument("--llama-cpp", type=Path, help="folder that holds llama-bench")
    parser.add_argument("--layers", type=int, help="instead of the shape's own number")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="a tiny shape; no results are written")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--optimized", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--breakdown", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.worker:
        torch.set_num_threads(arguments.threads)
        print(json.dumps(work(arguments.folder, arguments.prompt, arguments.tokens, arguments.optimized, arguments.breakdown)))
        return
    shape = dict(SMOKE if arguments.smoke else SHAPE)
    if arguments.layers:
        shape["num_hidden_layers"] = arguments.layers
    build(arguments.folder, shape)
    arms = measure(arguments, shape)
    parts = in_a_process(arguments, "--optimized", "--breakdown")["breakdown"]
    print(table([{"arm": name, **figures} for name, figures in arms.items()]))
    print(table([{"part of a token": part, "microseconds": value} for part, value in parts.items()]))
    if not arguments.smoke:
        write_results("generate", {"shape": shape, "threads": arguments.threads, "arms": arms, "microseconds_per_token": parts})


if __name__ == "__main__":
    main()

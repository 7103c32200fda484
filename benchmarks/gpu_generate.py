"""Decoding with transformers' `generate` on the GPU: a 1B Llama shape, ternary and packed, against itself in bfloat16. Own.

Random weights, batch 1, greedy. Eager with the growing cache, and with the static one, for which transformers compiles the
decoding step (mode "reduce-overhead": CUDA graphs). A clock among the logits processors starts after a few tokens, so that
neither the prompt nor the first calls are counted.

    python -m benchmarks.gpu --only generate
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList

import hf_bitnet as hb
from benchmarks.generate import SHAPE
from benchmarks.generate import SMOKE as SMOKE_SHAPE
from benchmarks.gpu_common import NotTimedError, Row, Section, Settings, attempt, say, synchronize

OURS, BF16 = "hf_bitnet, ternary, packed", "torch bfloat16"
OPERATIONS = ("packed_linear", "packed_linears", "quantize_pack", "mean_magnitudes")
EAGER, STATIC = "eager", "static cache, compiled"
# compiling takes most of a minute; less than this left and it is not begun
_COMPILE_SECONDS = 60.0


class Sizes(NamedTuple):
    """Attributes: few: new tokens before the clock starts. tokens: new tokens that are timed."""

    shape: dict[str, Any]
    prompt: int
    few: int
    tokens: int
    rounds: int


FULL = Sizes(SHAPE, 32, 16, 128, 3)
SMOKE = Sizes(SMOKE_SHAPE | {"num_hidden_layers": 2}, 4, 2, 4, 1)


def make(name: str, sizes: Sizes, settings: Settings) -> LlamaForCausalLM:
    """The model of one arm; a packed one is quantized and packed on the device."""
    torch.manual_seed(0)
    config = LlamaConfig(**sizes.shape, eos_token_id=None, pad_token_id=0)
    with torch.device(settings.device):
        model = LlamaForCausalLM(config).bfloat16().eval()
    if name == OURS:
        model = hb.pack_model(
            hb.quantize_model(model, hb.BitNetQuantizationConfig.bitnet_b158(), progress=False), progress=False
        )
    return model


class Clock(LogitsProcessor):
    """Seconds from one token of a generation to another; waits for the device at these two and nowhere else."""

    def __init__(self, first: int, last: int, device: torch.device) -> None:
        self.marks, self.device, self.calls = (first, last), device, 0
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.calls += 1
        if self.calls in self.marks:
            synchronize(self.device)
            self.times.append(time.perf_counter())
        return scores


def decoded_in(model: Any, ids: Tensor, sizes: Sizes, static: bool) -> float:
    """Seconds for `sizes.tokens` tokens, greedily."""
    clock = Clock(sizes.few, sizes.few + sizes.tokens, ids.device)
    new = sizes.few + sizes.tokens
    given: dict[str, Any] = {"disable_compile": True}
    if static:
        given = {"cache_implementation": "static", "compile_config": CompileConfig(mode="reduce-overhead", fullgraph=True)}
    with torch.no_grad():
        model.generate(
            ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, logits_processor=LogitsProcessorList([clock]), **given
        )
    return clock.times[1] - clock.times[0]


def tokens_per_second(model: Any, sizes: Sizes, static: bool, settings: Settings) -> float:
    ids = torch.randint(0, model.config.vocab_size, (1, sizes.prompt), device=settings.device)
    decoded_in(model, ids, sizes, static)
    return sizes.tokens / median(decoded_in(model, ids, sizes, static) for _ in range(sizes.rounds))


def measure_arm(name: str, mode: str, sizes: Sizes, settings: Settings) -> Row:
    if mode == STATIC and not settings.cuda:
        raise NotTimedError("skipped: needs CUDA")
    reason = settings.why_not(*(OPERATIONS if name == OURS else ()), seconds=_COMPILE_SECONDS if mode == STATIC else 0.0)
    if reason is not None:
        raise NotTimedError(reason)
    torch._dynamo.reset()
    model = make(name, sizes, settings)
    before = torch.cuda.memory_allocated() / 1e9 if settings.cuda else "-"
    return {"tokens/s": tokens_per_second(model, sizes, mode == STATIC, settings), "model GB": before}


def measure(settings: Settings) -> Section:
    sizes = SMOKE if settings.smoke else FULL
    section, rows = Section(), []
    for mode in (EAGER, STATIC):
        base = None
        for name in (BF16, OURS):
            say(f"  generate, {mode}: {name}")
            found, wrong = attempt(name, lambda name=name, mode=mode: measure_arm(name, mode, sizes, settings), settings.device)
            row: Row = {"mode": mode, "arm": name, **(found or {"tokens/s": wrong, "model GB": "-"})}
            base = row["tokens/s"] if name == BF16 and found else base
            rows.append(row | {"x bfloat16": row["tokens/s"] / base if found and base else "-"})
    section.tables["generate, one sequence"] = rows
    return section

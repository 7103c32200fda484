"""The experts of one layer of a mixture on the GPU: ternary and packed, against transformers' own in bfloat16. Own.

128 experts, 8 for each token, of the shape of Qwen3-30B-A3B, random weights and routing, from one token to a prompt. The arms
of transformers are its product over all experts at once ("grouped_mm") and the one that gathers weights ("batched_mm", few
tokens only). Each call is one CUDA graph where it can be captured: what waits for the device cannot, and says so.

    python -m benchmarks.gpu --only experts
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import hf_bitnet as hb
from benchmarks.gpu_common import Arms, Row, Section, Settings, attempt, bfloat16, captured, ratio, say, timed

OURS, GROUPED, BATCHED = "hf_bitnet, ternary, packed", "bfloat16, grouped_mm", "bfloat16, batched_mm"
OPERATIONS = ("packed_experts", "quantize_pack", "mean_magnitudes")
# gathering a weight for each place takes memory: tokens up to which that is tried
_MOST_BATCHED = 16


class Sizes(NamedTuple):
    experts: int
    chosen: int
    hidden: int
    inner: int
    tokens: tuple[int, ...]
    rounds: int


FULL = Sizes(128, 8, 2048, 768, (1, 4096, 16, 512, 64), 9)
SMOKE = Sizes(4, 2, 64, 32, (1, 40), 1)


def make(sizes: Sizes, settings: Settings) -> dict[str, nn.Module]:
    """The same experts as transformers has them, and packed."""
    config = Qwen3MoeConfig(
        hidden_size=sizes.hidden,
        moe_intermediate_size=sizes.inner,
        num_experts=sizes.experts,
        num_experts_per_tok=sizes.chosen,
    )
    torch.manual_seed(0)
    with torch.device(settings.device):
        plain: Any = Qwen3MoeExperts(config)
        for parameter in plain.parameters():
            nn.init.normal_(parameter, std=0.02)
    plain = plain.bfloat16().eval()
    model = nn.ModuleDict({"experts": copy.deepcopy(plain)})
    hb.pack_model(hb.quantize_model(model, hb.BitNetQuantizationConfig.bitnet_b158(), progress=False), progress=False)
    arms = {OURS: model["experts"]}
    for name, implementation in ((GROUPED, "grouped_mm"), (BATCHED, "batched_mm")):
        arms[name] = twin = copy.copy(plain)
        twin.config = copy.copy(config)
        twin.config._experts_implementation = implementation
    return arms


def routed(tokens: int, sizes: Sizes, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(settings.device).manual_seed(tokens)
    scores = torch.rand(tokens, sizes.experts, generator=generator, device=settings.device)
    weights, index = scores.topk(sizes.chosen, dim=-1)
    return bfloat16(generator, tokens, sizes.hidden), index, weights.bfloat16()


def measure_tokens(arms: dict[str, nn.Module], tokens: int, sizes: Sizes, settings: Settings) -> list[Row]:
    """All arms on so many tokens, in turn: a row each."""
    args = routed(tokens, sizes, settings)
    calls: Arms = {}
    failed: dict[str, str] = {}
    for name, module in arms.items():
        if name == BATCHED and tokens > _MOST_BATCHED:
            continue
        call: Callable[[], object] = lambda module=module: module(*args)  # noqa: E731
        graph, wrong = attempt(name, lambda call=call: captured(call, settings.device), settings.device)
        if wrong is None:
            calls[name] = graph
        else:
            failed[name] = wrong
    seconds, late = timed(calls, sizes.rounds, settings.device)
    failed |= late
    best = min((name for name in (GROUPED, BATCHED) if name in seconds), key=seconds.__getitem__, default=GROUPED)
    rows: list[Row] = []
    for name in [*calls, *failed]:
        times = ratio(seconds, best, name)
        us = seconds[name] * 1e6 if name in seconds else failed.get(name, "-")
        rows.append({"tokens": tokens, "arm": name, "us": us, "x the best bfloat16": "-" if times is None else times})
    return rows


def measure(settings: Settings) -> Section:
    sizes = SMOKE if settings.smoke else FULL
    section, rows = Section(), []
    with torch.no_grad():
        arms, wrong = attempt("making the experts", lambda: make(sizes, settings), settings.device)
        for tokens in sizes.tokens:
            reason = wrong or settings.why_not(*OPERATIONS)
            say(f"  experts: {tokens} tokens" + (f": {reason}" if reason else ""))
            if reason is None:
                rows += measure_tokens(arms, tokens, sizes, settings)
            else:
                rows.append({"tokens": tokens, "arm": OURS, "us": reason, "x the best bfloat16": "-"})
    section.tables[f"{sizes.experts} experts, {sizes.chosen} for each token"] = rows
    return section

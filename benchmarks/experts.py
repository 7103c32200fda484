"""A mixture of experts, ternary against full precision: the training step, decoding, prompts, bytes.

Full precision is transformers' own fused form (one product over all experts); ours are separate layers. Random weights, all
arms in turn in one run.

    python -m benchmarks.experts            # 440 M weights: 8 layers of 32 experts, 4 for each token; some minutes, 8 GB
    python -m benchmarks.experts --smoke    # a tiny shape, to see that it runs; writes no results
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import hf_bitnet as hb
from benchmarks.common import interleave, ratios, table, write_results
from benchmarks.generate import generated_in
from benchmarks.train_step import make_step

TOKENS, PROMPT = 32, 512
# different ones in turn: an expert gets another number of tokens in each step of training
BATCHES = 16
SHAPE: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 1024,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
TRAINED = SHAPE | {"vocab_size": 4096, "hidden_size": 384, "moe_intermediate_size": 256, "num_hidden_layers": 4}
SMOKE = TRAINED | {"vocab_size": 256, "hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 4, "num_hidden_layers": 2}


def made(shape: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, intermediate_size=4 * shape["hidden_size"]))


def training(smoke: bool, rounds: int) -> list[dict[str, Any]]:
    rows = []
    for mode in ("float32", "bfloat16"):
        for experts in (8, 32):
            shape = SMOKE if smoke else TRAINED | {"num_experts": experts, "num_experts_per_tok": 2}
            plain = made(shape)
            quantized = hb.quantize_model(copy.deepcopy(plain), hb.BitNetQuantizationConfig.bitnet_b158(), progress=False)
            tokens = torch.randint(0, shape["vocab_size"], (2, 2, 32) if smoke else (BATCHES, 8, 256))
            arms = {"full precision": plain, "hf_bitnet": quantized}
            steps: dict[str, Callable[[], object]] = {
                name: make_step(model, tokens, mode == "bfloat16", compiled=False) for name, model in arms.items()
            }
            for name, result in ratios(interleave(steps, rounds), "full precision").items():
                rows.append({"step": mode, "experts": shape["num_experts"], "arm": name, **result})
    return rows


def serving(smoke: bool, rounds: int) -> list[dict[str, Any]]:
    plain = made(SMOKE if smoke else SHAPE).bfloat16().eval()
    packed = hb.quantize_model(copy.deepcopy(plain), hb.BitNetQuantizationConfig.bitnet_b158(form="packed"), progress=False)
    hb.optimize_for_generation(packed)
    prompt = torch.randint(3, plain.config.vocab_size, (1, PROMPT // 8 if smoke else PROMPT))
    rows = []
    arms = {"full precision": plain, "hf_bitnet": packed}
    reading: dict[str, Callable[[], object]] = {name: partial(read, model, prompt) for name, model in arms.items()}
    read_seconds = {name: median(each) for name, each in interleave(reading, rounds).items()}
    decode_seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, model in arms.items():
            decode_seconds[name].append(seconds_a_token(model, prompt[:, :64]))
    for name, model in arms.items():
        rows.append(
            {
                "arm": name,
                "mb": sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6,
                "decode_tokens_per_s": 1 / median(decode_seconds[name]),
                "prefill_tokens_per_s": prompt.shape[1] / read_seconds[name],
            }
        )
    return rows


@torch.no_grad()
def read(model: Any, prompt: Tensor) -> None:
    model(prompt, logits_to_keep=1)


def seconds_a_token(model: Any, prompt: Tensor) -> float:
    """Without the first, which reads the prompt."""
    return (generated_in(model, prompt, TOKENS) - generated_in(model, prompt, 1)) / (TOKENS - 1)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--smoke", action="store_true", help="tiny models, one round, nothing written")
    args = parser.parse_args(argv)
    rounds = 1 if args.smoke else args.rounds
    served = serving(args.smoke, rounds)
    print(table(served), flush=True)
    trained = training(args.smoke, rounds)
    print(table(trained))
    if not args.smoke:
        print(write_results("experts", {"rounds": rounds, "serving": served, "training": trained}))


if __name__ == "__main__":
    main()

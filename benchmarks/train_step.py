"""Time of a QAT training step against the full-precision step: forward, loss, backward, AdamW.

Arms: full precision; hf_bitnet (W1.58A8); transformers' AutoBitLinear (online); torchao's BitNet training weight where
torchao is installed. float32 and bfloat16 autocast, eager and torch.compile; all arms in turn in one run.

    python -m benchmarks.train_step                    # ../shared/models/novels-llama, 8 x 256 tokens
    python -m benchmarks.train_step --smoke            # a tiny random model, to see that it runs
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.bitnet import AutoBitLinear

import hf_bitnet as hb
from benchmarks.common import SHARED, interleave, ratios, table, write_results


def base_model(smoke: bool) -> LlamaForCausalLM:
    """novels-llama where it is, else a random model of its shape; float32."""
    shape: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8}
    if smoke:
        shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    path = SHARED / "models" / "novels-llama"
    if path.is_dir() and not smoke:
        return LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    kv = shape["num_attention_heads"] // 2
    return LlamaForCausalLM(LlamaConfig(vocab_size=4096, num_key_value_heads=kv, tie_word_embeddings=True, **shape))


def hf_bitnet_arm(model: LlamaForCausalLM) -> nn.Module:
    return hb.quantize_model(model, hb.BitNetQuantizationConfig.bitnet_b158())


def transformers_arm(model: Any, kind: type[AutoBitLinear] = AutoBitLinear) -> Any:
    """Replaces the linear layers but the head by transformers' layer, or a subclass of it; weights are shared."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            layer = kind(module.in_features, module.out_features, bias=module.bias is not None, online_quant=True)
            layer.weight, layer.bias = module.weight, module.bias
            model.set_submodule(name, layer)
    return model


def torchao_arm(model: LlamaForCausalLM) -> nn.Module:
    from torchao.prototype.quantized_training import bitnet_training  # pyright: ignore[reportMissingImports]
    from torchao.quantization import quantize_  # pyright: ignore[reportMissingImports]

    quantize_(model.model, bitnet_training())
    return model


ARMS: dict[str, Callable[[LlamaForCausalLM], nn.Module]] = {
    "full precision": lambda model: model,
    "hf_bitnet": hf_bitnet_arm,
    "transformers AutoBitLinear": transformers_arm,
    "torchao BitNet weight": torchao_arm,
}


def make_step(model: nn.Module, tokens: torch.Tensor, bf16: bool, compiled: bool) -> Callable[[], None]:
    """One optimizer step on the same tokens (batch, sequence), or on those of (batches, batch, sequence) in turn."""
    batches = itertools.cycle([tokens] if tokens.dim() == 2 else list(tokens))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    run: Any = torch.compile(model) if compiled else model

    def step() -> None:
        batch = next(batches)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = run(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(smoke: bool, rounds: int, modes: list[str]) -> list[dict[str, Any]]:
    rows = []
    torch.manual_seed(0)
    model = base_model(smoke)
    tokens = torch.randint(0, model.config.vocab_size, (2, 32) if smoke else (8, 256))
    for mode in modes:
        bf16, compiled = "bfloat16" in mode, "compiled" in mode
        arms: dict[str, Callable[[], object]] = {}
        failed: dict[str, str] = {}
        torch._dynamo.reset()
        for name, make in ARMS.items():
            try:
                step = make_step(make(copy.deepcopy(model)), tokens, bf16, compiled)
                step()
            except Exception as error:  # a peer that cannot do this mode is a row of the table, not a crash of it
                if name in ("full precision", "hf_bitnet"):
                    raise
                failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"
            else:
                arms[name] = step
        seconds = interleave(arms, rounds)
        for name, result in ratios(seconds, "full precision").items():
            rows.append({"mode": mode, "arm": name, **result})
        rows += [{"mode": mode, "arm": name, "median_ms": why, "ratio": "-"} for name, why in failed.items()]
        print(table([row for row in rows if row["mode"] == mode]), flush=True)
    return rows


MODES = ["bfloat16 eager", "float32 eager", "bfloat16 compiled", "float32 compiled"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--smoke", action="store_true", help="tiny model, two rounds, nothing written")
    args = parser.parse_args(argv)
    rows = measure(args.smoke, 2 if args.smoke else args.rounds, args.modes)
    if not args.smoke:
        print(write_results("train_step", {"tokens_per_step": 8 * 256, "rounds": args.rounds, "rows": rows}))


if __name__ == "__main__":
    main()

"""Bytes that a Llama block keeps for backward: full precision, hf_bitnet, transformers' AutoBitLinear, torchao's weight.

Counted with `torch.autograd.graph.saved_tensors_hooks`, each storage once. "linears" are the inputs and weights that
linear layers save; "weights" is the part of it that has a weight's shape (a reference to a parameter costs no memory, and
is counted apart as "parameters"); "block" is everything the block saves.

    python -m benchmarks.saved_memory
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

import hf_bitnet as hb
from benchmarks.common import table, write_results


def make_block(hidden: int, ffn: int) -> tuple[LlamaDecoderLayer, LlamaConfig]:
    config = LlamaConfig(hidden_size=hidden, intermediate_size=ffn, num_attention_heads=8, num_key_value_heads=4)
    config._attn_implementation = "sdpa"
    return LlamaDecoderLayer(config, 0), config


def hf_bitnet_arm(block: nn.Module) -> nn.Module:
    return hb.quantize_model(block, hb.BitNetQuantizationConfig.bitnet_b158())


def transformers_arm(block: nn.Module) -> nn.Module:
    from transformers.integrations.bitnet import AutoBitLinear

    for name, module in list(block.named_modules()):
        if isinstance(module, nn.Linear):
            layer = AutoBitLinear(module.in_features, module.out_features, bias=False, online_quant=True)
            layer.weight = module.weight
            block.set_submodule(name, layer)
    return block


def torchao_arm(block: nn.Module) -> nn.Module:
    from torchao.prototype.quantized_training import bitnet_training  # pyright: ignore[reportMissingImports]
    from torchao.quantization import quantize_  # pyright: ignore[reportMissingImports]

    quantize_(block, bitnet_training())
    return block


ARMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "full precision": lambda block: block,
    "hf_bitnet": hf_bitnet_arm,
    "transformers AutoBitLinear": transformers_arm,
    "torchao BitNet weight": torchao_arm,
}


class SavedBytes:
    """Counts what autograd saves while it is active, each storage once, by who saved it."""

    def __init__(self, module: nn.Module) -> None:
        self.parameters = {p.untyped_storage().data_ptr() for p in module.parameters() if type(p) is nn.Parameter}
        self.weight_shapes = {tuple(p.shape) for p in module.parameters() if p.dim() == 2}
        self.weight_shapes |= {shape[::-1] for shape in self.weight_shapes}
        self.storages: dict[int, tuple[int, bool, bool]] = {}
        self.keep: list[Any] = []
        self.depth = 0
        for child in module.modules():
            if child is not module and _is_linear(child):
                child.register_forward_pre_hook(self._enter)
                child.register_forward_hook(self._leave)

    def _enter(self, *_: Any) -> None:
        self.depth += 1

    def _leave(self, *_: Any) -> None:
        self.depth -= 1

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storages = [tensor] if type(tensor) in (torch.Tensor, nn.Parameter) else _inner(tensor)
        for inner in storages:
            self.keep.append(inner)  # a freed storage's address could be reused and counted as the same
            pointer, linear = inner.untyped_storage().data_ptr(), self.depth > 0
            weight = tuple(inner.shape) in self.weight_shapes
            known = self.storages.get(pointer)
            if known is None or (linear and not known[1]):
                self.storages[pointer] = (inner.untyped_storage().nbytes(), linear, weight)
        return tensor

    def count(self) -> dict[str, int]:
        new = {p: s for p, s in self.storages.items() if p not in self.parameters}
        return {
            "linears": sum(size for size, linear, _ in new.values() if linear),
            "weights": sum(size for size, linear, weight in new.values() if linear and weight),
            "parameters": sum(s[0] for p, s in self.storages.items() if p in self.parameters and s[1]),
            "block": sum(size for size, _, _ in new.values()),
        }


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def _inner(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors inside a tensor subclass."""
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return [inner for name in names for inner in _inner_of(getattr(tensor, name))]


def _inner_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    return [tensor] if type(tensor) in (torch.Tensor, nn.Parameter) else _inner(tensor)


def measure(hidden: int, ffn: int, batch: int, length: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    block, config = make_block(hidden, ffn)
    x = torch.randn(batch, length, hidden, requires_grad=True)
    position = LlamaRotaryEmbedding(config)(x, torch.arange(length)[None])
    rows: list[dict[str, Any]] = []
    for mode in ("float32", "bfloat16 autocast"):
        base: dict[str, int] = {}
        for name, make in ARMS.items():
            try:
                arm = make(copy.deepcopy(block))
                counter = SavedBytes(arm)
                hooks = torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda tensor: tensor)
                with hooks, torch.autocast("cpu", torch.bfloat16, enabled=mode != "float32"):
                    arm(x, position_embeddings=position)
            except Exception as error:
                if name in ("full precision", "hf_bitnet"):
                    raise
                rows.append({"mode": mode, "arm": name, "linears MB": f"fails: {type(error).__name__}"})
                continue
            counts = counter.count()
            base = base or counts
            # nn.Linear's figure is its inputs and weights: what it would keep were the parameters not there anyway
            rows.append(
                {
                    "mode": mode,
                    "arm": name,
                    "linears MB": counts["linears"] / 1e6,
                    "ratio": counts["linears"] / base["linears"],
                    "weights MB": counts["weights"] / 1e6,
                    "parameters referenced MB": counts["parameters"] / 1e6,
                    "block MB": counts["block"] / 1e6,
                    "block ratio": counts["block"] / base["block"],
                }
            )
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--ffn", type=int, default=1536)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, nothing written")
    args = parser.parse_args(argv)
    if args.smoke:
        args.hidden, args.ffn, args.batch, args.length = 64, 96, 2, 16
    rows = measure(args.hidden, args.ffn, args.batch, args.length)
    print(table(rows))
    if not args.smoke:
        shape = {"hidden": args.hidden, "ffn": args.ffn, "batch": args.batch, "length": args.length}
        print(write_results("saved_memory", {"shape": shape, "rows": rows}))


if __name__ == "__main__":
    main()

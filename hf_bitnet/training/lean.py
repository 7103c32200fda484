"""The memory-lean preset: bfloat16 master weights with stochastic rounding, 8-bit AdamW, activation checkpointing. Own.

Bytes per parameter: float32 AdamW keeps 4 (weight) + 4 (gradient) + 8 (two moments) = 16, this 2 + 2 + 2 and a little.
Rounding to the nearest bfloat16 would lose most small steps; rounding up or down at random, by the distance, keeps their mean
(arXiv 2010.06192). Optimizer and rounding are torchao's (its random numbers are torch's, which checkpoints hold).
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.training_args import OptimizerNames

if TYPE_CHECKING:
    from .arguments import QATArguments

_ROUNDING = "bf16_stochastic_round"
_SERVED = (OptimizerNames.ADAMW_TORCH_8BIT, OptimizerNames.ADAMW_TORCH_4BIT)


def set_lean(args: QATArguments) -> None:
    """Sets the fields that `lean=True` stands for.

    Raises ImportError without torchao, and ValueError on an optimizer or precision that cannot be part of it.
    """
    default = type(args).__dataclass_fields__["optim"].default
    if OptimizerNames(args.optim) is OptimizerNames(default):
        args.optim = OptimizerNames.ADAMW_TORCH_8BIT
    if OptimizerNames(args.optim) not in _SERVED:
        served = ", ".join(each.value for each in _SERVED)
        raise ValueError(
            f"lean=True with optim={OptimizerNames(args.optim).value!r}: only {served} round stochastically; leave optim "
            "out, or lean"
        )
    if args.fp16:
        raise ValueError("lean=True trains bfloat16 weights, which float16 autocast cannot take; leave fp16 out")
    if importlib.util.find_spec("torchao") is None:
        raise ImportError("lean=True needs torchao, for 8-bit AdamW with stochastic rounding: pip install 'torchao>=0.15'")
    if _ROUNDING not in str(args.optim_args or ""):
        args.optim_args = ",".join(filter(None, (str(args.optim_args or ""), f"{_ROUNDING}=True")))
    args.bf16 = args.activation_checkpointing = True


def rounds_stochastically(args: QATArguments) -> bool:
    """Whether the optimizer rounds bfloat16 weights stochastically."""
    return OptimizerNames(args.optim) in _SERVED and f"{_ROUNDING}=true" in str(args.optim_args or "").lower().replace(" ", "")


def to_lean(model: nn.Module) -> None:
    """Casts a model to bfloat16, in place; scales, strengths and the like stay float32."""
    model.to(torch.bfloat16)

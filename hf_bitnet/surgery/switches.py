"""What is switched on a quantized model while it trains: strength, norms, kept codes. Own.

Leaves out: exchanging layers (`swap.py`), when to switch (`training/`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..modules import BitEmbedding, SubNorm, TrainedLayer
from .walk import layers_of, trained_layers, trained_tables


def set_strength(model: nn.Module, strength: float, *, hard: bool = True) -> None:
    """Sets how far the layers are quantized: 0 is the full-precision model, bit for bit; 1 the quantized one.

    Below 1 the layers work on float mixes. At 1 they return to the integer step, which under torch.compile is one
    recompilation; `hard=False` stays on the float path (same values) and never recompiles.

    Raises ValueError when the strength is outside 0..1 or the model has no layer in train form.
    """
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0.0 <= strength <= 1.0:
        raise ValueError(f"strength must be a number from 0 (full precision) to 1 (quantized), got {strength!r}")
    found = layers_of(model, TrainedLayer, "set_strength", "quantize_model(model, config)")
    layers = [*(layer for _, layer in found), *trained_tables(model)]
    _mix(layers, [strength] * len(layers), [strength < 1.0 or (layer.relaxed and not hard) for layer in layers])


def set_strengths(
    layers: Sequence[TrainedLayer | BitEmbedding], strengths: Sequence[float], *, relaxed: Sequence[bool]
) -> None:
    """Gives each layer, and its sub-norm's blend, a strength of its own, in a few kernels for all of them.

    Args:
        relaxed: whether a layer stays on the float path; it has to where its strength is below 1.
    """
    _mix(layers, strengths, relaxed)
    norms = [layer._modules.get("sub_norm") for layer in layers]
    blends = [(norm.blend, to) for norm, to in zip(norms, strengths, strict=True) if isinstance(norm, SubNorm)]
    _fill([blend for blend, _ in blends], [to for _, to in blends])


def _mix(layers: Sequence[TrainedLayer | BitEmbedding], strengths: Sequence[float], relaxed: Sequence[bool]) -> None:
    for layer, soft in zip(layers, relaxed, strict=True):
        layer.relaxed = soft
    _fill([layer.strength for layer in layers], strengths)


def _fill(tensors: list[Tensor], values: Sequence[float]) -> None:
    if tensors:
        with torch.no_grad():
            torch._foreach_zero_(tensors)  # pyright: ignore[reportPrivateImportUsage]
            torch._foreach_add_(tensors, list(values))  # pyright: ignore[reportPrivateImportUsage]


def harden(model: nn.Module) -> None:
    """Back to the integer step at full strength; the same as `set_strength(model, 1.0)`."""
    set_strength(model, 1.0)


def set_norm_blend(model: nn.Module, blend: float) -> None:
    """Moves every sub-norm from the identity (0) to a plain RMS norm (1)."""
    if isinstance(blend, bool) or not isinstance(blend, int | float) or not 0.0 <= blend <= 1.0:
        raise ValueError(f"blend must be a number from 0 (identity) to 1 (RMS norm), got {blend!r}")
    for module in model.modules():
        if isinstance(module, SubNorm):
            module.blend.fill_(blend)


@contextlib.contextmanager
def kept_codes(model: nn.Module) -> Iterator[None]:
    """Inside, each layer makes its codes once and keeps them (one byte a weight) while its weight's version lasts.

    For several forwards with unchanged weights: gradient accumulation, activation checkpointing, evaluation. The codes are
    dropped at every step of any torch optimizer (the fused ones change weights without raising their version). Weights
    must not be changed inside in other ways that autograd does not count (`parameter.data.copy_`).
    """
    # layers of an outer kept_codes are left to it
    layers = [layer for _, layer in trained_layers(model) if not layer.keep_codes]

    def drop(*_: Any) -> None:
        for layer in layers:
            layer.drop_codes()

    for layer in layers:
        layer.keep_codes = True
    hook = register_optimizer_step_post_hook(drop)
    try:
        yield
    finally:
        hook.remove()
        for layer in layers:
            layer.keep_codes = False
        drop()


def reset_state(model: nn.Module) -> None:
    """Puts the unsaved buffers (strength, fixed temperatures) of all layers to their starting values."""
    layers = [layer for _, layer in trained_layers(model)]
    for layer in layers:
        if not isinstance(layer.ste_temperature, nn.Parameter):
            layer.ste_temperature.fill_(layer.spec.temperature)
    both = [*layers, *trained_tables(model)]
    _mix(both, [1.0] * len(both), [False] * len(both))

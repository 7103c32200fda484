"""Runs a copy of the model as another program runs what was written: on the CPU, with what transformers chooses itself. Own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..surgery import dequantize_model, independent_copy, probing
from .format import Source


def as_loaded(twin: Any) -> Any:
    """A copy of the model as from_pretrained makes it: on the CPU, with its attention, and what no checkpoint holds anew.

    That is rotary frequencies and the like: a call of `model.bfloat16()` has rounded them; loading makes them in float32.
    """
    _to_cpu(twin)
    _choose_implementations(twin)
    with torch.no_grad():
        for module in twin.modules():
            named = {name: module._buffers[name] for name in module._non_persistent_buffers_set}
            floats = {name: each.float() for name, each in named.items() if each is not None and each.is_floating_point()}
            if floats and not module._parameters:
                module._buffers.update(floats)
                twin._init_weights(module)
    return twin


def _to_cpu(twin: nn.Module) -> None:
    """Parameters are replaced, not moved: the copy may share them with the model."""
    moved: dict[int, nn.Parameter] = {}
    for module in twin.modules():
        for name, each in module._parameters.items():
            if each is not None and not each.is_cpu:
                here = moved.setdefault(id(each), nn.Parameter(each.detach().cpu(), requires_grad=False))
                module._parameters[name] = here
    twin.cpu()


def _choose_implementations(twin: Any) -> None:
    """What from_pretrained takes by itself. In bfloat16, attention that sums in another order is off by 0.01, not by 1e-4."""
    for wanted in ("eager",) if getattr(twin.config, "output_attentions", False) else ("sdpa", "eager"):
        try:
            twin.set_attn_implementation(wanted)
            break
        except (ValueError, ImportError):  # a part of the model has none of that name
            continue
    experts = twin.get_correct_experts_implementation(None)
    if experts != getattr(twin.config, "_experts_implementation", experts):
        twin.set_experts_implementation(experts)


def reader_options(twin: Any) -> dict[str, object]:
    """Of from_pretrained, so that it computes as this copy does; a model that cannot choose keeps what it has."""
    attention = getattr(twin.config, "_attn_implementation", None)
    return {"attn_implementation": attention} if isinstance(attention, str) else {}


def dequantized(source: Source, dtype: torch.dtype) -> Any:
    """The model with plain layers in `dtype`, as it will be loaded: what a reader that ignores activations has to compute."""
    # what stays float is copied, because it is going to be cast
    shared = {id(each): each for each in source.model.parameters() if not each.is_floating_point()}
    model: Any = dequantize_model(independent_copy(source.model, shared), dtype=dtype)
    for parameter in model.parameters():  # not the buffers, which loading does not cast either
        parameter.data = parameter.data.to(dtype)
    return as_loaded(model)


def outputs_of(model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every float tensor that the model returns, in order; float32 on the CPU. In eval mode, which is undone afterwards."""
    given = {k: (v.to(model.dtype) if v.is_floating_point() else v).to(model.device) for k, v in inputs.items()}
    with probing(model, quantized=None):
        torch.manual_seed(0)  # some models draw numbers in their forward
        output = model(**given)
    if not isinstance(output, Mapping):
        values = output if isinstance(output, tuple) else (output,)
        output = {f"output {number}": each for number, each in enumerate(values)}
    return {k: v.float().cpu() for k, v in output.items() if isinstance(v, Tensor) and v.is_floating_point()}


def model_logits(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits float32 on the CPU of a model in this process."""
    return outputs_of(model, inputs)["logits"]


def dequantized_logits(source: Source, dtype: torch.dtype) -> Tensor:
    """Logits float32 of the model with plain layers in `dtype`, of the probe."""
    return model_logits(dequantized(source, dtype), source.inputs() or {})

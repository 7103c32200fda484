"""Makes the parts of a decoder between its products faster, for generation on the CPU. Own.

Every part is proven on random numbers before it is exchanged: a module that computes anything else keeps its own forward.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..kernels import reference
from ..modules.faster import (
    ATTENTION_FUNCTIONS,
    ROTATE,
    Faster,
    FasterAttention,
    FasterNorm,
    epsilon,
    make_faster,
    make_original,
)
from ..modules.faster_ahead import layers_of
from ..modules.faster_layer import FasterLayer, is_decoder_layer
from ..modules.faster_stack import FasterStack, forget
from .walk import trained_layers

logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=nn.Module)


def optimize_for_generation(model: Model, *, enable: bool = True) -> Model:
    """Gives norms, attention layers and packed decoder layers of transformers faster forwards, in place; returns the model.

    Packed decoder layers in the manner of Llama (`pack_model` first; also Mistral, Qwen 2 and 3, BitNet) compute a new token in
    one kernel call for all of them, and a prompt (without padding, from its beginning) in one call each.

    They serve where no gradient is asked for and nothing is compiled; training, saving, `torch.compile` and state-dict keys
    are as before. Calling it again changes nothing; copies of the model stay optimized.

    Numerics: the rotary embedding is bit for bit that of the model. RMS norms round where the model's do and differ only in
    the order of one float32 sum. Attention from one new token groups the query heads that share a key, and rounds once, as
    torch's fused attention does on every path; the last digit of its output may differ. Where AMX serves, attention of a
    prompt in bfloat16 rounds the weights of the softmax too, as torch's does.

    Args:
        enable: False takes it all off again.

    Raises:
        TypeError: what came is no model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"optimize_for_generation takes a model (torch.nn.Module), not {type(model).__name__}; "
            "for a path: optimize_for_generation(AutoModelForCausalLM.from_pretrained(path))"
        )
    if enable and trained_layers(model):
        logger.warning(
            "%s is in train form: every forward quantizes its float weights anew. For fast generation pack it first: "
            "optimize_for_generation(pack_model(model))",
            type(model).__name__,
        )
    for module in model.modules():
        forget(module)
        if not enable:
            make_original(module)
        elif not isinstance(module, Faster) and "forward" not in module.__dict__:  # a forward put in by offloading stays
            if _is_rms_norm(module):
                make_faster(module, FasterNorm)
            elif _is_attention(type(module)):
                make_faster(module, FasterAttention)
            elif is_decoder_layer(module):
                make_faster(module, FasterLayer)
    for module in model.modules() if enable else ():
        plain = not isinstance(module, Faster) and "forward" not in module.__dict__
        if plain and sum(isinstance(layer, FasterLayer) for layer in layers_of(module)) > 1:
            make_faster(module, FasterStack)
    return model


def _is_rms_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    own = len(module._parameters) == 1 and not module._modules and not module._buffers
    if weight is None or weight.dim() != 1 or not own or not isinstance(_epsilon(module), float):
        return False
    return _computes_rms_norm(type(module), _epsilon(module), weight.shape[0], weight.dtype, module)


def _epsilon(module: nn.Module) -> Any:
    try:
        return epsilon(module)
    except KeyError:
        return None


@functools.cache
def _proven(kind: type, epsilon: float, features: int, dtype: torch.dtype) -> list[bool]:
    return []


def _computes_rms_norm(kind: type, epsilon: float, features: int, dtype: torch.dtype, module: nn.Module) -> bool:
    """Whether modules of this class return what `kernels.rms_norm` is defined to return; asked once for each kind."""
    known = _proven(kind, epsilon, features, dtype)
    if not known:
        generator = torch.Generator().manual_seed(0)
        weight, x = (torch.randn(*shape, features, generator=generator, device="cpu").to(dtype) for shape in ((), (3,)))
        known.append(
            _agree(
                lambda: torch.func.functional_call(module, {"weight": weight}, (x,)),
                lambda: reference.rms_norm(x, weight, epsilon),
            )
        )
    return known[0]


@functools.cache
def _is_attention(kind: type) -> bool:
    """Whether the forward of a class gets its rotary embedding and its attention function by the names we exchange."""
    forward = kind.forward  # type: ignore[attr-defined]
    if not isinstance(forward, FunctionType) or not {ROTATE, ATTENTION_FUNCTIONS} <= set(forward.__code__.co_names):
        return False
    rotate = forward.__globals__.get(ROTATE)
    if rotate is None or not hasattr(forward.__globals__.get(ATTENTION_FUNCTIONS), "get_interface"):
        return False
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 3, 8), (2, 2, 3, 8), (2, 3, 8), (2, 3, 8))
    for dtype in (torch.float32, torch.bfloat16):
        arguments = [torch.randn(shape, generator=generator, device="cpu").to(dtype) for shape in shapes]
        if not _agree(lambda a=arguments: rotate(*a), lambda a=arguments: reference.rotate(*a)):
            return False
    return True


@torch.no_grad()
def _agree(found: Callable[[], Any], expected: Callable[[], Any]) -> bool:
    """Whether both return equal tensors. A function that is called otherwise than we think fails, and does not agree."""
    try:
        pair = [value if isinstance(value, tuple) else (value,) for value in (found(), expected())]
    except Exception:
        return False
    ours, theirs = pair
    return len(ours) == len(theirs) and all(
        isinstance(a, Tensor) and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)
    )

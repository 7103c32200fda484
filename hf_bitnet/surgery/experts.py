"""Fused experts of transformers made into separate linear layers, and fused again. Own.

Known is what `use_experts_implementation` of transformers marks, which says how the weights are laid out; experts of another
make stay as they are. All of a model's are separated or none, because files hold one form or the other.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import MergeModulelist, WeightConverter

from ..modules import BitExperts, QuantizedLayer
from .places import Places

_FIRST, _DOWN = ("gate_up_proj", "up_proj"), "down_proj"
_USUAL = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",)}
_OF_EACH = re.compile(r"experts\.\*\.(\w+)\.weight$")
_FUSED = re.compile(r"(?:^|\.)experts\.(gate_up_proj|up_proj|down_proj)$")


class FusedExpertsError(ValueError):
    """A checkpoint holds experts in a form that cannot be quantized while it is loaded; afterwards it can."""


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds experts in weights whose layout we know."""
    if getattr(module, "_is_expert_parallel", True) or not hasattr(module, "is_transposed"):
        return False
    weights = {name for name, parameter in module._parameters.items() if parameter is not None}
    expected = {_first(module), _DOWN}
    if module.has_bias:
        expected |= {f"{name}_bias" for name in expected}
    return weights == expected and all(
        parameter is None or parameter.dim() == 3 - name.endswith("_bias") for name, parameter in module._parameters.items()
    )


def _first(module: Any) -> str:
    return _FIRST[0] if module.has_gate else _FIRST[1]


@contextmanager
def separate_experts(model: nn.Module) -> Iterator[None]:
    """Inside, the fused experts of the model are separate linear layers that share memory with the fused weights.

    Afterwards they own their memory, if one of them was quantized; else, and after an error, they are what they were. Weights
    that are tied to others stay fused.
    """
    found = [module for module in model.modules() if is_fused(module)]
    if not found:
        yield
        return
    names = _names_on_disk(model) or _USUAL
    uses = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    made = [
        (fused, _separated(fused, names))
        for fused in found
        if all(uses[id(parameter)] == 1 for parameter in fused.parameters(recurse=False))
    ]
    places = Places(model)
    for fused, separate in made:
        places.put(fused, separate)
    stays = False
    try:
        yield
        stays = any(isinstance(each, QuantizedLayer) for _, separate in made for each in separate.modules())
    finally:
        if stays:
            for fused, separate in made:
                _own(fused, separate)
        else:
            places = Places(model)
            for fused, separate in made:
                places.put(separate, fused)


def _separated(fused: Any, names: dict[str, tuple[str, ...]]) -> BitExperts:
    linears: list[dict[str, nn.Module]] = [{} for _ in range(fused._parameters[_DOWN].shape[0])]
    for weight_name in (_first(fused), _DOWN):
        weight, bias = fused._parameters[weight_name], fused._parameters.get(f"{weight_name}_bias")
        for number, found in enumerate(linears):
            matrix = weight.detach()[number]
            matrices = _parts(fused, weight_name, matrix.t() if fused.is_transposed else matrix)
            biases = _parts(fused, weight_name, bias.detach()[number]) if bias is not None else [None] * len(matrices)
            for name, part, offset in zip(names[weight_name], matrices, biases, strict=True):
                found[name] = _linear(part, offset, weight, bias)
    return BitExperts(fused, (*names[_first(fused)], *names[_DOWN]), linears)


def _parts(fused: Any, weight_name: str, tensor: Tensor) -> list[Tensor]:
    """Gate and up of a weight or bias of one expert, or the whole of another."""
    if weight_name != _FIRST[0]:
        return [tensor]
    return list(tensor.chunk(2)) if fused.is_concatenated else [tensor[0::2], tensor[1::2]]


def _linear(matrix: Tensor, offset: Tensor | None, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """`matrix` (out, in) and `offset` as they lie; trainable as the fused ones."""
    linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(matrix, requires_grad=weight.requires_grad)
    if offset is not None and bias is not None:
        linear.bias = nn.Parameter(offset, requires_grad=bias.requires_grad)
    return linear


def _own(fused: nn.Module, separate: BitExperts) -> None:
    """Ends the sharing of memory, and empties the fused module."""
    shared = {parameter.untyped_storage()._cdata for parameter in fused._parameters.values() if parameter is not None}
    for parameter in separate.parameters():
        if parameter.untyped_storage()._cdata in shared:
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    for name in fused._parameters:
        fused._parameters[name] = None


def fuse_experts(model: nn.Module) -> None:
    """Puts the fused modules back where all experts are plain linear layers."""
    found = [module for module in model.modules() if isinstance(module, BitExperts)]
    if not all(
        type(linear) is nn.Linear for separate in found for expert in separate.experts() for linear in expert.children()
    ):
        return
    places = Places(model)
    for separate in found:
        places.put(separate, _fused(separate))


@torch.no_grad()
def _fused(separate: BitExperts) -> nn.Module:
    fused = separate.fused
    first, down = separate.names[:-1], separate.names[-1:]
    for weight_name, names in ((_first(fused), first), (_DOWN, down)):
        for key in ("weight", "bias") if fused.has_bias else ("weight",):
            parts = [[getattr(getattr(expert, name), key) for name in names] for expert in separate.experts()]
            whole = torch.stack([_joined(fused, each) for each in parts])
            if key == "weight" and fused.is_transposed:
                whole = whole.transpose(1, 2).contiguous()
            name = weight_name if key == "weight" else f"{weight_name}_bias"
            fused._parameters[name] = nn.Parameter(whole, requires_grad=parts[0][0].requires_grad)
    return fused.train(separate.training)


def _joined(fused: Any, parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if fused.is_concatenated else torch.stack(parts, dim=1).flatten(0, 1)


def _names_on_disk(model: nn.Module) -> dict[str, tuple[str, ...]] | None:
    """Fused weight -> names of an expert's maps in the model's checkpoints; None where those are fused, too, or unknown."""
    if not hasattr(model, "base_model_prefix"):  # no model of transformers, which may be importing us just now
        return None
    found: dict[str, tuple[str, ...]] = {}
    for each in get_model_conversion_mapping(model, add_legacy=False):  # type: ignore[arg-type]
        target = fused_weight(each)
        if target is None or not any(isinstance(operation, MergeModulelist) for operation in getattr(each, "operations", ())):
            continue
        names = [_OF_EACH.search(source) for source in each._original_source_patterns]
        if not all(names) or len(names) != len(_USUAL[target]):
            return None
        found[target] = tuple(name[1] for name in names if name is not None)
    return {**_USUAL, **found} if _DOWN in found else None


def fused_weight(conversion: Any) -> str | None:
    """The fused weight that a conversion of transformers makes while a checkpoint is loaded, or None."""
    if not isinstance(conversion, WeightConverter) or len(conversion._original_target_patterns) != 1:
        return None
    match = _FUSED.search(conversion._original_target_patterns[0].replace("\\.", "."))
    return None if match is None else match[1]


def layers_of_experts(model: nn.Module) -> set[str]:
    """Dotted names of the linear maps of separate experts."""
    return {
        f"{name}.{number}.{of}"
        for name, module in model.named_modules()
        if isinstance(module, BitExperts)
        for number in range(module.num_experts)
        for of in module.names
    }


def has_separate_experts(model: nn.Module) -> bool:
    """Whether experts of the model are separate layers, of which its checkpoints then hold each by itself."""
    return any(isinstance(module, BitExperts) for module in model.modules())


def separates_what_files_hold_fused(model: nn.Module) -> bool:
    """Whether experts of the model are separate layers, and its plain checkpoints hold them in fused weights."""
    return has_separate_experts(model) and _names_on_disk(model) is None

"""A model as it is without peft's adapters: its modules by the names that they have in files. Own.

peft puts a layer into another one (`q_proj` becomes `q_proj.base_layer`, beside `q_proj.lora_A`), and the whole model into
`base_model.model`. What is written into a config has to hold for the model that is left when the adapters are merged or gone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

# where the model's own module is: in a layer with adapters, a module that is trained and saved with them, a table with trained
# tokens
_INSIDE = (("base_layer", None), ("original_module", "modules_to_save"), ("token_adapter", None))


def own_modules(model: nn.Module, *, every_name: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` without adapters, and without their names in the names.

    Args:
        every_name: a module that stands in several places is there by each of its names.
    """
    yield from _walk(base_of(model), "", None if every_name else set())


def base_of(model: nn.Module) -> nn.Module:
    """The model that peft's model is made of; any other is its own."""
    whole: Any = model
    return whole.get_base_model() if "base_model" in model._modules and hasattr(model, "get_base_model") else model


def own_names(model: nn.Module) -> dict[int, str]:
    """id of a module -> its name without adapters; adapters are not there, and trained copies have the name of the original."""
    names = {id(module): name for name, module in own_modules(model)}
    for module in model.modules():
        copies = module._modules.get("modules_to_save") if "original_module" in module._modules else None
        if copies is not None:
            name = names[id(without_adapter(module))]
            for copied in copies.children():
                names |= {id(each): f"{name}.{inner}" if inner else name for inner, each in copied.named_modules()}
    return names


def without_adapter(module: nn.Module) -> nn.Module:
    """The model's own module in one that peft put in its place; any other is itself."""
    for inside, beside in _INSIDE:
        own = module._modules.get(inside)
        if own is not None and (beside is None or beside in module._modules):
            return without_adapter(own)
    return module


def has_adapters(model: nn.Module) -> bool:
    """Whether a layer of the model has one."""
    return any("base_layer" in module._modules for module in model.modules())


def _walk(module: nn.Module, name: str, seen: set[int] | None) -> Iterator[tuple[str, nn.Module]]:
    module = without_adapter(module)
    if seen is not None:
        if id(module) in seen:
            return
        seen.add(id(module))
    yield name, module
    for key, child in module._modules.items():
        if child is not None:
            yield from _walk(child, f"{name}.{key}" if name else key, seen)

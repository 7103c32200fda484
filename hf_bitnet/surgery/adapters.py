"""A model as it is without peft's adapters: its modules by the names that they have in files. Own.

peft puts a layer into another one (`q_proj` becomes `q_proj.base_layer`, beside `q_proj.lora_A`), and the whole model into
`base_model.model`. What is written into a config has to hold for the model that is left when the adapters are merged or gone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

# of a layer with adapters, and of a module that is trained and saved with them: where the model's own one is
_INSIDE = (("base_layer", None), ("original_module", "modules_to_save"))


def own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` without adapters, and without their names in the names."""
    whole: Any = model
    if "base_model" in model._modules and hasattr(model, "get_base_model"):
        whole = whole.get_base_model()
    yield from _walk(whole, "", set())


def own_names(model: nn.Module) -> dict[int, str]:
    """id of a module -> its name without adapters; those of adapters are not there."""
    return {id(module): name for name, module in own_modules(model)}


def has_adapters(model: nn.Module) -> bool:
    """Whether a layer of the model has one."""
    return any("base_layer" in module._modules for module in model.modules())


def _walk(module: nn.Module, name: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    for inside, beside in _INSIDE:
        own = module._modules.get(inside)
        if own is not None and (beside is None or beside in module._modules):
            yield from _walk(own, name, seen)
            return
    if id(module) in seen:
        return
    seen.add(id(module))
    yield name, module
    for key, child in module._modules.items():
        if child is not None:
            yield from _walk(child, f"{name}.{key}" if name else key, seen)

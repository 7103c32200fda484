"""Where the modules of a model hang. Own."""

from __future__ import annotations

from torch import nn


class Places:
    """Every place of every module, found in one walk, so that replacing all layers takes linear time.

    What hangs in the new modules is not known here: a module that is still to be replaced must not be moved into one.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._of: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
        for parent in model.modules():
            for name, child in parent._modules.items():
                if child is not None:
                    self._of.setdefault(child, []).append((parent, name))

    def put(self, old: nn.Module, new: nn.Module) -> None:
        """Puts `new` wherever `old` hangs, which may be in several places.

        Raises ValueError for the model itself, which hangs nowhere.
        """
        check_inside(old, self._model)
        for parent, name in self._of.pop(old, ()):
            parent._modules[name] = new


def check_inside(module: nn.Module, model: nn.Module) -> None:
    """Raises ValueError when the module to be replaced is the whole model."""
    if module is model:
        raise ValueError(
            f"the model is itself a {type(model).__name__}, which cannot be replaced in place; wrap it: "
            "quantize_model(nn.Sequential(layer), config)"
        )

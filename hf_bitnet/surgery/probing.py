"""Forward passes that only measure. Nothing of the model, its modes or the random state is different afterwards. Own.

Leaves out: what is measured (calibration, analysis).
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..modules import TrainedLayer
from ..quantizers import ACTIVATION_SCHEMES
from .walk import quantized_layers, trained_layers, trained_tables

# below this many batches a progress bar only flickers
_PROGRESS_FROM = 16


@contextlib.contextmanager
def probing(model: nn.Module, *, quantized: bool | None = True) -> Iterator[None]:
    """Evaluation mode without gradient; restores modes, layer switches and random state, even after an error.

    Args:
        quantized: True for the fully quantized model, whatever its strength is. False for full precision: layers in train
            form are bypassed, packed ones keep their codes and leave their input as it is. None for the model as it is.
    """
    modes = [(module, module.training) for module in model.modules()]
    switched = [*(layer for _, layer in trained_layers(model)), *trained_tables(model)]
    trained = [(layer, layer.relaxed, layer.bypassed) for layer in switched]
    packed = [(layer, layer.activation) for _, layer in quantized_layers(model) if not isinstance(layer, TrainedLayer)]
    random_state = _random_state()
    try:
        for module, _ in modes:  # model.eval() would run overridden train() methods, some of which merge weights
            module.training = False
        for layer, _, _ in trained if quantized is not None else ():
            layer.relaxed, layer.bypassed = False, not quantized
        for layer, activation in packed:
            layer.activation = activation if quantized in (True, None) else ACTIVATION_SCHEMES.get("none")
        with torch.no_grad(), _eager():
            yield
    finally:
        for module, training in modes:
            module.training = training
        for layer, relaxed, bypassed in trained:
            layer.relaxed, layer.bypassed = relaxed, bypassed
        for layer, activation in packed:
            layer.activation = activation
        _restore_random_state(random_state)


def each_batch(
    model: nn.Module, batches: Iterable[Any], what: str, *, max_batches: int | None = None, progress: bool | None = None
) -> Iterator[Any]:
    """The batches, on the model's device, with a progress bar.

    Args:
        batches: dicts of arguments, tuples of them, or single tensors; a DataLoader is fine.
        what: name of the caller, for errors and the bar.
        progress: None shows a bar on long work.

    Raises:
        TypeError: `batches` is one batch, or nothing that can be iterated; a batch is a text.
        ValueError: there is no batch; `max_batches` is not a positive whole number.
    """
    if isinstance(batches, Mapping | Tensor | str) or not isinstance(batches, Iterable):
        raise TypeError(
            f"{what} takes a collection of batches, got {type(batches).__name__}; for one batch write {what}(model, [batch])"
        )
    if max_batches is not None and (isinstance(max_batches, bool) or not isinstance(max_batches, int) or max_batches < 1):
        raise ValueError(f"max_batches must be a positive whole number or None, got {max_batches!r}; try max_batches=32")
    total = len(batches) if hasattr(batches, "__len__") else None  # type: ignore[arg-type]
    total = max_batches if total is None else min(total, max_batches or total)
    show = (total is None or total >= _PROGRESS_FROM) if progress is None else progress
    device = next((tensor.device for tensor in model.parameters() if not tensor.is_meta), torch.device("cpu"))
    empty = True
    for batch in tqdm(islice(batches, max_batches), desc=what, unit="batch", total=total, disable=not show, leave=False):
        empty = False
        if any(isinstance(each, str) for each in (batch if isinstance(batch, tuple | list) else [batch])):
            raise TypeError(
                f"{what} takes batches of tensors, and got the text {str(batch)[:40]!r}; for example "
                f"{what}(model, [tokenizer('some text', return_tensors='pt')])"
            )
        yield _moved(batch, device)
    if empty:
        raise ValueError(
            f"{what} got no batch (an iterator that was read before is empty); pass a list or a DataLoader, for example "
            f"{what}(model, [tokenizer('some text', return_tensors='pt')])"
        )


def run(model: nn.Module, batch: Any) -> Any:
    """The model's output for a dict of arguments, a tuple or list of them, or one argument."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, tuple | list):
        moved = [_moved(item, device) for item in value]
        return moved if isinstance(value, list) else tuple(moved)
    return value


def _eager() -> contextlib.AbstractContextManager[Any]:
    """Compiled models run uncompiled: each switch and each hook would be a compilation of its own."""
    # importing dynamo takes seconds, and without it nothing is compiled
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()


def _random_state() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def _restore_random_state(state: tuple[Any, ...]) -> None:
    python, numpy, cpu, cuda = state
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)

"""fit_weights: quantized weights whose outputs are nearest to the full-precision model's, before training or instead of it.

The model is walked from its inputs to its outputs (`walk.py`). Each layer sees the inputs that the layers before it, already
quantized, really produce, and gets the codes and scales that bring its output nearest to the full-precision model's
(`layer_fit.py`, `gptq.py`). Its float weights are then set so that the first training step starts from exactly these codes and
scales (`quantizers/latents.py`). The order is that of GPTQ (arXiv 2210.17323).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..modules import TrainedLayer
from ..reports import described
from ..surgery import check_calibrated, check_finite, each_batch, probing, quantized_layers, trained_layers
from .fit_report import FitReport, FitRow
from .layer_fit import METHODS, FitOptions, Outcome, fit_layer
from .moments import Moments
from .walk import Stage, Walk

# a wider grid loses next to nothing by rounding, and the sweep of least squares does not serve it
_WIDEST_GRID = 16
# below this many layers a progress bar only flickers
_PROGRESS_FROM = 16


def fit_weights(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    method: str = "gptq",
    damping: float = 0.1,
    sweeps: int = 6,
    activations: bool = True,
    max_batches: int | None = None,
    progress: bool | None = None,
) -> FitReport:
    """Changes the weights of all layers in train form, in place, so that they quantize well, and reports on each layer.

    Run it once after `quantize_model` (and `calibrate`, where there are static ranges), before training or packing. The float
    weights are afterwards those of the fit, not of the original model: make a teacher first. Layers of more than 4 bits, and
    layers that share their weight with another module, are left as they are. The same batches give the same result. Should it
    be interrupted, or fail behind the checks, the layers fitted so far stay fitted.

    It holds the batches' hidden states, one block's inputs in full precision, and one input's Hessian at a time. Models without
    a list of blocks that hand on their outputs are run as a whole for each layer, which is slower.

    Args:
        model: quantized, in train form; its present strength does not matter.
        batches: dicts of arguments, tuples of them, or single tensors; 64 to 128 windows of typical text are enough. Padding
            that an `attention_mask` (batch, tokens) names does not count; in encoder-decoder models that of the decoder does
            unless there is a `decoder_attention_mask`. "least_squares" does without batches; with them, weights count by the
            mean square of their input.
        method: "gptq" or "least_squares", see `layer_fit.py`.
        damping: share of the mean input power that is added to every input's. More trusts the batches less.
        sweeps: how often each code is chosen again, given all others, after "gptq".
        activations: False fits as if inputs were not quantized.
        max_batches: read no more than these.
        progress: show a progress bar; None shows one on long work.

    Returns:
        One row a layer: output error with plain rounding and after the fit, share of the codes that differ. `str()` is a table,
        `to_svg()` a chart.

    Raises:
        TypeError: `batches` is not a collection of batches.
        ValueError: no layer in train form; unknown method or option out of range; no batch; a weight or an input that is NaN or
            infinite, a layer that no batch reached, a static range that was never calibrated (these name the layer).
            Experts that no token reached are fitted to their weights alone.
    """
    METHODS.get(method)
    if batches is None and method != "least_squares":
        raise ValueError(
            f"method={method!r} needs inputs to measure on: fit_weights(model, batches), with some dozens of typical ones; "
            "without any, method='least_squares'"
        )
    fit = _Fit(model, _layers(model), method, _options(damping, sweeps, activations))
    with probing(model, quantized=False), fit.progress(progress):
        if batches is None:
            fit.stage(fit.layers, None)
        else:
            for name, layer in fit.layers.items():
                check_calibrated(name, layer)
            with _without_cache(model):
                found = list(each_batch(model, batches, "fit_weights", max_batches=max_batches, progress=False))
                walk = Walk(model, fit.layers, found, activations)
                walk.trace()
                walk.fit(fit.stage)
    return fit.report()


class _Fit:
    """The layers of a model, and what became of those that were fitted so far."""

    def __init__(self, model: nn.Module, layers: dict[str, TrainedLayer], method: str, options: FitOptions) -> None:
        self.layers, self.method, self.options = layers, method, options
        self.outcomes = {name: Outcome(None, None, 0.0, note) for name, note in _left(model, layers).items()}
        self.bar: Any = None

    @contextlib.contextmanager
    def progress(self, show: bool | None) -> Iterator[None]:
        total = len(self.layers) - len(self.outcomes)
        show = total >= _PROGRESS_FROM if show is None else show
        with tqdm(total=total, desc="fit_weights", unit="layer", disable=not show, leave=False) as self.bar:
            yield

    def stage(self, stage: Stage, moments: Moments | None) -> None:
        """Fits layers that read the same input (any layers, without moments); they are quantized from then on."""
        for name, layer in stage.items():
            if name not in self.outcomes:
                if moments is not None and not bool(torch.isfinite(moments.hessian).all()):
                    raise ValueError(
                        f"fit_weights: the input of {name} overflows once the layers before it are quantized, so the model is "
                        "only partly fitted; load it again and fit it in float32 or bfloat16"
                    )
                self.outcomes[name] = self._fitted(name, layer, moments)
                layer.fitted = True
                self.bar.update()
            layer.bypassed = False

    def _fitted(self, name: str, layer: TrainedLayer, moments: Moments | None) -> Outcome:
        if moments is None or moments.tokens:
            return fit_layer(name, layer, moments, self.method, self.options)
        # of experts: routes may also change once the layers before them are quantized
        outcome = fit_layer(name, layer, None, "least_squares", self.options)
        return outcome._replace(note="no token came here: fitted to its weights")

    def report(self) -> FitReport:
        rows = (FitRow(**described(name, layer), **self.outcomes[name]._asdict()) for name, layer in self.layers.items())
        return FitReport(rows)


def _layers(model: nn.Module) -> dict[str, TrainedLayer]:
    """Every layer in train form, checked."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"fit_weights takes an nn.Module, got {type(model).__name__}; pass the quantized model itself")
    layers = dict(trained_layers(model))
    if not layers:
        packed = next(quantized_layers(model), None) is not None
        advice = "the model is packed, and its full-precision weights are gone; fit before pack_model(model)"
        raise ValueError(
            f"fit_weights: {advice}"
            if packed
            else f"fit_weights: {type(model).__name__} has no layer in train form; call quantize_model(model, config) first"
        )
    for name, layer in layers.items():
        if layer.weight.is_meta:
            raise ValueError(
                f"fit_weights: the weight of {name} is not loaded (meta device); load the model without offloading"
            )
        check_finite(name, layer.weight)
    return layers


def _left(model: nn.Module, layers: dict[str, TrainedLayer]) -> dict[str, str]:
    """Layers that are not fitted, and why."""
    uses = Counter(id(weight) for module in model.modules() for weight in module._parameters.values() if weight is not None)
    left = {}
    for name, layer in layers.items():
        if layer.quantizer.grid.levels > _WIDEST_GRID:
            left[name] = f"{layer.quantizer.bits:g} bits lose nothing"
        elif uses[id(layer.weight)] > 1:
            left[name] = "shares its weight"
    return left


def _options(damping: float, sweeps: int, activations: bool) -> FitOptions:
    if isinstance(damping, bool) or not isinstance(damping, int | float) or not 0.0 < damping < float("inf"):
        raise ValueError(f"damping must be a number above 0, got {damping!r}; try damping=0.1")
    if isinstance(sweeps, bool) or not isinstance(sweeps, int) or sweeps < 0:
        raise ValueError(f"sweeps must be a whole number of at least 0, got {sweeps!r}; try sweeps=6")
    if not isinstance(activations, bool):
        raise TypeError(f"activations must be True or False, got {activations!r}; False fits for inputs that are not quantized")
    return FitOptions(float(damping), sweeps)


@contextlib.contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Inside, a language model keeps no keys and values."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None}
    used = [config for config in configs.values() if getattr(config, "use_cache", None)]
    for config in used:
        config.use_cache = False
    try:
        yield
    finally:
        for config in used:
            config.use_cache = True

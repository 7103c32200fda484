"""calibrate: activation ranges and the gains of inserted norms, from a few batches. Own.

The model runs in full precision while it is watched, so that a layer's range does not depend on layers that are not yet
calibrated. A norm inserted in front of a layer (`modules.SubNorm`) gets the gain with which it replaces the identity best
in the least-squares sense, per channel and over all tokens:

    gain = E[x n] / E[n^2],   n = x / rms(x)

Its blend stays where it is (0: the identity), so the function of the model is unchanged until training moves it.

Leaves out: padding (padded positions count like others), distributed statistics (calibrate before wrapping the model).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..modules import QuantizedLayer, SubNorm
from ..quantizers.activation import SMALLEST_RANGE
from ..surgery import each_batch, has_separate_experts, probing, quantized_layers, run
from .observers import OBSERVERS, Observer, ObserverOptions

Model = TypeVar("Model", bound=nn.Module)


def calibrate(
    model: Model,
    batches: Iterable[Any],
    *,
    method: str = "percentile",
    percentile: float = 99.9,
    momentum: float = 0.99,
    max_batches: int | None = None,
    progress: bool | None = None,
) -> Model:
    """Sets the range of every static activation and the gain of every sub-norm, in place, and returns the model.

    Run it once after `quantize_model`, before training or packing. The gain of a norm whose blend has left 0 is in use
    and stays as it is; only ranges are then found anew.

    Args:
        model: quantized, in train or packed form.
        batches: dicts of arguments, tuples of them, or single tensors, for example a DataLoader. They are read twice
            where a model has both static ranges and sub-norms. Some dozens of typical inputs are enough.
        method: "percentile" or "ema", see `observers.py`.
        percentile: per cent of the magnitudes inside the range, for "percentile".
        momentum: of the moving average over batches, for "ema".
        max_batches: read no more than these.
        progress: show a progress bar; None shows one on long work.

    Raises:
        TypeError: `batches` is not a collection of batches.
        ValueError: nothing to calibrate; no batch; unknown method or option out of range; an activation is NaN or
            infinite, or a layer was never reached (both name the layer; no range is then set).
    """
    kind, options = OBSERVERS.get(method), ObserverOptions(percentile, momentum)
    layers = list(quantized_layers(model))
    ranges = {name: Range(layer, kind(options)) for name, layer in layers if layer.activation.static}
    gains = {name: Gain(layer, norm) for name, layer, norm in _fresh_norms(layers)}
    if not ranges and not gains:
        raise ValueError(_nothing_to_do(model, layers))
    if ranges and gains and isinstance(batches, Iterator):
        batches = list(each_batch(model, batches, "calibrate", max_batches=max_batches, progress=False))
    with probing(model, quantized=False):
        # gains first: the range of a layer behind a norm depends on them
        for statistics in (gains, ranges):
            if statistics:
                _watch(model, each_batch(model, batches, "calibrate", max_batches=max_batches, progress=progress), statistics)
                for statistic in statistics.values():
                    statistic.apply()
    return model


class Statistic(Protocol):
    """What is gathered from the input of one layer.

    Attributes:
        layer: the layer. seen: how many tensors reached it.
    """

    layer: QuantizedLayer
    seen: int

    def update(self, x: Tensor) -> Tensor:
        """Takes in one input (..., in_features); returns a 0-dim tensor that is NaN or infinite if the input was."""
        ...

    def apply(self) -> None:
        """Writes the result into the layer."""
        ...


class Range:
    """The range of what a layer quantizes, into `act_scale`."""

    def __init__(self, layer: QuantizedLayer, observer: Observer) -> None:
        self.layer, self.observer, self.seen = layer, observer, 0
        self.largest_code = 2 ** (layer.activation.bits - 1) - 1

    def update(self, x: Tensor) -> Tensor:
        norm = self.layer.sub_norm
        magnitude = x.float().abs()
        if norm is not None:
            # training moves the blend from where it is to 1; a range for both ends holds for every mix between
            magnitude = torch.maximum(norm(x).float().abs(), (norm.normalized(x) * norm.weight).float().abs())
        peak = magnitude.amax()
        self.observer.update(magnitude, peak)
        return peak

    def scale(self) -> Tensor:
        """0-dim float32, what `act_scale` should be after what was seen."""
        return self.observer.range().clamp(min=SMALLEST_RANGE) / self.largest_code

    def apply(self) -> None:
        assert self.layer.act_scale is not None
        self.layer.act_scale.copy_(self.scale())


class Gain:
    """The gain of a sub-norm that is still the identity; the sums are float32, each over one batch."""

    def __init__(self, layer: QuantizedLayer, norm: SubNorm) -> None:
        self.layer, self.norm, self.seen = layer, norm, 0
        self.sums = torch.zeros(2, layer.in_features, device=norm.weight.device)

    def update(self, x: Tensor) -> Tensor:
        x = x.detach().reshape(-1, x.shape[-1]).float()
        n = self.norm.normalized(x)
        sums = torch.stack([(x * n).sum(dim=0), n.square().sum(dim=0)])
        self.sums += sums.to(self.sums.device)
        return sums.abs().amax()

    def apply(self) -> None:
        xn, square = self.sums
        smallest = torch.finfo(torch.float32).tiny
        # a channel that was silent takes the gain of the whole, and an all-zero input leaves the norm alone
        whole = torch.where(square.sum() > 0, xn.sum() / square.sum().clamp(min=smallest), torch.ones_like(xn[0]))
        self.norm.weight.copy_(torch.where(square > 0, xn / square.clamp(min=smallest), whole))


def _fresh_norms(layers: list[tuple[str, QuantizedLayer]]) -> list[tuple[str, QuantizedLayer, SubNorm]]:
    normed = [(name, layer, layer.sub_norm) for name, layer in layers if layer.sub_norm is not None]
    return [(name, layer, norm) for name, layer, norm in normed if float(norm.blend) == 0.0]


def _watch(model: nn.Module, batches: Iterator[Any], statistics: Mapping[str, Statistic]) -> None:
    """Runs the batches with a hook on each layer. One host synchronization a batch."""
    witnesses: list[tuple[str, Tensor]] = []
    hooks = [_hook(name, statistic, witnesses) for name, statistic in statistics.items()]
    try:
        for number, batch in enumerate(batches, start=1):
            witnesses.clear()
            run(model, batch)
            _check_finite(witnesses, number)
    finally:
        for hook in hooks:
            hook.remove()
    missed = [name for name, statistic in statistics.items() if not statistic.seen]
    if missed:
        rare = " (experts without a token have no range; activation='int8' needs none)" if has_separate_experts(model) else ""
        raise ValueError(
            f"calibrate: no batch reached {', '.join(missed[:5])}{' and others' if len(missed) > 5 else ''}; pass batches "
            f"that use every layer, or keep it in full precision: keep=[r'{missed[0]}']{rare}"
        )


def _hook(name: str, statistic: Statistic, witnesses: list[tuple[str, Tensor]]) -> Any:
    def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        if x.numel():
            statistic.seen += 1
            witnesses.append((name, statistic.update(x.detach())))

    return statistic.layer.register_forward_pre_hook(observe, with_kwargs=True)


def _check_finite(witnesses: list[tuple[str, Tensor]], number: int) -> None:
    if not witnesses:
        return
    values = torch.stack([value.float().to(witnesses[0][1].device) for _, value in witnesses])
    finite = torch.isfinite(values).tolist()
    if not all(finite):
        name = witnesses[finite.index(False)][0]
        raise ValueError(
            f"calibrate: the input of {name} is NaN or infinite in batch {number}; look at that batch and at the weights "
            "before this layer (float16 overflows where bfloat16 does not: model.to(torch.bfloat16))"
        )


def _nothing_to_do(model: nn.Module, layers: list[tuple[str, QuantizedLayer]]) -> str:
    if not layers:
        return f"calibrate: {type(model).__name__} has no quantized layer; call quantize_model(model, config) first"
    used = any(layer.sub_norm is not None for _, layer in layers)
    return (
        "calibrate: no layer has a static activation range or a sub-norm"
        + (" whose blend is still 0" if used else "")
        + ", so there is nothing to calibrate; ask for them with BitNetQuantizationConfig(activation='int8_static') or "
        "BitNetQuantizationConfig(sub_norm=[r'o_proj', r'down_proj'])"
    )

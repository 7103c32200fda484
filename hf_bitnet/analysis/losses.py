"""sensitivity: how much the loss grows when one layer alone is quantized and all others are in full precision. Own.

Costs one forward a layer and batch; a few batches are enough to rank layers. Increases of single layers do not add up to
that of the whole model, which is reported beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..reports import Column, LayerRow, Report, described
from ..surgery import each_batch, kept_codes, probing, run
from .outputs import layers_in_train_form

Loss = Callable[[Any, Any], Tensor | float]
# below this many layers a progress bar only flickers
_PROGRESS_FROM = 16


@dataclass(frozen=True)
class SensitivityRow(LayerRow):
    """One layer.

    Attributes:
        loss: with only this layer quantized. increase: that minus the loss in full precision.
    """

    loss: float
    increase: float


class SensitivityReport(Report[SensitivityRow]):
    """Rows, worst first.

    Attributes:
        measure: what the loss is. full_precision, quantized: the loss with no and with every layer quantized.
    """

    title = "Sensitivity by layer"
    explanation = "Increase of the loss when only this layer is quantized"
    ranked_by = "increase"
    columns = (Column("loss", "loss", "{:.5f}".format), Column("increase", "increase", "{:+.5f}".format))

    def __init__(self, rows: list[SensitivityRow], measure: str, full_precision: float, quantized: float) -> None:
        super().__init__(rows)
        self.rows = self.worst()
        self.measure, self.full_precision, self.quantized = measure, full_precision, quantized

    def summary(self) -> str:
        return (
            f"{super().summary()}; {self.measure}: {self.full_precision:.5g} in full precision, "
            f"{self.quantized:.5g} with every layer quantized"
        )

    def to_dict(self) -> dict[str, Any]:
        whole = {"measure": self.measure, "full_precision": self.full_precision, "quantized": self.quantized}
        return {**whole, **super().to_dict()}


def sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None = None,
    *,
    max_batches: int | None = None,
    progress: bool | None = None,
) -> SensitivityReport:
    """The loss increase of every layer in train form, worst first. Nothing of the model changes.

    Args:
        model: quantized, in train form; its present strength does not matter.
        batches: dicts of arguments, tuples of them, or single tensors; each batch counts equally.
        loss: function of (output, batch). None takes what the outputs offer: their own `loss` (give the batches labels);
            else the KL divergence from the full-precision logits; else the relative squared error of the first output.
        max_batches: read no more than these.
        progress: show a progress bar; None shows one on long work.

    Raises:
        TypeError: `batches` is not a collection of batches.
        ValueError: no layer in train form; a static range that was never calibrated; no batch.
    """
    layers = layers_in_train_form(model, "sensitivity")
    show = len(layers) >= _PROGRESS_FROM if progress is None else progress
    measure = None if loss is None else _Measure("loss", lambda output, _, batch: torch.as_tensor(loss(output, batch)))
    total: Tensor | None = None
    number = 0
    with probing(model, quantized=False), kept_codes(model):
        for batch in each_batch(model, batches, "sensitivity", max_batches=max_batches, progress=False):
            exact = run(model, batch)
            measure = measure or _offered(exact)
            losses = [measure.of(exact, exact, batch)]
            for _, layer in tqdm(layers, desc=f"sensitivity, batch {number + 1}", unit="layer", disable=not show, leave=False):
                layer.bypassed = False
                losses.append(measure.of(run(model, batch), exact, batch))
                layer.bypassed = True
            for _, layer in layers:
                layer.bypassed = False
            losses.append(measure.of(run(model, batch), exact, batch))
            for _, layer in layers:
                layer.bypassed = True
            values = torch.stack([value.detach().float() for value in losses])
            total = values if total is None else total + values
            number += 1
    assert total is not None and measure is not None
    full_precision, *alone, quantized = (total / number).tolist()
    rows = [
        SensitivityRow(**described(name, layer), loss=value, increase=value - full_precision)
        for (name, layer), value in zip(layers, alone, strict=True)
    ]
    return SensitivityReport(rows, measure.name, full_precision, quantized)


@dataclass(frozen=True)
class _Measure:
    """A name, and a function of (output, the full-precision output, batch) that gives a 0-dim tensor."""

    name: str
    of: Callable[[Any, Any, Any], Tensor]


def _offered(output: Any) -> _Measure:
    if getattr(output, "loss", None) is not None:
        return _Measure("loss of the model", lambda output, exact, batch: output.loss)
    if getattr(output, "logits", None) is not None:
        return _Measure("KL divergence from full precision", _divergence)
    return _Measure("relative squared error of the output", _relative_error)


def _divergence(output: Any, exact: Any, batch: Any) -> Tensor:
    """Mean over positions of KL(exact || output), those under the attention mask left out."""
    log_p, log_q = exact.logits.float().log_softmax(dim=-1), output.logits.float().log_softmax(dim=-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.shape != kl.shape:
        return kl.mean()
    return (kl * mask).sum() / mask.sum().clamp(min=1)


def _relative_error(output: Any, exact: Any, batch: Any) -> Tensor:
    y, truth = _first(output).float(), _first(exact).float()
    return (y - truth).square().sum() / truth.square().sum().clamp(min=torch.finfo(torch.float32).tiny)


def _first(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
    return output

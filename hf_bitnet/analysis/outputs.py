"""output_report: how far each layer's output is from its own full-precision product on the inputs it really gets. Own.

The quantized model runs; behind each layer its inputs are multiplied again in float32, once in full precision and once with
only the weight quantized, so that the error is told apart into the weight's share and the activation's. Errors that come in
with the inputs do not count against a layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import TrainedLayer
from ..reports import Column, LayerRow, Report, described, percent
from ..surgery import check_calibrated, each_batch, kept_codes, probing, run, trained_layers


@dataclass(frozen=True)
class OutputRow(LayerRow):
    """Relative output errors of one layer, ||difference|| / ||y||, with y the full-precision product without its bias.

    Attributes:
        error: of the layer. weight_error: with the weight alone quantized. activation_error: what quantizing the input
            adds to that. All None when no input reached the layer.
    """

    error: float | None
    weight_error: float | None
    activation_error: float | None


class OutputReport(Report[OutputRow]):
    """Rows, worst first; layers that were not reached come last."""

    title = "Output error by layer"
    explanation = "‖quantized − full precision‖ / ‖full precision‖ on the same inputs"
    ranked_by = "error"
    columns = (
        Column("error", "error", percent),
        Column("by weight", "weight_error", percent),
        Column("by input", "activation_error", percent),
    )

    @staticmethod
    def tick_text(value: float) -> str:
        return f"{100 * value:g} %"

    def __init__(self, rows: Iterable[OutputRow]) -> None:
        super().__init__(rows)
        self.rows = [*self.worst(), *(row for row in self.rows if row.error is None)]


def output_report(
    model: nn.Module, batches: Iterable[Any], *, max_batches: int | None = None, progress: bool | None = None
) -> OutputReport:
    """The output error of every layer in train form, in one pass over the batches. Nothing of the model changes.

    Args:
        model: quantized, in train form; its present strength does not matter, it is measured fully quantized.
        batches: dicts of arguments, tuples of them, or single tensors.
        max_batches: read no more than these.
        progress: show a progress bar; None shows one on long work.

    Raises:
        TypeError: `batches` is not a collection of batches.
        ValueError: no layer in train form; a static range that was never calibrated; no batch.
    """
    layers = layers_in_train_form(model, "output_report")
    probes = {name: _Probe(layer) for name, layer in layers}
    with probing(model), kept_codes(model):
        hooks = [probe.layer.register_forward_hook(probe, with_kwargs=True) for probe in probes.values()]
        try:
            for batch in each_batch(model, batches, "output_report", max_batches=max_batches, progress=progress):
                run(model, batch)
        finally:
            for hook in hooks:
                hook.remove()
    device = layers[0][1].weight.device
    squares = torch.stack([probe.squares.to(device) for probe in probes.values()]).tolist()
    measured = zip(layers, squares, strict=True)
    return OutputReport(OutputRow(**described(name, layer), **_errors(values)) for (name, layer), values in measured)


def layers_in_train_form(model: nn.Module, caller: str) -> list[tuple[str, TrainedLayer]]:
    """The layers to measure. Raises ValueError when there is none, or when one is not calibrated."""
    layers = trained_layers(model)
    if not layers:
        raise ValueError(
            f"{caller} compares with float weights, and {type(model).__name__} has no layer in train form; call "
            "quantize_model(model, config) first, or unpack_model(model) on a packed model"
        )
    for name, layer in layers:
        check_calibrated(name, layer)
    return layers


class _Probe:
    """A forward hook that sums squares: of the product, and of the three differences. float32 (4,)."""

    def __init__(self, layer: TrainedLayer) -> None:
        self.layer = layer
        self.squares = torch.zeros(4, device=layer.weight.device)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        layer = self.layer
        x = args[0] if args else kwargs["input"]
        x = x if layer.sub_norm is None else layer.sub_norm(x)
        x = x.reshape(-1, x.shape[-1]).float()
        y, by_weight = x @ layer.matrix.float().t(), x @ layer.quantized_weight().dequantize().t()
        output = output.reshape(-1, output.shape[-1]).float()
        output = output if layer.bias is None else output - layer.bias.float()
        parts = [y, output - y, by_weight - y, output - by_weight]
        self.squares += torch.stack([part.square().sum() for part in parts])


def _errors(squares: list[float]) -> dict[str, Any]:
    signal, *errors = squares
    names = ("error", "weight_error", "activation_error")
    if signal == 0.0:
        return dict.fromkeys(names)
    return {name: (value / signal) ** 0.5 for name, value in zip(names, errors, strict=True)}

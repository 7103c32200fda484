"""Int8 gradients in the products of backward where they are close to the exact ones (`modules/low_precision.py`). Own.

The first time that a layer multiplies codes, for one optimizer step, both forms of its two products are computed from the same
operands and compared; the step itself takes the exact gradients. A product whose cosine is at least `min_cosine` in every
micro-batch and on every rank is int8 from the next step on, any other stays exact, and the log says which and by how much.
Nothing waits for the device but the end of such a step.

The cosines lie in each checkpoint (`qat_int8_backward.json`), so that a resumed run decides alike and goes on exactly. While
anything is measured, a compiled model runs uncompiled. Works with transformers' own Trainer too, as a callback: for adapters
on packed layers, which have only the first product.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..modules import NativeLayer, QuantizedLayer
from ..modules.low_precision import PRODUCTS, UNMEASURED, Int8Backward, Meter, legal_products
from ..surgery import quantized_layers
from .add_on import AddOn
from .gradient_cosines import NOT_FINITE, lowest_cosines, say
from .options import number, whole

_FILE = "qat_int8_backward.json"
# steps after which a layer that was not reached, or whose gradients were not finite (float16's loss scaling), stays exact
_PATIENCE = 8


@dataclass(frozen=True)
class Int8BackwardOptions:
    """Options of `QATArguments.int8_backward`.

    Attributes:
        min_cosine: lowest cosine between the int8 and the exact gradient (-1..1) with which a product is int8. Its error is
            about sqrt(2 - 2 cosine) of the gradient: 0.14 at 0.99.
        every: optimizer steps from one measurement to the next; 0 measures once.
    """

    min_cosine: float = 0.99
    every: int = 0

    def __post_init__(self) -> None:
        number("min_cosine", self.min_cosine, -1.0, 1.0, hint="it is a cosine: min_cosine=0.99")
        whole("every", self.every, lowest=0)


class Int8BackwardCallback(AddOn):
    """Measures, decides, and says what it decided.

    Attributes:
        cosines: dotted name of each layer that was decided -> product ("input", "weight") -> lowest cosine. A product that was
            not measured is missing, and exact.
    """

    def __init__(self, options: Int8BackwardOptions) -> None:
        self._options = options
        self.cosines: dict[str, dict[str, float]] = {}
        self._tries: dict[str, int] = {}
        self._measured: list[tuple[str, QuantizedLayer]] = []
        self._uncompiled = contextlib.ExitStack()

    def start(self, checkpoint: Path | None) -> None:
        path = None if checkpoint is None else checkpoint / _FILE
        self.cosines = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else {}

    def save(self, checkpoint: Path) -> None:
        (checkpoint / _FILE).write_text(json.dumps(self.cosines, indent=1), encoding="utf-8")

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        layers = list(quantized_layers(kwargs["model"]))
        for name, layer in layers:
            if isinstance(layer, NativeLayer):
                raise ValueError(
                    f"int8_backward: {name} is of transformers' native kind, which has a backward of its own; call "
                    "hf_bitnet.convert_native(model) first"
                )
        if not any(_legal(layer) for _, layer in layers):
            raise ValueError(
                "int8_backward: no layer has a product that int8 gradients serve: all have scales of groups, and inputs "
                "without codes or with zero points; leave it out, or quantize with "
                "BitNetQuantizationConfig(granularity='channel', activation='int8')"
            )
        self._begin(layers)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._uncompiled.close()
        layers = list(quantized_layers(kwargs["model"]))
        if self._options.every and state.global_step and state.global_step % self._options.every == 0:
            self.cosines = {}
            self._begin(layers)
        self._measured = [(name, layer) for name, layer in layers if name not in self.cosines and layer.multiplies_codes]
        for _, layer in self._measured:
            layer.int8_backward = Int8Backward(meter=Meter())
        if self._measured and args.torch_compile:
            self._uncompiled.enter_context(torch.compiler.set_stance("force_eager"))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._uncompiled.close()
        if self._measured:
            decided = self._decide(lowest_cosines([layer for _, layer in self._measured], args.device))
            if state.is_world_process_zero:
                say({name: self.cosines[name] for name in decided}, self._options.min_cosine, _PATIENCE)
        self._measured = []

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.finish(kwargs["model"])

    def finish(self, model: nn.Module) -> None:
        """However the run ended, the model it leaves has the exact backward."""
        self._uncompiled.close()
        for _, layer in quantized_layers(model):
            layer.int8_backward = None

    def figures(self) -> dict[str, float]:
        found = [cosine for each in self.cosines.values() for cosine in each.values()]
        if not found:
            return {}
        taken = sum(cosine >= self._options.min_cosine for cosine in found)
        return {"quant/int8_products": taken / len(found), "quant/int8_cosine": min(found)}

    def _begin(self, layers: list[tuple[str, QuantizedLayer]]) -> None:
        """What is decided takes effect; what has no int8 form is decided."""
        self._tries = {}
        for name, layer in layers:
            if not _legal(layer):
                self.cosines[name] = {}
            layer.int8_backward = self._form(name)

    def _form(self, name: str) -> Int8Backward | None:
        found = self.cosines.get(name, {})
        on_input, on_weight = (found.get(product, NOT_FINITE) >= self._options.min_cosine for product in PRODUCTS)
        return Int8Backward(on_input, on_weight) if on_input or on_weight else None

    def _decide(self, rows: list[list[float]]) -> list[str]:
        """The layers that are decided now, from one cosine a product for each that was measured."""
        decided = []
        for (name, layer), row in zip(self._measured, rows, strict=True):
            found = {product: cosine for product, cosine in zip(PRODUCTS, row, strict=True) if cosine != UNMEASURED}
            sound = bool(found) and NOT_FINITE not in row
            self._tries[name] = self._tries.get(name, 0) + 1
            if sound or self._tries[name] >= _PATIENCE:
                self.cosines[name] = found if sound else {}
                layer.int8_backward = self._form(name)
                decided.append(name)
        return decided


def _legal(layer: QuantizedLayer) -> tuple[str, ...]:
    return legal_products(layer.quantizer.scale_shape(layer.out_features, layer.in_features)[-1], layer.activation)

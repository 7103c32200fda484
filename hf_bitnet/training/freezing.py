"""Weights that flip back and forth between two codes are held at the code they had most: arXiv 2203.11086, section 4.3.

A flip against the direction of the last one is an oscillation. For each weight, running means of its oscillations and of its
code are kept; where the former passes a threshold, which falls by a cosine over the run, the code is held from then on:

    frequency <- (1 - m) frequency + m [oscillated]        mean code <- (1 - m) mean code + m code

The paper fixes the weight itself, at its rounded mean. Here the weight may still move inside the cell of the held code, with a
margin to the next: put on the grid, many weights would change an absmean scale. Costs 11 bytes a weight and some passes over
the weights at each step. Leaves out: layers below full strength, whose codes are not in use yet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..modules import TrainedLayer
from ..quantizers import Quantized, WeightQuantizer
from ..surgery import trained_layers
from .add_on import AddOn
from .options import number
from .sharding import is_sharded

_FILE = "qat_freezing.safetensors"
# how far a held weight may go towards the next level, in steps of the grid; codes change at 0.5
_REACH = 0.4


@dataclass(frozen=True)
class FreezingOptions:
    """Options of `QATArguments.oscillation_freezing`. The defaults are own choices.

    Attributes:
        threshold: oscillations per step (0..1) above which a weight is held, when freezing starts.
        final_threshold: the same at the end of the run.
        momentum: m above; 0.02 looks back over some 50 steps.
        start: fraction of the training steps (0..1) before which nothing is held.
    """

    threshold: float = 0.1
    final_threshold: float = 0.02
    momentum: float = 0.02
    start: float = 0.5

    def __post_init__(self) -> None:
        number("threshold", self.threshold, 0.0, 1.0)
        number("final_threshold", self.final_threshold, 0.0, 1.0)
        if self.final_threshold > self.threshold:
            raise ValueError(
                f"final_threshold={self.final_threshold} lies above threshold={self.threshold}, but it falls during the run: "
                f"threshold={self.final_threshold}, final_threshold={self.threshold}"
            )
        if not 0.0 < number("momentum", self.momentum, 0.0, 1.0) < 1.0:
            raise ValueError(f"momentum={self.momentum!r} must lie between 0 and 1; for example momentum=0.02")
        number("start", self.start, 0.0, 1.0, hint="it is a fraction of the training steps: start=0.5")

    def threshold_at(self, done: float) -> float:
        """The threshold when the fraction `done` (0..1) of the steps is over; infinite before `start`."""
        if done < self.start:
            return math.inf
        passed = (done - self.start) / max(1.0 - self.start, 1e-9)
        return self.final_threshold + (self.threshold - self.final_threshold) * (1.0 + math.cos(math.pi * passed)) / 2


class _Record:
    """What is known of a layer's weights, all (N, K): `codes` int8, where held the held ones; `direction` int8, of the last
    flip; `frequency` and `mean` float32, see above; `held` bool."""

    def __init__(self, quantizer: WeightQuantizer, codes: Tensor) -> None:
        self.quantizer = quantizer
        self.codes = codes.clone()
        self.direction = torch.zeros_like(codes)
        self.frequency = torch.zeros_like(codes, dtype=torch.float32)
        self.mean = codes.float()
        self.held = torch.zeros_like(codes, dtype=torch.bool)

    def update(self, codes: Tensor, threshold: float, momentum: float) -> None:
        """Takes the codes of a step in, and holds what oscillates."""
        # a difference of int8 codes may not fit into int8
        change = (codes > self.codes).to(codes.dtype) - (codes < self.codes).to(codes.dtype)
        self.frequency.lerp_((change * self.direction < 0).float(), momentum)
        self.mean.lerp_(codes.float(), momentum)
        self.direction = torch.where(change == 0, self.direction, change)
        new = (self.frequency > threshold) & ~self.held
        self.codes = torch.where(self.held, self.codes, torch.where(new, self._usual(), codes))
        self.held |= new

    def _usual(self) -> Tensor:
        """The legal code that is nearest to the mean one."""
        grid = self.quantizer.grid
        return ((self.mean - grid.lowest) / grid.step).round().mul(grid.step).add(grid.lowest).to(self.codes.dtype)

    def displacement(self, weight: Tensor, scale: Tensor) -> Tensor:
        """What brings held weights (N, K) back into the cells of their codes; 0 for the others. In the dtype of the weight."""
        grid = self.quantizer.grid
        position = self.quantizer.position(weight, scale)
        level = (self.codes.float() - grid.lowest) / grid.step
        low = torch.where(level == 0, -math.inf, level - _REACH)
        high = torch.where(level == grid.levels - 1, math.inf, level + _REACH)
        moved = torch.where(self.held, position.clamp(low, high) - position, 0.0)
        return Quantized(moved * grid.step, scale).dequantize(weight.dtype)

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("codes", "direction", "frequency", "mean", "held")}


class FreezingCallback(AddOn):
    """Watches the codes of all layers, and holds them, after every optimizer step."""

    def __init__(self, options: FreezingOptions) -> None:
        self._options = options
        self._records: dict[str, _Record] = {}
        self._saved: dict[str, Tensor] = {}
        self._saved_schemes: dict[str, str] = {}

    def start(self, checkpoint: Path | None) -> None:
        self._records, self._saved, self._saved_schemes = {}, {}, {}
        path = None if checkpoint is None else checkpoint / _FILE
        if path is not None and path.is_file():
            with safe_open(path, framework="pt") as file:
                self._saved_schemes = file.metadata() or {}
                self._saved = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for name, layer in trained_layers(kwargs["model"]):
            if is_sharded(layer.weight):
                raise ValueError(
                    f"oscillation_freezing keeps a record of each weight, and those of {name} are sharded; leave it out, or "
                    "train without FSDP and ZeRO-3. regularizers={'oscillation_damping': 1e-4} works with both"
                )

    @torch.no_grad()
    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        threshold = self._options.threshold_at((state.global_step + 1) / state.max_steps)  # counted after this event
        for name, layer in trained_layers(kwargs["model"]):
            if layer.weight.requires_grad and not layer.relaxed:
                self._hold(name, layer, threshold)

    def _hold(self, name: str, layer: TrainedLayer, threshold: float) -> None:
        quantized = layer.quantized_weight()
        record = self._record(name, layer, quantized.codes)
        record.update(quantized.codes, threshold, self._options.momentum)
        if threshold < math.inf:
            layer.matrix.add_(record.displacement(layer.matrix, quantized.scale))
            layer.drop_codes()

    def _record(self, name: str, layer: TrainedLayer, codes: Tensor) -> _Record:
        record = self._records.get(name)
        if record is None or record.quantizer != layer.quantizer:  # a new stage of bits has other codes
            record = self._records[name] = _Record(layer.quantizer, codes)
            # a checkpoint at the end of a stage has the codes of that stage
            same = self._saved_schemes.get(name) == layer.quantizer.scheme
            for field in record.tensors():
                saved = self._saved.pop(f"{name}.{field}", None)
                if saved is not None and same:
                    setattr(record, field, saved.to(codes.device))
        return record

    def save(self, checkpoint: Path) -> None:
        tensors = {f"{name}.{field}": value for name, each in self._records.items() for field, value in each.tensors().items()}
        save_file(tensors, checkpoint / _FILE, {name: each.quantizer.scheme for name, each in self._records.items()})

    def figures(self) -> dict[str, float]:
        held = [record.held for record in self._records.values()]
        if not held:
            return {}
        return {"quant/held": float(torch.stack([each.sum() for each in held]).sum()) / sum(each.numel() for each in held)}

    def finish(self, model: nn.Module) -> None:
        self._records = {}

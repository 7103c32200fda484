"""Noise on weights and pulling weights to the grid, as callbacks. Both are pure functions of the step, so they resume exactly.

WinQ (arXiv 2605.17471) is both together: `weight_noise={"kind": "gaussian", "sigma": 1e-3}` and `grid_pull={"every": 200,
"factor": 0.4}`. Quant-Noise (arXiv 2004.07320) is `weight_noise={"kind": "subset", "rate": 0.5}`. Neither is on by default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..modules import NativeLayer, TrainedLayer
from ..noise import NOISES, make_key
from ..surgery import trained_layers
from .add_on import AddOn
from .options import number, whole
from .sharding import spread_like, whole_weight


@dataclass(frozen=True)
class WeightNoiseOptions:
    """Options of `QATArguments.weight_noise`.

    Attributes:
        kind: "subset", "uniform" or "gaussian", see `hf_bitnet/noise.py`.
        rate: share of the weights that is quantized ("subset") or noisy ("uniform") in a step, 0..1.
        sigma: standard deviation of "gaussian", in units of the weights.
        until: fraction of the training steps (0..1) after which there is no noise.
    """

    kind: str = "subset"
    rate: float = 0.5
    sigma: float = 1e-3
    until: float = 1.0

    def __post_init__(self) -> None:
        NOISES.get(self.kind)
        number("rate", self.rate, 0.0, 1.0, hint="it is a share of the weights: rate=0.5")
        number("sigma", self.sigma, 0.0)
        number("until", self.until, 0.0, 1.0, hint="it is a fraction of the training steps: until=0.9")


@dataclass(frozen=True)
class GridPullOptions:
    """Options of `QATArguments.grid_pull`: every so many optimizer steps w <- (1 - factor) w + factor w_hat.

    Pulled weights are small ones: a scale that is computed from them would shrink with each pull. They are stretched until it
    is what it was (own; the paper's scales are learned). So scales stay, and codes: all of ternary weights, and nearly all
    where a mean is the threshold (1 bit) or large weights lie beyond the last level (absmean of 2, 4 and 8 bits).

    Attributes:
        every: optimizer steps.
        factor: 0..1; 1 puts every weight on the grid. WinQ's best was 0.4 (0.8 was worse).
    """

    every: int
    factor: float = 0.4

    def __post_init__(self) -> None:
        whole("every", self.every)
        number("factor", self.factor, 0.0, 1.0, hint="it is the share of the quantized value: factor=0.4")


class WeightNoiseCallback(AddOn):
    """Gives each layer its noise, and a new key before each step."""

    def __init__(self, options: WeightNoiseOptions) -> None:
        self._options = options
        self._noise = NOISES.get(options.kind)(rate=options.rate, sigma=options.sigma)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for name, layer in trained_layers(kwargs["model"]):
            if isinstance(layer, NativeLayer):
                raise ValueError(
                    f"weight_noise: {name} is of transformers' native kind, whose forward knows no noise; call "
                    "hf_bitnet.convert_native(model) first"
                )

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        active = state.global_step < self._options.until * state.max_steps
        for index, (_, layer) in enumerate(trained_layers(kwargs["model"])):
            layer.set_noise(self._noise if active else None)
            if active:
                layer.noise_key.fill_(make_key(args.seed, state.global_step, index))

    def finish(self, model: nn.Module) -> None:
        """However the run ended, the model it leaves has no noise."""
        for _, layer in trained_layers(model):
            layer.set_noise(None)


def _pulled(layer: TrainedLayer, factor: float) -> Tensor:
    """float32 (N, K), gathered where FSDP spreads the weight."""
    weight, scale = whole_weight(layer)
    quantized = layer.source.codes(weight, scale)
    pulled = torch.lerp(weight.float(), quantized.dequantize(), factor)
    return pulled if layer.quantizer.learned else layer.quantizer.stretched(pulled, quantized.scale)


class GridPullCallback(AddOn):
    """Pulls the float weights towards the grid after every `every`-th optimizer step; see `GridPullOptions`."""

    def __init__(self, options: GridPullOptions) -> None:
        self._options = options

    @torch.no_grad()
    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if (state.global_step + 1) % self._options.every == 0:  # the step is counted after this event
            for _, layer in trained_layers(kwargs["model"]):
                if layer.weight.requires_grad:
                    layer.matrix.copy_(spread_like(_pulled(layer, self._options.factor), layer.matrix))

    def finish(self, model: nn.Module) -> None:
        pass

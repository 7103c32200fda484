"""Static activation ranges that follow the activations during training. Own, after the moving averages of arXiv 1712.05877.

A range found before training is wrong after it. Every `every`-th optimizer step the inputs of the layers are watched, and
the range in use moves towards what was seen; after `until` of the run it stays, so that the weights settle on the range that
is packed. The range is a buffer of the layer, so checkpoints hold it and a resumed run goes on exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..calibration import OBSERVERS, ObserverOptions
from ..calibration.passes import Range
from ..modules import QuantizedLayer
from ..surgery import trained_layers
from .add_on import AddOn
from .options import number, whole


@dataclass(frozen=True)
class OnlineCalibrationOptions:
    """Options of `QATArguments.online_calibration`.

    Attributes:
        every: optimizer steps from one observation to the next.
        samples: micro-batches of such a step that are watched.
        momentum: weight of the range in use, 0 (the last observation) to 1.
        method, percentile: as `hf_bitnet.calibrate`'s.
        until: fraction of the training steps (0..1) after which ranges stay.
    """

    every: int = 50
    samples: int = 1
    momentum: float = 0.9
    method: str = "percentile"
    percentile: float = 99.9
    until: float = 0.8

    def __post_init__(self) -> None:
        whole("every", self.every)
        whole("samples", self.samples)
        number("momentum", self.momentum, 0.0, 1.0)
        OBSERVERS.get(self.method)
        ObserverOptions(self.percentile)
        number("until", self.until, 0.0, 1.0, hint="it is a fraction of the training steps: until=0.8")


class OnlineCalibrationCallback(AddOn):
    """Watches static layers by hooks that hang only in the steps that are observed.

    A layer without a range takes the first one from the first tensor that reaches it, in whichever step (an expert may be
    chosen late) or evaluation that is; its hook hangs until then.
    """

    def __init__(self, options: OnlineCalibrationOptions) -> None:
        self._options = options
        self._ranges: list[Range] = []
        self._hooks: list[Any] = []
        self._left = 0
        self._without: list[_First] = []

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.torch_compile:
            raise ValueError(
                "online_calibration watches layers by hooks, which a compiled model does not call; leave torch_compile out, or "
                "calibrate before training: hf_bitnet.calibrate(model, batches)"
            )
        if not any(layer.activation.static for _, layer in trained_layers(kwargs["model"])):
            raise ValueError(
                "online_calibration: no layer has a static activation range; quantize with "
                "BitNetQuantizationConfig(activation='int8_static'), or leave it out"
            )
        self._forget_first()
        static = [layer for _, layer in trained_layers(kwargs["model"]) if layer.activation.static]
        self._without = [_First(Range(layer, self._observer())) for layer in static if not float(_scale_of(layer))]

    def _observer(self) -> Any:
        return OBSERVERS.get(self._options.method)(ObserverOptions(self._options.percentile))

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._unhook()
        self._ranges = []
        step = state.global_step
        if step % self._options.every or step >= self._options.until * state.max_steps:
            return
        self._left = self._options.samples
        for _, layer in trained_layers(kwargs["model"]):
            if layer.activation.static:
                watched = Range(layer, self._observer())
                self._ranges.append(watched)
                self._hooks.append(layer.register_forward_pre_hook(_watch(watched), with_kwargs=True))

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._left -= 1
        if self._left == 0:
            self._unhook()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._unhook()
        if self._without:
            self._share_first()
        if self._ranges:
            self._move(self._ranges)
            self._ranges = []

    @torch.no_grad()
    def _share_first(self) -> None:
        """First ranges become those of all ranks; what no rank has reached goes on waiting."""
        seen = torch.stack([torch.stack([first.scale, (first.scale > 0).float()]) for first in self._without])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(seen)
        waiting = []
        for first, (total, count) in zip(self._without, seen.tolist(), strict=True):
            if count:
                first.scale.fill_(total / count)
                first.hook.remove()
            else:
                waiting.append(first)
        self._without = waiting

    def _forget_first(self) -> None:
        for first in self._without:
            first.hook.remove()
        self._without = []

    @torch.no_grad()
    def _move(self, ranges: list[Range]) -> None:
        """Moves each range towards what was seen; on every rank alike. A layer that was not reached keeps its own."""
        used = [_scale_of(each.layer) for each in ranges]
        seen = torch.stack([each.scale() if each.seen else scale for each, scale in zip(ranges, used, strict=True)])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(seen)
            seen /= dist.get_world_size()
        for scale, new in zip(used, seen, strict=True):
            scale.lerp_(new, 1.0 - self._options.momentum)

    def finish(self, model: nn.Module) -> None:
        """However the run ended, no hook stays."""
        self._unhook()
        self._forget_first()

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


class _First:
    """Waits for the first tensor that reaches a layer without a range; before that layer computes with it.

    Attributes:
        scale: of the layer. hook: takes itself back.
    """

    def __init__(self, watched: Range) -> None:
        self._watched, self.scale = watched, _scale_of(watched.layer)
        self.hook = watched.layer.register_forward_pre_hook(self._observe, with_kwargs=True)

    def _observe(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        if not x.numel():
            return
        with torch.no_grad():
            if not self._watched.seen:
                self._watched.update(x.detach())
                self._watched.seen += 1
            # again where DDP has put the 0 of a rank that was not reached in its place
            self.scale.copy_(torch.where(self.scale > 0, self.scale, self._watched.scale()))


def _scale_of(layer: QuantizedLayer) -> Tensor:
    assert layer.act_scale is not None
    return layer.act_scale


def _watch(watched: Range) -> Any:
    def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        if x.numel() and module.training:
            with torch.no_grad():
                watched.update(x.detach())
                watched.seen += 1

    return observe

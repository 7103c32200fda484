"""StrengthCallback: sets the layers to what the schedule says, before each step. Own."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from accelerate.utils import is_compiled_module
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from ..modules import BitEmbedding, NativeLayer, TrainedLayer, unwrapped
from ..quantizers import WeightQuantizer, make_weight_quantizer
from ..surgery import set_strengths, trained_layers, trained_tables
from .amounts import steps_per_epoch
from .arguments import QATArguments
from .quantization_schedule import Plan, QuantizationSchedule
from .resume import note, write_schemes
from .sharding import is_sharded

logger = logging.getLogger(__name__)
_FILE = "qat_schedule.json"
_WHOLE = QuantizationSchedule(ramp="none")


class StrengthCallback(TrainerCallback):
    """Sets each layer's strength, sub-norm blend and stage, pure functions of the step; so a resumed run continues exactly.

    It costs no wait for the device, and touches only layers that change.

    Args:
        on_new_stage: called with the model when the run enters another stage, whose codes are of another grid.

    Attributes:
        resumed_from: the checkpoint folder that the run goes on from; its plan is compared.
    """

    def __init__(self, on_new_stage: Callable[[nn.Module], None] = lambda model: None) -> None:
        self._on_new_stage = on_new_stage
        self._plan: Plan | None = None
        self._layers: list[TrainedLayer] = []
        self._tables: list[BitEmbedding] = []
        # of each stage, what the layers that have one quantize with; the last is for all layers their own
        self._stages: list[list[WeightQuantizer | None]] = []
        self._strengths: list[float] = []
        self._stage = 0
        self._at_once = False
        self.resumed_from: str | None = None

    @property
    def strength(self) -> float | None:
        """Mean over the layers, as set last; None outside of training."""
        return None if self._plan is None else sum(self._strengths) / len(self._strengths)

    @property
    def soft(self) -> bool:
        """Whether the model of this step is another one than the one that will be deployed."""
        return self._plan is not None and (min(self._strengths) < 1.0 or self._stage < len(self._stages) - 1)

    @property
    def logs_gap(self) -> bool:
        return self._plan is not None and self._plan.schedule.log_gap and self.soft

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert isinstance(args, QATArguments)
        schedule = args.quantization_schedule or _WHOLE
        assert isinstance(schedule, QuantizationSchedule)
        named = _named(kwargs["model"])
        self._layers, self._tables = [layer for _, layer in named], trained_tables(kwargs["model"])
        loader = kwargs.get("train_dataloader")
        batches = len(loader) if loader is not None and has_length(loader) else None
        per_epoch = None if batches is None else steps_per_epoch(batches, args.gradient_accumulation_steps)
        plan = schedule.plan(state.max_steps, [name for name, _ in named], per_epoch)
        self._stages = [*_stages(schedule, named), [None] * len(named)]
        # a compiled graph is made anew when a layer goes over to integers: then all of them go at once
        self._at_once = args.torch_compile or is_compiled_module(kwargs["model"])
        self._strengths, self._stage = [], -1  # the model may have been changed since
        self._plan = plan
        if self.resumed_from is not None and state.is_world_process_zero:
            _compare(plan, self.resumed_from)
        self.on_step_begin(args, state, control, **kwargs)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self._plan is not None
        step = state.global_step
        self._set(self._plan.strengths(step), self._plan.stage(step))
        if step in self._plan.stage_ends and step > 0:
            self._start_scales(self._plan.stage_ends.index(step))
            self._on_new_stage(kwargs["model"])

    def _start_scales(self, ended: int) -> None:
        """A learned scale that waited while its layer had another quantizer starts from the present weight."""
        for i, layer in enumerate(self._layers):
            if self._stages[ended][i] is not None and not layer.source.idle_scale:
                layer.reset_scale()

    def _set(self, strengths: list[float], stage: int) -> None:
        if stage != self._stage:
            for layer, quantizer in zip(self._layers, self._stages[stage], strict=True):
                layer.set_stage(quantizer)
            self._stage = stage
        if strengths != self._strengths:
            whole = not self._strengths
            changed = [i for i, to in enumerate(strengths) if whole or to != self._strengths[i] or self._at_once]
            soft = min(strengths) < 1.0
            relaxed = [soft if self._at_once else strengths[i] < 1.0 for i in changed]
            tables = self._tables  # as the last layer
            set_strengths(
                [*(self._layers[i] for i in changed), *tables],
                [*(strengths[i] for i in changed), *[min(strengths)] * len(tables)],
                relaxed=[*relaxed, *[soft] * len(tables)],
            )
            self._strengths = strengths

    def finish(self) -> None:
        """However the run ended, what it leaves is the quantized model."""
        if self._plan is not None:
            self.refresh_scales()
            self._set([1.0] * len(self._layers), len(self._stages) - 1)
            self._plan = None

    def refresh_scales(self) -> None:
        """Learned scales that wait are brought up to date, for what is evaluated, saved or left; training does not see them."""
        for layer in self._layers:
            if layer.source.idle_scale:
                layer.reset_scale()

    @contextlib.contextmanager
    def at_full_strength(self) -> Iterator[None]:
        """The quantized model inside, what was before afterwards. Outside of training the model stays as the user left it."""
        if self._plan is None:
            yield
            return
        strengths, stage = self._strengths, self._stage
        self.refresh_scales()
        self._set([1.0] * len(self._layers), len(self._stages) - 1)
        try:
            yield
        finally:
            self._set(strengths, stage)

    def logs(self) -> dict[str, float]:
        """What the log says of the schedule."""
        strength = self.strength
        if self._plan is None or strength is None:
            return {}
        found: dict[str, float] = {"quant/strength": strength}
        if self._plan.layerwise:
            found["quant/layers_done"] = sum(each == 1.0 for each in self._strengths)
        if self._plan.stage_ends:
            sizes = [layer.in_features * layer.out_features for layer in self._layers]
            bits = sum(layer.quantizer.bits * size for layer, size in zip(self._layers, sizes, strict=True))
            found["quant/bits"] = round(bits / sum(sizes), 3)
        return found

    def write(self, folder: str | Path) -> None:
        """Keeps the plan, with the order of the layers, and how they are quantized beside a checkpoint."""
        if self._plan is not None:
            (Path(folder) / _FILE).write_text(json.dumps(self._plan.to_dict(), indent=1) + "\n")
            named = zip(self._plan.names, self._layers, strict=True)
            write_schemes(folder, {name: _scheme(layer) for name, layer in named})


def schemes_of(model: nn.Module) -> dict[str, str]:
    """How each layer is quantized, in words."""
    return {name: _scheme(layer) for name, layer in _named(model)}


def _named(model: nn.Module) -> list[tuple[str, TrainedLayer]]:
    """The layers by names that do not depend on how they are compiled, checkpointed or spread."""
    return [(unwrapped(name), layer) for name, layer in trained_layers(model)]


def _scheme(layer: TrainedLayer) -> str:
    """In words that change with what is computed."""
    weight = layer.spec.weight
    size = "" if weight.group_size is None else f" of {weight.group_size}"
    return f"{weight.scheme}, {weight.scale_rule} scales a {weight.granularity}{size}, inputs {layer.activation.__name__}"


def _compare(plan: Plan, folder: str) -> None:
    """Warns when a checkpoint was trained by another plan: the resumed run is then not what the whole one would be."""
    path, before = Path(folder) / _FILE, note(folder, _FILE)
    if before is None:
        return
    now = json.loads(json.dumps(plan.to_dict()))
    if all(each.get("ramp") == "none" and not each.get("stages") for each in (before, now)):
        return  # no schedule, in a run that is longer or shorter now
    different = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if different:
        logger.warning(
            "%s was trained with another quantization schedule (different: %s); the run goes on with the new one. The old one "
            "is in %s",
            folder,
            ", ".join(different),
            path,
        )


def _stages(schedule: QuantizationSchedule, named: list[tuple[str, TrainedLayer]]) -> list[list[WeightQuantizer | None]]:
    """The quantizer of each layer in each stage; None where it is the layer's own."""
    made = []
    for scheme, _ in schedule.stages:
        quantizer = make_weight_quantizer(scheme)
        finer = [quantizer if quantizer.bits > layer.spec.weight.bits else None for _, layer in named]
        if not any(finer):
            most = max(layer.spec.weight.bits for _, layer in named)
            raise ValueError(
                f"stages: {scheme!r} has {quantizer.bits:g} bits, and every layer of the model has as many or more (up to "
                f"{most:g}); leave that stage out"
            )
        made.append(finer)
    sharded = next((name for name, layer in named if layer.weight_scale is not None and is_sharded(layer.weight)), None)
    if made and sharded is not None:
        raise ValueError(
            f"stages: the learned scale of {sharded} has to start anew from the whole weight, which is spread over processes; "
            "use DDP, or a scale that is computed (weight_scale='least_squares')"
        )
    native = next((name for name, layer in named if isinstance(layer, NativeLayer)), None)
    if made and native is not None:
        raise ValueError(
            f"stages: {native} computes as transformers' own layer does, which is ternary only; call "
            "hf_bitnet.convert_native(model) before training in stages"
        )
    return made

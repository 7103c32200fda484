"""QuantizationSchedule: when which layer is quantized how far, as one object of plain data; pure functions of the step. Own.

Three schedules in one: the strength rises along a ramp; before the config's own weight scheme come stages with more bits
(Bit-by-Bit, arXiv 2604.07888, in its simplest form: float weights and optimizer state stay, only the grid changes); and the
layers can follow one another. Leaves out: activations, which keep the scheme of the config.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

from ..analysis.losses import SensitivityReport
from ..quantizers import WEIGHT_SCHEMES
from .moments import Moment, read_moment, step_of
from .options import number, read_options, whole
from .schedules import RAMPS

# at least this share of the steps trains the quantized model itself: what is soft has no use after training
HARD_SHARE = 0.1
TOGETHER, FORWARD, BACKWARD = "together", "forward", "backward"
_ORDERS = (TOGETHER, FORWARD, BACKWARD)


@dataclass(frozen=True)
class QuantizationSchedule:
    """How quantization comes in during a run. Plain data; `dataclasses.asdict` gives its JSON.

    A moment is a fraction of the steps (0.3, "30%"), a number of steps (500, "500 steps") or of epochs ("2 epochs").

    Attributes:
        ramp: "linear", "cosine", "sigmoid", "exponential", "step" (with `stairs`) or "none" (full strength throughout).
        start, end: moments between which the strength rises from 0 to 1. At least the last tenth of the steps is hard.
        stairs: of the ramp "step".
        stages: {weight scheme: moment until which it serves}, bits falling, for example {"int8": 0.2, "int4": 0.4}; then the
            config's own. A layer whose own scheme has as many bits or more keeps its own. Each stage takes its scheme's
            default scale. Tables of embeddings keep theirs. Under torch.compile each stage is one recompilation.
        layers: "together"; "forward" or "backward" (each layer by itself, from the input on or from the output back); or the
            names of all layers, first come first quantized (see `from_sensitivity`). Tables of embeddings follow the last.
        layer_window: share of the time from start to end that a layer's own ramp takes, when they follow one another.
        log_gap: log quant/hard_gap, the hard model's loss minus the present one's, on the last micro-batch before a log while
            they differ. Costs two forwards without gradient at each logging step of that part. Not logged where the trainer
            has a loss of its own.

    Raises TypeError or ValueError with the corrected call.
    """

    ramp: str = "linear"
    start: Moment = 0.0
    end: Moment = 0.3
    stairs: int = 4
    stages: tuple[tuple[str, Moment], ...] = ()
    layers: str | tuple[str, ...] = TOGETHER
    layer_window: float = 0.25
    log_gap: bool = True

    def __post_init__(self) -> None:
        RAMPS.get(self.ramp)
        for name in ("start", "end"):
            object.__setattr__(self, name, read_moment(name, getattr(self, name)))
        whole("stairs", self.stairs)
        object.__setattr__(self, "stages", _read_stages(self.stages))
        object.__setattr__(self, "layers", _read_layers(self.layers))
        if number("layer_window", self.layer_window, 0.0, 1.0, hint="0.25 lets each ramp take a quarter of the time") == 0.0:
            raise ValueError("layer_window=0 leaves no time for a ramp; for layers that change at once: ramp='step', stairs=1")
        if not isinstance(self.log_gap, bool):
            raise TypeError(f"log_gap must be True or False, got {self.log_gap!r}")
        if self.ramp == "none" and self.layers != TOGETHER:
            raise ValueError(
                "ramp='none' quantizes all layers from the first step, so they cannot follow one another; give another ramp, "
                "for example ramp='step', stairs=1, or layers='together'"
            )
        self._check_order()

    def _check_order(self) -> None:
        """What can be said before the number of steps is known."""
        if isinstance(self.start, float) and isinstance(self.end, float) and self.start > self.end:
            raise ValueError(
                f"start={self.start} lies behind end={self.end}; the strength rises from start to end: "
                f"start={self.end}, end={self.start}"
            )
        for name, moment in self._ends():
            if isinstance(moment, float) and moment > 1 - HARD_SHARE:
                raise ValueError(
                    f"{name} {moment:g} leaves {1 - moment:.3g} of the steps to the fully quantized model; it needs "
                    f"{HARD_SHARE:g} of them, or what is trained is not what is deployed: at most {1 - HARD_SHARE:g}"
                )

    def _ends(self) -> list[tuple[str, Moment]]:
        ramp = [] if self.ramp == "none" else [("end", self.end)]
        return ramp + [(f"stages[{scheme!r}]", until) for scheme, until in self.stages]

    @classmethod
    def read(cls, value: Any) -> QuantizationSchedule | None:
        """What the user wrote: None, an object, the name of a ramp, a dict, JSON text or the path of a JSON file."""
        field = "quantization_schedule"
        if not isinstance(value, str) or value.lstrip().startswith("{") or value.endswith(".json"):
            return read_options(cls, field, value)
        try:
            RAMPS.get(value)
        except ValueError as error:
            forms = 'Or write a dict, JSON text (\'{"ramp": "linear", "end": 0.3}\') or the path of a .json file'
            raise ValueError(f"{field}: {error} {forms}") from None
        return cls(ramp=value)

    @classmethod
    def from_sensitivity(cls, report: SensitivityReport, **others: Any) -> QuantizationSchedule:
        """Layer after layer, the most robust first, by what `hf_bitnet.sensitivity(model, batches)` measured."""
        if not isinstance(report, SensitivityReport):
            raise TypeError(f"from_sensitivity takes what sensitivity(model, batches) returns, got {type(report).__name__}")
        legal = [each.name for each in fields(cls)]
        unknown = [name for name in others if name not in legal or name == "layers"]
        if unknown:
            raise TypeError(
                f"from_sensitivity does not take {unknown[0]!r}; legal: {', '.join(n for n in legal if n != 'layers')}"
            )
        return cls(**others, layers=tuple(row.name for row in reversed(report.worst())))

    def plan(self, max_steps: int, names: Sequence[str] = (), steps_per_epoch: int | None = None) -> Plan:
        """The schedule of one run, in steps.

        Args:
            max_steps: of the whole run. names: of all layers, in the model's order. steps_per_epoch: optimizer steps.

        Raises ValueError when the last tenth of the steps would not be hard, or when `layers` names others than these.
        """
        start, end = (step_of(name, getattr(self, name), max_steps, steps_per_epoch) for name in ("start", "end"))
        if self.ramp == "none":
            start = end = 0
        if start > end:
            raise ValueError(f"start={self.start!r} is step {start}, behind end={self.end!r}, which is step {end}")
        ends = [(name, moment, step_of(name, moment, max_steps, steps_per_epoch)) for name, moment in self._ends()]
        latest = int((1 - HARD_SHARE) * max_steps + 1e-9)
        for name, moment, step in ends:
            if step > latest:
                raise ValueError(
                    f"{name} {moment!r} is step {step} of {max_steps}; the last {HARD_SHARE:.0%} of the steps have to be fully "
                    f"quantized, or what is trained is not what is deployed: at most {latest} (or {1 - HARD_SHARE:g})"
                )
        stage_ends = tuple(step for name, _, step in ends if name != "end")
        if list(stage_ends) != sorted(stage_ends):
            raise ValueError(
                f"stages end at steps {', '.join(map(str, stage_ends))} of {max_steps}; each has to end behind the last"
            )
        return Plan(self, max_steps, tuple(names), self._ranks(names), start, end, stage_ends)

    def _ranks(self, names: Sequence[str]) -> tuple[int, ...]:
        """Which place in the order each layer has; all 0 where they go together."""
        if self.layers == TOGETHER:
            return (0,) * len(names)
        if isinstance(self.layers, str):
            places = range(len(names))
            return tuple(places if self.layers == FORWARD else reversed(places))
        missing, unknown = set(names) - set(self.layers), set(self.layers) - set(names)
        if missing or unknown:
            wrong = f"{sorted(unknown)[0]!r} is none of them" if unknown else f"{sorted(missing)[0]!r} is missing"
            raise ValueError(
                f"layers must name each of the model's {len(names)} quantized layers, {wrong}; write layers='forward', or "
                "measure them: QuantizationSchedule.from_sensitivity(sensitivity(model, batches))"
            )
        place = {name: index for index, name in enumerate(self.layers)}
        return tuple(place[name] for name in names)

    def plot(self, max_steps: int = 1000, layers: int = 8, steps_per_epoch: int | None = None) -> str:
        """The schedule as SVG text: the strength (of each layer, where they follow one another) and the stages, by step.

        Args:
            max_steps: of the run that is drawn. layers: how many to draw where `layers` does not name them.
        """
        from .schedule_chart import draw

        whole("max_steps", max_steps)
        whole("layers", layers)
        names = self.layers if isinstance(self.layers, tuple) else tuple(f"layer {i}" for i in range(layers))
        return draw(self.plan(max_steps, names, steps_per_epoch))


@dataclass(frozen=True)
class Plan:
    """A schedule in the steps of one run.

    Attributes:
        names: of the layers, in the model's order. ranks: the place of each in the order of quantization.
        start, end: steps between which the strength rises. stage_ends: the step at which each stage is over.
    """

    schedule: QuantizationSchedule
    max_steps: int
    names: tuple[str, ...]
    ranks: tuple[int, ...]
    start: int
    end: int
    stage_ends: tuple[int, ...]

    @property
    def layerwise(self) -> bool:
        return self.schedule.layers != TOGETHER

    def strengths(self, step: int) -> list[float]:
        """The strength of each layer, in the model's order, during the step after `step` finished ones."""
        if step >= self.end:
            return [1.0] * len(self.ranks)
        if not self.layerwise:
            return [self._strength(step, self.start, self.end - self.start)] * len(self.ranks)
        span = self.end - self.start
        own = self.schedule.layer_window * span
        last = max(len(self.ranks) - 1, 1)
        return [self._strength(step, self.start + (span - own) * rank / last, own) for rank in self.ranks]

    def _strength(self, step: int, start: float, span: float) -> float:
        ramp = RAMPS.get(self.schedule.ramp)
        progress = min(max((step - start) / span, 0.0), 1.0) if span > 0 else 0.0
        return 1.0 if progress == 1.0 else min(max(ramp(progress, self.schedule.stairs), 0.0), 1.0)

    def stage(self, step: int) -> int:
        """Index in `schedule.stages` of the stage during the step after `step` finished ones; behind the last: its length."""
        return sum(step >= end for end in self.stage_ends)

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, to tell whether a resumed run goes on with the same one: plain data."""
        order = [name for _, name in sorted(zip(self.ranks, self.names, strict=True))] if self.layerwise else []
        schedule = self.schedule
        return {
            "max_steps": self.max_steps,
            "ramp": schedule.ramp,
            "start": self.start,
            "end": self.end,
            "stairs": schedule.stairs,
            "stages": [[name, end] for (name, _), end in zip(schedule.stages, self.stage_ends, strict=True)],
            "layer_window": schedule.layer_window,
            "layers": order,
        }


def _read_stages(stages: Any) -> tuple[tuple[str, Moment], ...]:
    pairs = list(stages.items()) if isinstance(stages, Mapping) else stages
    example = "stages={'int8': 0.2, 'int4': 0.4}"
    if not isinstance(pairs, list | tuple) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise TypeError(f"stages must map weight schemes to the moments they end, got {stages!r}; for example {example}")
    found = tuple((scheme, read_moment(f"stages[{scheme!r}]", until)) for scheme, until in pairs)
    bits = [WEIGHT_SCHEMES.get(scheme).bits for scheme, _ in found]
    if any(after >= before for before, after in pairwise(bits)):
        raise ValueError(f"stages go from more bits to fewer, got {', '.join(f'{b:g}' for b in bits)}; for example {example}")
    fractions = [until for _, until in found if isinstance(until, float)]
    if any(after <= before for before, after in pairwise(fractions)):
        raise ValueError(f"each stage has to end after the one before, got {stages!r}; for example {example}")
    return found


def _read_layers(layers: Any) -> str | tuple[str, ...]:
    if isinstance(layers, str):
        if layers not in _ORDERS:
            raise ValueError(f"layers={layers!r}; legal: {', '.join(map(repr, _ORDERS))} or the names of all layers in a list")
        return layers
    if not isinstance(layers, list | tuple) or not all(isinstance(name, str) for name in layers):
        raise TypeError(f"layers must be {', '.join(map(repr, _ORDERS))} or the names of all layers in a list, got {layers!r}")
    repeated = [name for name in layers if layers.count(name) > 1]
    if repeated:
        raise ValueError(f"layers names {repeated[0]!r} twice; each layer has one place in the order")
    return tuple(layers)

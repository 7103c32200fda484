"""QATArguments: how a run trains. What the model is, is in `BitNetQuantizationConfig`. Own."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from transformers import SchedulerType, TrainingArguments

from .distillation import DistillationConfig
from .freezing import FreezingOptions
from .int8_backward import Int8BackwardOptions
from .lean import set_lean
from .learning_rate import TwoStage
from .noise import GridPullOptions, WeightNoiseOptions
from .options import number, plain, read_options
from .presets import TRAINING_PRESETS
from .quantization_schedule import QuantizationSchedule
from .ranges import OnlineCalibrationOptions
from .regularizers import read_regularizers
from .rollback import RollbackOptions

# fields that hold an object, and its dataclass; see `options.py`
_OBJECTS: dict[str, type] = {
    "distillation": DistillationConfig,
    "two_stage": TwoStage,
    "weight_noise": WeightNoiseOptions,
    "grid_pull": GridPullOptions,
    "oscillation_freezing": FreezingOptions,
    "online_calibration": OnlineCalibrationOptions,
    "spike_rollback": RollbackOptions,
    "int8_backward": Int8BackwardOptions,
}
_SWITCHES = ("eval_at_full_strength", "cautious", "lean", "nan_guard", "quant_logging")


@dataclass
class QATArguments(TrainingArguments):
    """Arguments of `QATTrainer`: everything of transformers' TrainingArguments, and the fields below.

    `HfArgumentParser(QATArguments)` makes a command line of them. A feature with knobs of its own is one field, which takes an
    object, a dict, JSON text or the path of a JSON file. Raises ValueError or TypeError that say what came, what is legal and
    the corrected call.
    """

    quantization_schedule: dict | str | None = field(
        default=None,
        metadata={
            "help": "How quantization comes in: the name of a ramp of the strength ('linear', 'cosine', 'sigmoid', "
            "'exponential', 'step'), a QuantizationSchedule, or its fields as a dict, JSON text or the path of a .json file. "
            "Default: quantized from the first step."
        },
    )
    eval_at_full_strength: bool = field(
        default=True,
        metadata={
            "help": "Evaluate the quantized model even while the strength is below 1. False evaluates the model as it is at "
            "that step. The metric eval_strength says which."
        },
    )
    distillation: dict | str | None = field(
        default=None,
        metadata={
            "help": "What is learned from the teacher: a DistillationConfig, a dict of its fields, JSON text or the path of "
            "a JSON file. Default: DistillationConfig() with a teacher, nothing without."
        },
    )
    latent_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the float weights behind the quantized ones. Default: learning_rate."},
    )
    scale_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of learned scales and learned temperatures. Default: learning_rate."},
    )
    norm_rate_factor: float = field(
        default=1.0,
        metadata={
            "help": "Learning rate of the gains of norms and of biases, all that has one dimension, as a multiple of "
            "learning_rate. Gains scale the columns of the layers behind them, which few bits cannot."
        },
    )
    latent_weight_decay: float | None = field(
        default=None,
        metadata={"help": "Weight decay of the float weights behind the quantized ones. Default: weight_decay."},
    )
    scale_weight_decay: float = field(
        default=0.0, metadata={"help": "Weight decay of learned scales and learned temperatures."}
    )
    cautious: bool = field(
        default=False,
        metadata={
            "help": "Weights whose update goes against their present gradient stay where they are, the others move so much "
            "further (arXiv 2411.16085). For any torch optimizer; holds a second copy of the parameters during a step."
        },
    )
    mars: float = field(
        default=0.0,
        metadata={
            "help": "Gamma of MARS (arXiv 2411.10438): gradients are corrected by how they changed since the last step, so "
            "that momentum answers earlier; the paper takes 0.025. 0: off. Its state is one more tensor a parameter."
        },
    )
    two_stage: dict | str | None = field(
        default=None,
        metadata={
            "help": "BitNet's learning rate schedule in place of lr_scheduler_type: at half of the run the rate drops and "
            'weight decay ends. {} takes the defaults: {"at": 0.5, "drop": 0.667, "decay": "linear"}.'
        },
    )
    regularizers: dict | str | None = field(
        default=None,
        metadata={
            "help": "Regularizers of the float weights behind the quantized ones, name to coefficient: "
            '{"l2_to_grid": 1e-4}. Names: l2_to_grid, oscillation_damping, sparsity.'
        },
    )
    weight_noise: dict | str | None = field(
        default=None,
        metadata={
            "help": 'Noise on the weights in training: {"kind": "subset", "rate": 0.5} (Quant-Noise: only a random share is '
            'quantized in a step), "uniform", or {"kind": "gaussian", "sigma": 1e-3} (WinQ).'
        },
    )
    grid_pull: dict | str | None = field(
        default=None,
        metadata={
            "help": "Pulls the float weights towards the grid every so many steps; scales stay as they are (WinQ): "
            '{"every": 200, "factor": 0.4}.'
        },
    )
    oscillation_freezing: dict | str | None = field(
        default=None,
        metadata={
            "help": "Weights that flip back and forth are held at the code they had most: {} takes the defaults, "
            '{"threshold": 0.1, "final_threshold": 0.02, "momentum": 0.02, "start": 0.5}.'
        },
    )
    online_calibration: dict | str | None = field(
        default=None,
        metadata={
            "help": 'Static activation ranges follow the activations in training: {} takes the defaults, {"every": 50, '
            '"samples": 1, "momentum": 0.9, "method": "percentile", "percentile": 99.9, "until": 0.8}.'
        },
    )
    lean: bool = field(
        default=False,
        metadata={
            "help": "Little memory: bfloat16 weights with stochastic rounding, optim='adamw_torch_8bit' (needs torchao), bf16 "
            "and activation checkpointing."
        },
    )
    int8_backward: dict | str | None = field(
        default=None,
        metadata={
            "help": "Products of backward on int8 gradients, for GPUs: {} takes the defaults, "
            '{"min_cosine": 0.99, "every": 0}. Each product of each layer is compared with the exact one in its first step, '
            "and stays exact below min_cosine; every: steps until it is compared again."
        },
    )
    nan_guard: bool = field(
        default=True,
        metadata={
            "help": "Stop when a gradient norm is NaN or infinite, and name the layer that it comes from. Looks at each step "
            "where logging_nan_inf_filter is on."
        },
    )
    spike_rollback: dict | str | None = field(
        default=None,
        metadata={
            "help": "Go back to the last good checkpoint when the logged loss spikes, with a lower learning rate: {} takes the "
            'defaults, {"factor": 2.0, "window": 10, "retries": 3, "slowdown": 0.5}.'
        },
    )
    quant_logging: bool = field(
        default=True,
        metadata={
            "help": "Log quant/strength (and quant/layers_done, quant/bits, quant/hard_gap of a schedule that has them), "
            "quant/flip_rate, quant/zero_fraction, quant/sqnr_db and quant/latent_changed at each logging step. Keeps the "
            "packed codes of the last one."
        },
    )

    training_preset: str | None = field(
        default=None,
        metadata={
            "help": "Name of the preset that the values came from, kept with the run. QATArguments.from_preset sets it; by "
            "itself it changes nothing."
        },
    )

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> QATArguments:
        """The arguments of a training preset (`hf-bitnet presets` lists them), with any field overridden.

        An object (`distillation`, `two_stage`) is replaced as a whole; None takes it out. Raises ValueError on an unknown name.
        """
        return cls(**{**TRAINING_PRESETS.get(name).training(), **overrides})

    def __post_init__(self) -> None:
        self._validate()
        if self.lean:
            set_lean(self)
        super().__post_init__()

    def to_dict(self) -> dict[str, Any]:
        """As TrainingArguments', with objects as dicts."""
        return {name: plain(value) for name, value in super().to_dict().items()}

    def _validate(self) -> None:
        for name, kind in _OBJECTS.items():
            setattr(self, name, read_options(kind, name, getattr(self, name)))
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):  # "no" would be taken for yes
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        schedule = SchedulerType(self.lr_scheduler_type)
        if self.two_stage is not None and schedule is not SchedulerType.LINEAR:
            raise ValueError(
                f"two_stage and lr_scheduler_type={schedule.value!r} both name a schedule; leave lr_scheduler_type out"
            )
        self.regularizers = read_regularizers(self.regularizers)
        self.quantization_schedule = QuantizationSchedule.read(self.quantization_schedule)  # type: ignore[assignment]
        for name in ("latent_learning_rate", "scale_learning_rate", "latent_weight_decay"):
            if getattr(self, name) is not None:
                number(name, getattr(self, name), 0.0)
        number("scale_weight_decay", self.scale_weight_decay, 0.0)
        number("norm_rate_factor", self.norm_rate_factor, 0.0)
        number("mars", self.mars, 0.0, 1.0)
        if self.mars and self.fp16:
            raise ValueError(
                "mars compares gradients of two steps, and fp16=True scales them by a factor that changes; use bf16=True, or "
                "leave mars out"
            )
        if self.cautious and self.lean:
            raise ValueError(
                "cautious=True changes what the optimizer wrote, and would undo lean's stochastic rounding; leave one out"
            )
        if self.training_preset is not None:
            self._check_preset(self.training_preset)

    def _check_preset(self, name: str) -> None:
        """Raises ValueError when nothing came from the preset, as where only its name was given."""
        defaults = {each.name: each.default for each in fields(self)}
        own = {key: value for key, value in TRAINING_PRESETS.get(name).arguments.items() if value != defaults[key]}
        if not any(plain(getattr(self, key)) == value for key, value in own.items()):
            raise ValueError(
                f"training_preset={name!r} names where values came from, but none of {', '.join(own)} is that preset's; write "
                f"QATArguments.from_preset({name!r}, ...), or leave training_preset out"
            )

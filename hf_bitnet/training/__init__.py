"""Floor 6: how a run trains. Schedule of the quantization, distillation, parameter groups, metrics, exact resume,
and the whole way from a full-precision model to a packed one."""

from .amounts import TokenWindows
from .arguments import QATArguments
from .distillation import (
    DistillationConfig,
    HiddenStates,
    Relations,
    cache_teacher_logits,
    distill_from_hidden,
    distill_from_logits,
    drawn_windows,
    hidden_loss,
    relation_loss,
)
from .measured_run import MeasuredRun
from .pipeline import CONVERSION_DEFAULTS, command_line_defaults, convert
from .presets import TRAINING_PRESETS, TrainingPreset
from .published import hub_checkpoint
from .quantization_schedule import QuantizationSchedule
from .schedules import RAMPS
from .seq2seq import QATSeq2SeqArguments, QATSeq2SeqTrainer
from .trainer import QATMixin, QATTrainer

__all__ = [
    "CONVERSION_DEFAULTS",
    "RAMPS",
    "TRAINING_PRESETS",
    "DistillationConfig",
    "HiddenStates",
    "MeasuredRun",
    "QATArguments",
    "QATMixin",
    "QATSeq2SeqArguments",
    "QATSeq2SeqTrainer",
    "QATTrainer",
    "QuantizationSchedule",
    "Relations",
    "TokenWindows",
    "TrainingPreset",
    "cache_teacher_logits",
    "command_line_defaults",
    "convert",
    "distill_from_hidden",
    "distill_from_logits",
    "drawn_windows",
    "hidden_loss",
    "hub_checkpoint",
    "relation_loss",
]

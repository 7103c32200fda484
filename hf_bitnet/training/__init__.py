"""Floor 6: how a run trains. Schedule of the strength, distillation, parameter groups, metrics, exact resume."""

from .arguments import QATArguments
from .distillation import distill_from_hidden, distill_from_logits
from .schedules import SCHEDULES, strength_at
from .trainer import QATTrainer

__all__ = ["SCHEDULES", "QATArguments", "QATTrainer", "distill_from_hidden", "distill_from_logits", "strength_at"]

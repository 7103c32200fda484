"""What a quantized model learns from a teacher: outputs, inner states, or a teacher's outputs from disk."""

from .balance import LossBalance
from .cache import cache_teacher_logits
from .config import DistillationConfig, HiddenStates, Relations
from .distiller import Distiller
from .drawn_text import drawn_windows
from .hidden import hidden_loss
from .logits import distill_from_hidden, distill_from_logits
from .relations import relation_loss

__all__ = [
    "DistillationConfig",
    "Distiller",
    "HiddenStates",
    "LossBalance",
    "Relations",
    "cache_teacher_logits",
    "distill_from_hidden",
    "distill_from_logits",
    "drawn_windows",
    "hidden_loss",
    "relation_loss",
]

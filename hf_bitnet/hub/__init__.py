"""Floor 5: what goes with a model's files on the Hub: its card, its license, the code that loads it."""

from .about import (
    CARD,
    asking_nobody,
    card_data,
    class_name,
    descent,
    hub_id,
    library_versions,
    license_of,
    task_of,
    without_bars,
)
from .card import TAGS, Measurement, model_card, write_card
from .shim import SHIM, shim_files

__all__ = [
    "CARD",
    "SHIM",
    "TAGS",
    "Measurement",
    "asking_nobody",
    "card_data",
    "class_name",
    "descent",
    "hub_id",
    "library_versions",
    "license_of",
    "model_card",
    "shim_files",
    "task_of",
    "without_bars",
    "write_card",
]

"""A callback that a field of QATArguments asks for. Own."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from transformers import TrainerCallback


class AddOn(TrainerCallback):
    """What the trainer calls beside Trainer's events; nothing unless overridden."""

    def start(self, checkpoint: Path | None) -> None:
        """Before each start of the loop, which goes on from `checkpoint`, or anew."""

    def save(self, checkpoint: Path) -> None:
        """Writes into the folder of a checkpoint what a resumed run needs. Called on the rank that saves."""

    def figures(self) -> dict[str, float]:
        """For the log."""
        return {}

    def finish(self, model: nn.Module) -> None:
        """Once at the end of `train`, however it ended."""

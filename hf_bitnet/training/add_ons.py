"""The callbacks that fields of QATArguments ask for. Each can also clean up after a run that ended by an error. Own."""

from __future__ import annotations

from typing import Protocol

from torch import nn
from transformers import TrainerCallback

from .arguments import QATArguments
from .noise import GridPullCallback, GridPullOptions, WeightNoiseCallback, WeightNoiseOptions
from .ranges import OnlineCalibrationCallback, OnlineCalibrationOptions


class AddOn(Protocol):
    def finish(self, model: nn.Module) -> None:
        """Called once at the end of `train`, however it ended."""
        ...


def add_ons(args: QATArguments) -> list[TrainerCallback]:
    """Callbacks with `AddOn.finish`, in the order of their events."""
    made: list[TrainerCallback] = []
    if isinstance(args.weight_noise, WeightNoiseOptions):
        made.append(WeightNoiseCallback(args.weight_noise))
    if isinstance(args.online_calibration, OnlineCalibrationOptions):
        made.append(OnlineCalibrationCallback(args.online_calibration))
    if isinstance(args.grid_pull, GridPullOptions):
        made.append(GridPullCallback(args.grid_pull))
    return made

"""Which callbacks run beside the loop: one for every run, others where a field of QATArguments asks for them. Own."""

from __future__ import annotations

from .add_on import AddOn
from .arguments import QATArguments
from .freezing import FreezingCallback, FreezingOptions
from .int8_backward import Int8BackwardCallback, Int8BackwardOptions
from .noise import GridPullCallback, GridPullOptions, WeightNoiseCallback, WeightNoiseOptions
from .ranges import OnlineCalibrationCallback, OnlineCalibrationOptions
from .settings_note import SettingsNote


def add_ons(args: QATArguments) -> list[AddOn]:
    """In the order of their events."""
    made: list[AddOn] = [SettingsNote(args)]
    if isinstance(args.weight_noise, WeightNoiseOptions):
        made.append(WeightNoiseCallback(args.weight_noise))
    if isinstance(args.online_calibration, OnlineCalibrationOptions):
        made.append(OnlineCalibrationCallback(args.online_calibration))
    if isinstance(args.grid_pull, GridPullOptions):
        made.append(GridPullCallback(args.grid_pull))
    if isinstance(args.oscillation_freezing, FreezingOptions):
        made.append(FreezingCallback(args.oscillation_freezing))
    if isinstance(args.int8_backward, Int8BackwardOptions):
        made.append(Int8BackwardCallback(args.int8_backward))
    return made

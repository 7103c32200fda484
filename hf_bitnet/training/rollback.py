"""Going back to the last good checkpoint when the loss spikes, with a lower learning rate. Own.

The decision is a pure function of the logged losses, which every rank and a resumed run have alike.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

from .options import number, whole
from .resume import has_optimizer

logger = logging.getLogger(__name__)
_NOTES = "qat_rollbacks.json"
# losses are compared only where these are equal: while quantization fades in, a loss may rise for good reasons
_STAGE = ("quant/strength", "quant/bits")


@dataclass(frozen=True)
class RollbackOptions:
    """Options of `QATArguments.spike_rollback`.

    Attributes:
        factor: a logged loss above `factor` times the median of the last `window` ones at the same strength is a spike; NaN
            and infinity always are.
        window: logged losses.
        retries: rollbacks in a run, at most.
        slowdown: the learning rate is multiplied by it at each rollback.
    """

    factor: float = 2.0
    window: int = 10
    retries: int = 3
    slowdown: float = 0.5

    def __post_init__(self) -> None:
        number("factor", self.factor, 1.0, hint="a loss of so many times the median is a spike: factor=2.0")
        whole("window", self.window)
        whole("retries", self.retries)
        number("slowdown", self.slowdown, 0.0, 1.0, hint="the learning rate is multiplied by it: slowdown=0.5")


@dataclass(frozen=True)
class Rollback:
    """One rollback: at which step the spike was seen, its loss, to which step the run went back, and the rate's factor."""

    step: int
    loss: float
    back_to: int
    slowdown: float


class SpikeError(Exception):
    """Leaves the training loop; `QATTrainer.train` catches it."""

    def __init__(self, step: int, loss: float, last_good: int, why: str) -> None:
        super().__init__(why)
        self.step, self.loss, self.last_good, self.why = step, loss, last_good, why


def find_spike(history: list[dict[str, Any]], options: RollbackOptions) -> SpikeError | None:
    """Judges the last logged loss by those before it; a pure function of the log."""
    logs = [log for log in history if "loss" in log]
    if not logs:
        return None
    last = logs[-1]
    before = [log for log in logs[:-1] if all(log.get(key) == last.get(key) for key in _STAGE)][-options.window :]
    good = int(logs[-2]["step"]) if len(logs) > 1 else 0
    if not math.isfinite(last["loss"]):
        return SpikeError(last["step"], last["loss"], good, f"the loss is {last['loss']}")
    if len(before) < options.window:
        return None
    usual = median(log["loss"] for log in before)
    if last["loss"] <= options.factor * usual:
        return None
    why = (
        f"the loss {last['loss']:.4g} is more than {options.factor:g} times the median {usual:.4g} of the last {options.window}"
    )
    return SpikeError(last["step"], last["loss"], good, why)


class Rollbacks:
    """The rollbacks of a run. They are noted in the output folder, and in each checkpoint those that it was trained with.

    The learning rate of a resumed run is a function of both notes, so it comes out right wherever the run was killed.
    """

    def __init__(self, options: RollbackOptions, folder: str | Path) -> None:
        self.options, self.folder = options, Path(folder)
        self.done: list[Rollback] = []

    def start(self, notes: str | Path | None) -> None:
        """Takes over the rollbacks noted in a folder: that of the run, or a checkpoint's. None: a new run."""
        self.done = [] if notes is None else _read(Path(notes))
        if notes is None:
            (self.folder / _NOTES).unlink(missing_ok=True)

    def add(self, spike: SpikeError, checkpoint: str | None, writes: bool) -> None:
        """Decides on a rollback to `checkpoint`, and removes newer ones. Raises RuntimeError when there is no way back."""
        advice = "lower learning_rate, or lengthen warmup_steps"
        if len(self.done) >= self.options.retries:
            raise RuntimeError(
                f"step {spike.step}: {spike.why}, after {len(self.done)} rollbacks already (retries={self.options.retries}); "
                f"{advice}"
            )
        if checkpoint is None:
            raise RuntimeError(
                f"step {spike.step}: {spike.why}, and there is no checkpoint up to step {spike.last_good} to go back to; write "
                f"save_strategy='steps' with a smaller save_steps, or {advice}"
            )
        back_to = int(checkpoint.rpartition("-")[2])
        self.done.append(Rollback(spike.step, spike.loss, back_to, self.options.slowdown))
        logger.warning(
            "step %d: %s; back to step %d with %g times the learning rate (rollback %d of %d)",
            *(spike.step, spike.why, back_to, self.options.slowdown, len(self.done), self.options.retries),
        )
        if writes:
            self.note(self.folder)
            for path in self.folder.glob("checkpoint-*"):
                if path.name.removeprefix("checkpoint-").isdigit() and int(path.name.rpartition("-")[2]) > back_to:
                    shutil.rmtree(path)

    def note(self, folder: str | Path) -> None:
        """Writes down the rollbacks so far."""
        if self.done:
            (Path(folder) / _NOTES).write_text(json.dumps([asdict(each) for each in self.done]) + "\n")

    def slow_down(self, checkpoint: str, optimizer: Any, scheduler: Any) -> None:
        """Multiplies the rates that `checkpoint` brought by what it does not know of yet."""
        # without the optimizer's state it brought none
        known = len(_read(Path(checkpoint))) if has_optimizer(Path(checkpoint)) else 0
        factor = math.prod(each.slowdown for each in self.done[known:])
        if factor == 1.0:
            return
        for group in optimizer.param_groups:
            for key in ("lr", "initial_lr"):
                if isinstance(group.get(key), Tensor):
                    group[key].mul_(factor)
                elif key in group:
                    group[key] *= factor
        for key in ("base_lrs", "_last_lr"):
            if hasattr(scheduler, key):
                setattr(scheduler, key, [rate * factor for rate in getattr(scheduler, key)])


def _read(folder: Path) -> list[Rollback]:
    try:
        return [Rollback(**each) for each in json.loads((folder / _NOTES).read_text())]
    except (OSError, ValueError, TypeError):
        return []

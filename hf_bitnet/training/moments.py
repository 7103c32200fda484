"""A point in a run, as people write it: 0.3 or "30%" of the steps, 500 or "500 steps", "2 epochs". Own.

Numbers mean what they mean in Trainer's own `warmup_steps`: a float is a fraction of the steps, an int a number of steps.
"""

from __future__ import annotations

import re
from typing import Any

Moment = float | int | str
_WRITTEN = re.compile(r"(\d+(?:\.\d+)?)\s*(%|steps?|epochs?)")
# so that 0.3 * 10 is step 3, not 2
_ROUNDING = 1e-9


def read_moment(name: str, value: Any) -> Moment:
    """The moment in its normal form: a float (fraction), an int (steps) or text ("2 epochs", "1 step").

    Raises TypeError or ValueError that say what is legal.
    """
    legal = f"a fraction of the steps ({name}=0.3 or '30%'), steps ({name}=500 or '500 steps') or '2 epochs'"
    if isinstance(value, str):
        value = _read_text(name, value, legal)
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be {legal}, got {type(value).__name__} {value!r}")
    if isinstance(value, int):
        if value == 1:
            raise ValueError(f"{name}=1 can be one step or the whole run; write {name}='1 step' or {name}=1.0")
        if value < 0:
            raise ValueError(f"{name}={value} lies before the run; legal: {legal}")
        return value
    if not 0.0 <= value <= 1.0:
        steps = f"; {value:g} steps are {name}={int(value)}" if value >= 2 and value == int(value) else ""
        raise ValueError(f"{name}={value!r} is no fraction from 0.0 to 1.0{steps}; legal: {legal}")
    return value


def _read_text(name: str, text: str, legal: str) -> Moment:
    found = _WRITTEN.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{name}={text!r} is no point in a run; legal: {legal}")
    amount, unit = float(found[1]), found[2]
    if unit == "%":
        return amount / 100
    if unit.startswith("step"):
        if amount != int(amount):
            raise ValueError(f"{name}={text!r}: steps are whole numbers; legal: {legal}")
        return "1 step" if amount == 1 else int(amount)
    return f"{amount:g} epoch{'' if amount == 1 else 's'}"


def step_of(name: str, moment: Moment, max_steps: int, steps_per_epoch: int | None) -> int:
    """The number of finished steps at which the moment has come.

    Args:
        steps_per_epoch: optimizer steps; None where the data has no length.

    Raises ValueError for epochs without it.
    """
    if isinstance(moment, float):
        return int(moment * max_steps + _ROUNDING)
    if isinstance(moment, int):
        return moment
    amount, unit = moment.split()
    if unit.startswith("step"):
        return int(amount)
    if steps_per_epoch is None:
        raise ValueError(
            f"{name}={moment!r} cannot be told in steps, because the length of an epoch is not known; write a fraction of the "
            f"steps or steps: {name}=0.3 or {name}=500"
        )
    return int(float(amount) * steps_per_epoch + _ROUNDING)

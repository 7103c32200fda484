"""Every registered schedule keeps the contract; third parties may add one."""

from __future__ import annotations

import pytest

from hf_bitnet.training import SCHEDULES, strength_at

STEPS = 100


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "none"])
@pytest.mark.parametrize(("start", "end"), [(0.0, 0.3), (0.25, 0.75), (0.5, 1.0), (0.4, 0.4), (0.0, 0.0), (1.0, 1.0)])
@pytest.mark.parametrize("stairs", [1, 4])
def test_bounds_and_order(name: str, start: float, end: float, stairs: int) -> None:
    values = [strength_at(name, step, STEPS, start, end, stairs) for step in range(STEPS + 1)]
    assert all(value == 0.0 for step, value in enumerate(values) if step <= start * STEPS and step < end * STEPS)
    assert all(value == 1.0 for step, value in enumerate(values) if step >= end * STEPS)
    assert values == sorted(values)
    if end - start >= 0.3 and stairs > 1:
        assert any(0.0 < value < 1.0 for value in values)


def test_values() -> None:
    assert [strength_at("none", step, 10, 0.5, 1.0, 4) for step in (0, 9)] == [1.0, 1.0]
    assert strength_at("linear", 15, 100, 0.0, 0.3, 4) == pytest.approx(0.5)
    assert strength_at("cosine", 15, 100, 0.0, 0.3, 4) == pytest.approx(0.5)
    assert strength_at("cosine", 3, 100, 0.0, 0.3, 4) < strength_at("linear", 3, 100, 0.0, 0.3, 4)
    stairs = {strength_at("step", step, 100, 0.0, 0.8, 4) for step in range(100)}
    assert stairs == {0.0, 0.25, 0.5, 0.75, 1.0}


def test_unknown_schedule() -> None:
    with pytest.raises(ValueError, match=r"unknown strength schedule 'linaer'.*Did you mean 'linear'"):
        strength_at("linaer", 0, 10, 0.0, 1.0, 4)

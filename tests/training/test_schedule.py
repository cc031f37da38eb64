from __future__ import annotations

import pytest

from longtail.config import Schedule
from longtail.errors import LongtailError
from longtail.training.schedule import rate


@pytest.mark.parametrize("name", ["constant", "multistep", "cosine", "one-cycle"])
@pytest.mark.parametrize("steps", [1, 7, 1000])
@pytest.mark.parametrize("warmup", [0.0, 0.1])
def test_a_rate_never_overshoots(name: str, steps: int, warmup: float) -> None:
    warmup = 0.0 if name == "one-cycle" else warmup
    schedule = Schedule(name=name, warmup=warmup)  # type: ignore[arg-type]
    rates = [rate(schedule, step, steps) for step in range(steps)]
    assert all(0 < value <= 1 for value in rates)
    if steps == 1000:
        assert max(rates) == pytest.approx(1, abs=1e-3)


def test_the_papers_schedule() -> None:
    schedule = Schedule(name="multistep", warmup=0.025, milestones=(0.8, 0.9))
    rates = [rate(schedule, epoch * 85, 200 * 85) for epoch in range(200)]
    assert [epoch for epoch in range(1, 200) if rates[epoch] < rates[epoch - 1]] == [160, 180]
    assert rates[5] == 1
    assert rates[4] == pytest.approx((4 * 85 + 1) / (5 * 85))
    assert rates[199] == pytest.approx(0.01)


def test_one_cycle_has_a_warmup_of_its_own() -> None:
    with pytest.raises(LongtailError, match=r"schedule\.warmup 0\.1: one-cycle rises .* by itself; set it to 0"):
        Schedule(name="one-cycle", warmup=0.1)

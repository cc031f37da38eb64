"""Learning rates as a function of the step: nothing to save, nothing to lose on resume."""

from __future__ import annotations

import math

from longtail.config import Schedule


def rate(schedule: Schedule, step: int, steps: int) -> float:
    """Return the factor of the highest learning rate at ``step`` of ``steps`` (counted from 0), in (0, 1].

    The warm-up ends at 1 and not above; the shape of the schedule spans the whole training.
    """
    done = step / steps
    if done < schedule.warmup:
        # the first step is not at zero, which would waste it
        return (step + 1) / math.ceil(schedule.warmup * steps)
    if schedule.name == "multistep":
        return schedule.gamma ** sum(done >= milestone for milestone in schedule.milestones)
    if schedule.name == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (done - schedule.warmup) / (1 - schedule.warmup)))
    if schedule.name == "one-cycle":
        # up from 1/25 in the first three tenths, then down to nearly zero, both along a cosine (Smith, 2018)
        rise = 0.3
        if done < rise:
            return 1 / 25 + (1 - 1 / 25) * 0.5 * (1 - math.cos(math.pi * done / rise))
        return max(1e-5, 0.5 * (1 + math.cos(math.pi * (done - rise) / (1 - rise))))
    return 1.0

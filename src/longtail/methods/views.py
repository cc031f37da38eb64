"""Which views of an image a training step has, and what takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ViewUse = Literal["classification", "contrast"]
"""What a view is for, which decides its augmentation: ``data.augment``, or ``data.contrast_augment``."""
CLASSIFICATION: ViewUse = "classification"
CONTRAST: ViewUse = "contrast"


@dataclass(frozen=True, kw_only=True)
class ViewPlan:
    """The views of an image in a step: first those of the student, then those for keys alone."""

    student: tuple[ViewUse, ...]
    """The use of each view that goes through the student, forward and backward; at least one."""
    keys: tuple[ViewUse, ...] = ()
    """The use of each view that goes through a key encoder alone, without gradient."""
    num_classified: int
    """The classification loss is that of so many views of the student, the first."""
    distill_every_view: bool = False
    """Whether all of the classified views learn from the teacher's scores, not the first alone."""
    share_key: bool = False
    """Whether the key encoder takes the first view of the student."""

    @property
    def uses(self) -> tuple[ViewUse, ...]:
        """The use of each view."""
        return self.student + self.keys

    @property
    def num_student(self) -> int:
        """Number of views that go through the student."""
        return len(self.student)

    @property
    def num_distilled(self) -> int:
        """Number of views, the first, that learn from the teacher's scores where there is distillation."""
        return self.num_classified if self.distill_every_view else 1

"""The settings of the teacher: where it comes from, how it is trained, and how it is distilled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from longtail.config.types import STRICT, Fraction, Positive, PositiveFloat, check_tune
from longtail.errors import LongtailError

_OWN = ("pretrained", "tune", "network_size")


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The encoder whose features fill the queues (gml) and whose classifier is distilled."""

    __pydantic_config__ = STRICT

    source: str | tuple[str, ...] = "train"
    """train (train one first, with logit-adjusted cross-entropy), ema (the moving average of the student's weights,
    Mean Teacher: no first stage), the folder of a run, or timm:NAME (pretrained); several folders: the probabilities of
    their classifiers are averaged, and gml's keys are the features of all."""
    network: str = "auto"
    """Network of a teacher that is trained; auto: the student's."""
    pretrained: str | None = None
    """Initial weights of a teacher that is trained, as pretrained for the student's; the student's if not given."""
    tune: str | None = None
    """What of a teacher's encoder is trained, as tune for the student's: head trains a classifier on a pretrained
    encoder that stays as it is. If not given: the student's; for a network or initial weights of its own auto where the
    student's is full or lora, and full from random weights."""
    network_size: Annotated[int, Field(ge=8)] | None = None
    """Side in pixels to which images are resized before they enter a teacher that is trained; the student's if not
    given."""
    epochs: Positive | None = None
    """Epochs of training the teacher; as many as the student's if not given."""
    views: Positive = 1
    """Augmented views of each image per step on which a teacher is trained, each with its own loss."""
    count: Positive = 1
    """Teachers that are trained, each with a seed of its own; their probabilities are averaged."""
    generations: Positive = 1
    """Teachers that are trained one after the other, each distilled from the one before as the student is from the last
    (born-again networks)."""
    generation_network: Literal["teacher", "student"] = "teacher"
    """Network of the second generation and later ones: the teacher's, or the student's."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the moving average (ema); smaller in the first steps, so that the initial weights count no more than
    later ones."""
    ema_warmup: Fraction = 0.2
    """Fraction of the training over which the weight of the distillation from a moving average grows (ema)."""
    distillation_temperature: PositiveFloat = 4.0
    """Temperature of the distillation [T]."""
    cache: Annotated[int, Field(ge=0)] = 0
    """Number of fixed views per image whose teacher outputs are computed once and cached on disk; 0: no cache."""

    def __post_init__(self) -> None:
        if not self.sources or (len(self.sources) > 1 and {"train", "ema"} & set(self.sources)):
            raise LongtailError(
                f"teacher.source {', '.join(self.sources) or '()'}: expected train, ema, or one or more folders of "
                "runs; for several teachers that are trained set teacher.count"
            )
        for name in ("views", "count", "generations"):
            if getattr(self, name) > 1 and self.sources != ("train",):
                raise LongtailError(
                    f"teacher.{name} {getattr(self, name)}: is for a teacher that is trained; set teacher.source to "
                    f"train, or teacher.{name} to 1"
                )
        for name in _OWN:
            if getattr(self, name) is not None and self.sources != ("train",):
                raise LongtailError(
                    f"teacher.{name} {getattr(self, name)}: is for a teacher that is trained; set teacher.source to "
                    f"train, or leave teacher.{name} out"
                )
        if self.tune is not None:
            check_tune(self.tune, "teacher.tune")
        if self.source == "ema" and self.cache > 0:
            raise LongtailError(
                "teacher.source ema: its scores change in every step and cannot be cached; set teacher.cache to 0"
            )

    @property
    def own_settings(self) -> dict[str, str | int]:
        """What a teacher that is trained does not take from its student, by the field of a run's settings."""
        values = {name: getattr(self, name) for name in _OWN}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def sources(self) -> tuple[str, ...]:
        """The source, or the sources, as a tuple."""
        return (self.source,) if isinstance(self.source, str) else self.source

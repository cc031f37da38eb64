"""Settings of what a step learns from and how: the optimizer, its schedule, and the mixing of images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from longtail.config.types import STRICT, Fraction, Positive, PositiveFloat, Weight
from longtail.errors import LongtailError


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Optimizer and learning rates."""

    __pydantic_config__ = STRICT

    name: Literal["sgd", "adamw"] = "sgd"
    """Optimizer: sgd (with momentum), or adamw, the usual one to fine-tune a pretrained network."""
    learning_rate: PositiveFloat = 0.1
    """Peak learning rate."""
    head_learning_rate: PositiveFloat | None = None
    """Peak learning rate of everything but the encoder; learning_rate if not given."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor of the encoder's learning rate from each layer to the one before it (timm models); 1: equal for all."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum (sgd)."""
    weight_decay: Weight = 5e-4
    """Weight decay; not applied to the temperature and, with adamw, to biases and normalisation layers. From random
    weights the best one falls with the number of steps (docs/methods.md)."""
    head_weight_decay: Weight | None = None
    """Weight decay of everything but the encoder; weight_decay if not given."""
    norm_weight_decay: Weight | None = None
    """Weight decay of biases and normalisation layers; weight_decay with sgd, and 0 with adamw, if not given."""
    head_max_norm: PositiveFloat | None = None
    """Largest norm of a class's weights, to which they are projected after every step (MaxNorm); no limit if not given.
    The scores of a cosine classifier do not depend on the norm; it sets how far a step turns the weights."""
    nesterov: bool = False
    """Use Nesterov momentum (sgd)."""
    grad_clip_norm: PositiveFloat | None = None
    """Clip the gradient to this norm; no clipping if not given."""
    grad_accumulation_steps: Positive = 1
    """Split each batch into this many parts to save memory; the optimizer steps once per batch, along the mean of the
    parts' gradients, weighted by their images. Losses are means over what counts in their part: where the parts differ
    in it, as in labelled pixels or objects, the step differs a little from that of the whole batch."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average of the student's weights, which is then evaluated and saved; none if not
    given."""
    sharpness: Literal["none", "sam", "imbsam", "focal"] = "none"
    """Sharpness-aware steps, along the gradient at the worst weights nearby: sam of the loss of all images (two student
    passes per view), imbsam of that of the tail only (three), focal (Focal-SAM) of that of all images, weighted by how
    rare their class is (three)."""
    rho: PositiveFloat = 0.05
    """How far away the worst weights are, as the norm of the difference [ρ]."""
    sharpness_below: Positive | None = None
    """imbsam: classes with fewer training images are the tail [η]; shots.few_below if not given."""
    sharpness_gamma: Weight = 3.0
    """focal: a class with the share π of the training images has the weight (1 − π)^γ [γ]."""
    sharpness_weight: Weight = 0.8
    """focal: weight of the sharpness beside the loss [λ]."""

    def __post_init__(self) -> None:
        if self.nesterov and self.momentum == 0:
            raise LongtailError("optimizer.nesterov: needs a momentum, got optimizer.momentum 0")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning-rate schedule; durations are fractions of the training, so they follow --epochs."""

    __pydantic_config__ = STRICT

    name: Literal["constant", "multistep", "cosine", "one-cycle"] = "cosine"
    """Shape of the schedule."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of the training with linear warm-up; one-cycle has its own."""
    milestones: tuple[Fraction, ...] = (0.8, 0.9)
    """Fractions of the training at which multistep multiplies the learning rate by gamma."""
    gamma: PositiveFloat = 0.1
    """Factor at each milestone."""

    def __post_init__(self) -> None:
        if self.name == "one-cycle" and self.warmup > 0:
            raise LongtailError(
                f"schedule.warmup {self.warmup:g}: one-cycle rises in the first three tenths by itself; set it to 0"
            )


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """Mixed images: every image of a batch is mixed with another one, and its label with the other label."""

    __pydantic_config__ = STRICT

    kind: Literal["none", "mixup", "cutmix", "remix"] = "none"
    """mixup: a weighted mean of both images; cutmix: a rectangle of the other image; remix: mixup whose label is the
    rarer class's where the class counts are far apart. Views that are not classified are not mixed."""
    alpha: PositiveFloat = 1.0
    """Both parameters of the Beta distribution of an image's own share [α]; 1: uniform, small: hardly mixed."""
    probability: Fraction = 1.0
    """Probability that an image is mixed."""
    until: Fraction = 1.0
    """Fraction of the training after which images are no longer mixed."""
    count_ratio: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 3.0
    """remix: how many times as many training images as the rarer class the other one has at least, where the label is
    the rarer class's [κ]."""
    threshold: Fraction = 0.5
    """remix: the share of the other class's image is below this where the label is the rarer class's [τ]."""

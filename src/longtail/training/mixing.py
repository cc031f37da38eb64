"""Whether a run's settings let images be mixed, and what mixes them."""

from __future__ import annotations

from longtail.config import Config, first_stage_epochs
from longtail.data.mixing import Mixer
from longtail.errors import LongtailError
from longtail.methods.base import LabelKind, Method


def build_mixer(config: Config, method: type[Method], class_counts: list[int], label_kind: LabelKind) -> Mixer | None:
    """Return what mixes the images of a run's batches; None if nothing does.

    Where a teacher is distilled, it sees the mixed images: the student learns its function at the very inputs that it
    is given itself. Of views whose scores were computed beforehand (``teacher.cache``) the probabilities are mixed.

    Args:
        config: settings of the run, without open ones.
        method: what is trained.
        class_counts: (C,) training images per class.
        label_kind: what a label is of.

    Raises:
        LongtailError: mixed images have no meaning for the method, the task or what is tuned.
    """
    settings = config.mixing
    if settings.kind == "none":
        return None
    reason = method.reason_against_mixing(config)
    if label_kind != "image":
        raise LongtailError(f"mixing.kind {settings.kind}: mixes images with one label each; set it to none")
    if config.tune == "head":
        raise LongtailError(
            f"mixing.kind {settings.kind}: mixes images, and tune head trains on kept features; set it to none, or "
            "tune to full"
        )
    if reason:
        raise LongtailError(f"mixing.kind {settings.kind}: method {config.method} {reason}")
    return Mixer(
        settings,
        class_counts,
        config.seed,
        first_stage_epochs(config),
        method.view_plan(config).num_classified,
        config.teacher.distillation_temperature,
    )

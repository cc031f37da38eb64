"""Settings that a recipe leaves to the data: network, epochs, queue, augmentation, each chosen with a reason."""

from __future__ import annotations

import json
from pathlib import Path

from longtail.config import Config
from longtail.data.dataset import LongTailedData
from longtail.data.sources import check_source
from longtail.errors import LongtailError
from longtail.nn.pretrained import PRETRAINED_NETWORK, find_pretrained
from longtail.registry import METHODS, TASKS, TRANSFORMS

_AUTO_STEPS = 20_000
_AUTO_FINE_TUNING_STEPS = 1_000


def find_weights(config: Config) -> Config:
    """Return ``config`` with ``pretrained auto`` replaced by where the weights are; called before images are decoded.

    Raises:
        LongtailError: the data source is wrong, or the weights cannot be reached.
    """
    if config.pretrained != "auto":
        return config
    network = PRETRAINED_NETWORK if config.network == "auto" else config.network
    try:
        return config.replace(network=network, pretrained=find_pretrained(network))
    except LongtailError:
        check_source(config.data)  # of two errors the one in the data is reported
        raise


def auto_config(config: Config, data: LongTailedData) -> tuple[Config, list[str]]:
    """Return ``config`` with every setting chosen that was left open, and the reason of every choice.

    Raises:
        LongtailError: method, network or settings do not fit the task.
    """
    task, method = TASKS[data.task], METHODS[config.method]
    size, images = data.image_size, len(data.train)
    config, reasons = task.auto_config(config, data)
    if config.network == "auto":
        network = task.auto_network(data)
        config = config.replace(network=network)
        reasons.append(f"network {network}: images of {size} × {size} pixels")
    if config.epochs == "auto" and config.pretrained != "none":
        steps = -(-images // config.batch_size)
        config = config.replace(epochs=max(3, min(30, round(_AUTO_FINE_TUNING_STEPS / steps))))
        reasons.append(
            f"epochs {config.epochs}: {steps} steps per epoch with {images:,} images; {_AUTO_FINE_TUNING_STEPS:,} "
            "steps of fine-tuning, between 3 and 30 epochs"
        )
    elif config.epochs == "auto":
        steps = -(-images // config.batch_size)
        config = config.replace(epochs=max(30, min(200, round(_AUTO_STEPS / steps))))
        reasons.append(
            f"epochs {config.epochs}: {steps} steps per epoch with {images:,} images; {_AUTO_STEPS:,} steps, between "
            "30 and 200 epochs"
        )
    config, method_reasons = method.auto_config(
        config, data.class_counts, lambda: _teacher_knows_classes(Path(config.teacher.source), data)
    )
    task.check(config)
    augment = data.augment if config.data.augment == "auto" else config.data.augment
    contrast = config.data.contrast_augment
    if contrast == "auto":
        contrast = TRANSFORMS[augment].contrast or augment
    return config.replace(data={"augment": augment, "contrast_augment": contrast}), [*reasons, *method_reasons]


def _teacher_knows_classes(teacher: Path, data: LongTailedData) -> bool:
    """Return whether a teacher has the classes of the data; what is wrong with a run is reported when it is loaded."""
    try:
        config = json.loads((teacher / "recognizer" / "config.json").read_text(encoding="utf-8"))
        return tuple(config["class_names"]) == data.class_names
    except (OSError, ValueError, KeyError, TypeError):
        return True

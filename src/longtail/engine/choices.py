"""What a recipe leaves to the data: network, epochs, queue, augmentation, each chosen with a reason."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from longtail.config import Config
from longtail.data.dataset import LongTailedData
from longtail.data.per_image import PerImageView
from longtail.data.scenes import DenseData, SceneView
from longtail.data.views import View, build_view
from longtail.errors import LongtailError
from longtail.methods import FOR_PIXELS, ONLY_FOR_PIXELS
from longtail.methods.gml import queue_size
from longtail.nn.segmentation import DECODERS, is_dense

_GREY = {"none", "digits", "cifar-plain"}  # augmentations that do not need colours


def resolve(config: Config, data: LongTailedData) -> Config:
    """Return ``config`` with every choice that was left to the data made.

    A network for the size of the images; the augmentation of their source.
    """
    return explained(config, data)[0]


def explained(config: Config, data: LongTailedData) -> tuple[Config, list[str]]:
    """Return :func:`resolve`'s configuration with the reason of every choice."""
    size, images, reasons = data.image_size, len(data.train), []
    dense = isinstance(data, DenseData)
    if isinstance(data, DenseData) and config.segmentation.crop is None:
        height, width = (min(512, side) for side in data.size)
        config = config.replace(segmentation={"crop": (height, width)})
        reasons.append(f"segmentation.crop {height} {width}: most images are {data.size[0]} × {data.size[1]} pixels")
    if config.network == "auto":
        network = "conv8" if size <= 12 else "resnet32" if size <= 64 else "resnet18"
        network = "upernet:resnet18:64" if dense else network
        config = config.replace(network=network)
        reasons.append(f"network {network}: images of {size} × {size} pixels")
    if config.epochs == "auto":
        steps = -(-images // config.batch_size)
        config = config.replace(epochs=max(30, min(200, round(20_000 / steps))))
        reasons.append(
            f"epochs {config.epochs}: {steps} steps an epoch with {images:,} images; 20,000 steps, 30 to 200 epochs"
        )
    if config.method == "gml" and config.gml.queue_size is None and config.gml.queues != "batch":
        slots = queue_size(config, data.class_counts)
        config = config.replace(gml={"queue_size": slots})
        reasons.append(f"gml.queue_size {slots}: a slot for every training image, at most 16,384")
    if config.method == "gml" and config.gml.distillation_weight is None:
        if config.gml.keys == "momentum":
            weight, reason = 0.0, "no teacher where the keys are the student's own"
        elif config.teacher.source.startswith("timm:"):
            weight, reason = 0.0, "a pretrained teacher has no classifier for these classes"
        elif not _has_these_classes(Path(config.teacher.source), data):
            weight, reason = 0.0, "the teacher's classes are not these"
        else:
            weight, reason = 1.0, "the teacher has a classifier for these classes"
        config = config.replace(gml={"distillation_weight": weight})
        reasons.append(f"gml.distillation_weight {weight:g}: {reason}")
    _check_kind(config, dense)
    augment = data.augment if config.data.augment == "auto" else config.data.augment
    contrast: str = config.data.contrast_augment
    if contrast == "auto":
        contrast = "imagenet-contrast" if augment == "imagenet" else augment
    return config.replace(data={"augment": augment, "contrast_augment": contrast}), reasons


def _check_kind(config: Config, dense: bool) -> None:
    """Refuse what is for whole images where every pixel has a label, and the other way round."""
    method, network, source = config.method, config.network, config.data.source
    if not dense:
        if method in ONLY_FOR_PIXELS:
            raise LongtailError(f"method {method}: is for segmentation, {source} has one label an image")
        if is_dense(network):
            raise LongtailError(f"network {network}: is for segmentation, {source} has one label an image")
        return
    if method not in FOR_PIXELS:
        raise LongtailError(f"method {method}: is for whole images; for {source} there are {', '.join(FOR_PIXELS)}")
    if not is_dense(network):
        raise LongtailError(
            f"network {network}: gives an image one feature; for {source} expected {' or '.join(DECODERS)}:ENCODER, "
            f"{DECODERS[0]}:{network} for one"
        )
    gml, views = config.gml, config.classifier
    refused = {
        "teacher.cache": config.teacher.cache > 0,
        "classifier.views above 1": views.views > 1,
        "classifier.every_view": views.every_view,
    }
    if method == "gml":
        refused |= {
            "gml.share_query false": not gml.share_query,
            "gml.share_key false": not gml.share_key,
            f"gml.keys {gml.keys}": gml.keys != "teacher",
            "gml.borrow": gml.borrow > 0,
            "gml.join_weight": gml.join_weight > 0,
        }
    found = next((name for name, there in refused.items() if there), None)
    if found is not None:
        raise LongtailError(f"{found}: is not to be had for segmentation, which sees every image in one view")


def _has_these_classes(teacher: Path, data: LongTailedData) -> bool:
    """Return whether a run has the classes of the data; what is wrong with one is told when it is loaded."""
    try:
        card = json.loads((teacher / "recognizer" / "config.json").read_text(encoding="utf-8"))
        return tuple(card["class_names"]) == data.class_names
    except (OSError, ValueError, KeyError, TypeError):
        return True


def build_views(config: Config, data: LongTailedData, wanted: Sequence[str]) -> list[View | PerImageView | SceneView]:
    """Return the augmentation of every view, by what it is for.

    Raises:
        LongtailError: some are batched and some are not, or they do not suit the images.
    """
    if isinstance(data, DenseData):
        settings = config.segmentation
        assert settings.crop is not None
        return [SceneView(settings.crop, settings.scale, settings.jitter) for _ in wanted]
    names = {"classification": config.data.augment, "contrast": config.data.contrast_augment}
    chosen = [names[use] for use in wanted]
    one_by_one = [name.startswith("imagenet") for name in chosen]
    if any(one_by_one) != all(one_by_one):
        raise LongtailError(
            f"data.augment {names['classification']} and data.contrast_augment {names['contrast']} do not go together: "
            "the imagenet recipes are drawn an image at a time, the others a batch at a time"
        )
    if len(data.mean) == 1 and any(name not in _GREY for name in chosen):
        raise LongtailError(
            f"data.augment {chosen[0]}: needs images in colour, these are grey; use {', '.join(sorted(_GREY))}"
        )
    size = data.image_size
    return [PerImageView(name, size) if name.startswith("imagenet") else build_view(name, size) for name in chosen]

"""Settings that a recipe leaves open: network, tuning, epochs, queue, augmentation, each chosen with a reason."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from longtail.config import Config, Teacher
from longtail.data.dataset import LongTailedData
from longtail.data.sources import check_source
from longtail.errors import LongtailError
from longtail.nn.backbones import check_network, input_size, is_suited_to_lora, with_adapters, with_input_size
from longtail.nn.network_name import is_decoder_network, parse_network
from longtail.nn.pretrained import PRETRAINED_NETWORK, check_pretrained, find_pretrained
from longtail.nn.text_tower import find_text_tower
from longtail.nn.tuning import ADAPTER_WIDTH
from longtail.registry import METHODS, TASKS, TRANSFORMS
from longtail.training.unused_settings import remarks_on_unused

_AUTO_STEPS = 20_000
_AUTO_FINE_TUNING_STEPS = 1_000


def find_weights(config: Config) -> Config:
    """Return ``config`` with ``pretrained auto`` replaced by where the weights are; called before images are decoded.

    Raises:
        LongtailError: the data source is wrong, there is no such network, its weights cannot be reached or do not fit
            it, or it does not take the settings.
    """
    own = config.teacher
    if own.pretrained is not None and METHODS[config.method].needs_teacher(config):
        network = config.network if own.network == "auto" else own.network
        plain = dataclasses.replace(config, teacher=Teacher(), settings=())
        find_weights(plain.replace(network=network, **own.own_settings))
    network, pretrained = config.network, config.pretrained
    if pretrained != "none" and network == "auto":
        network = PRETRAINED_NETWORK
    if network == "auto":
        return config
    try:
        if not is_decoder_network(network):
            check_network(network)
        if pretrained == "auto":
            pretrained = find_pretrained(network)
        check_pretrained(network, pretrained)
        if config.classifier.init == "text":
            find_text_tower(network, pretrained)
        config = config.replace(network=network, pretrained=pretrained)
        fit_network(config, config.data.image_size)
        return config
    except LongtailError:
        check_source(config.data)  # of two errors the one in the data is reported
        raise


def fine_tuning_epochs(images: int, batch_size: int) -> int:
    """Return the epochs of fine-tuning a pretrained network: about 1,000 steps, between 3 and 30 epochs."""
    return max(3, min(30, round(_AUTO_FINE_TUNING_STEPS / -(-images // batch_size))))


def choose_tune(config: Config) -> tuple[Config, list[str]]:
    """Return ``config`` with ``tune auto`` replaced, and the reason.

    Low-rank updates for a pretrained network that classifies whole images, which were better than all of its weights
    and take less time (docs/evidence/search.md, «A pretrained network»), where most of its parameters are in layers
    that have them; otherwise all of the network. A reason is given where a pretrained network classifies whole images.

    Args:
        config: settings of the run; ``pretrained`` is resolved. With any other ``tune`` they are returned as they are.
    """
    if config.tune != "auto":
        return config, []
    whole_images = not is_decoder_network(config.network)
    if config.pretrained == "none" or not whole_images:
        return config.replace(tune="full"), []
    if not is_suited_to_lora(config.network):
        reason = f"tune full: most parameters of {config.network} are in layers without low-rank updates"
        return config.replace(tune="full"), [reason]
    reason = "tune lora: low-rank updates, for a network with pretrained weights; --tune full trains all of it"
    return config.replace(tune="lora"), [reason]


def auto_config(config: Config, data: LongTailedData, methods: Sequence[str] = ()) -> tuple[Config, list[str]]:
    """Return ``config`` with every setting chosen that was left open, and the reason of every choice.

    Args:
        config: settings of the run.
        data: what it trains on.
        methods: those that have the settings in common, in a comparison; see
            :func:`~longtail.training.unused_settings.remarks_on_unused`.

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
    config, network_reasons = fit_network(config, size)
    config, tune_reasons = choose_tune(config)
    reasons += [*network_reasons, *tune_reasons]
    if config.epochs == "auto" and config.pretrained != "none":
        steps = -(-images // config.batch_size)
        config = config.replace(epochs=fine_tuning_epochs(images, config.batch_size))
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
    sources = config.teacher.sources
    config, method_reasons = method.auto_config(
        config, data.class_counts, lambda: all(_teacher_knows_classes(Path(source), data) for source in sources)
    )
    task.check(config)
    augment = data.augment if config.data.augment == "auto" else config.data.augment
    if config.data.augment == "auto" and augment == "cifar" and config.pretrained != "none":
        augment = "cifar-plain"  # AutoAugment and Cutout need far more epochs than fine-tuning takes
    contrast = config.data.contrast_augment
    if contrast == "auto":
        contrast = TRANSFORMS[augment].contrast or augment
    config = config.replace(data={"augment": augment, "contrast_augment": contrast})
    _check_views(config)
    return config, [*reasons, *method_reasons, *_without_effect(config), *remarks_on_unused(config, methods)]


def _check_views(config: Config) -> None:
    """Raise LongtailError where views would repeat, or a cached score would be of another view than the one shown."""
    method = METHODS[config.method]
    if config.tune == "head" and config.feature_views == 1 and _classifies_several_views(config):
        raise LongtailError(
            f"classifier.views {config.classifier.views}: with tune head and feature_views 1 all views of an image are "
            "the same; set feature_views to 2 or more, or classifier.views to 1"
        )
    plan = method.view_plan(config)
    uses = plan.uses[: plan.num_distilled] if method.distillation_weight(config) else ()
    if config.teacher.cache and "contrast" in uses and config.data.augment != config.data.contrast_augment:
        raise LongtailError(
            f"teacher.cache {config.teacher.cache}: the cached scores are of views by data.augment "
            f"{config.data.augment}, and a distilled view is one by data.contrast_augment "
            f"{config.data.contrast_augment}; set both alike, or teacher.cache to 0"
        )


def least_feature_views(config: Config) -> int:
    """Return how many views of an image ``tune head`` has to keep: 2 where several are classified, by the student or by
    a teacher that is trained first, since those of one would be the same.
    """
    trains_teacher = METHODS[config.method].needs_teacher(config) and config.teacher.sources == ("train",)
    return 2 if _classifies_several_views(config) or (trains_teacher and config.teacher.views > 1) else 1


def _classifies_several_views(config: Config) -> bool:
    return config.classifier.views > 1 and METHODS[config.method].view_plan(config).num_classified > 1


def _without_effect(config: Config) -> list[str]:
    """Return what is set and does not do what its name promises."""
    method, name, notes = METHODS[config.method], config.method, []
    views = config.classifier.views
    one = config.replace(classifier={"views": 1, "agreement_weight": 0.0})
    if views > 1 and method.view_plan(config) == method.view_plan(one):
        notes.append(f"classifier.views {views}: without effect, method {name} chooses its views by its own settings")
    source = config.teacher.source
    if source != "train" and not method.needs_teacher(config) and method.distillation_weight(config) == 0:
        notes.append(
            f"teacher.source: without effect, method {name} learns nothing from a teacher here; with "
            "classifier.distillation_weight 1 (gml: gml.distillation_weight) it is distilled"
        )
    if config.tune != "full" and config.pretrained == "none" and config.init is None:
        notes.append(
            f"tune {config.tune}: what is not tuned keeps its random weights; --pretrained auto or --init RUN gives it "
            "others"
        )
    sampler = config.data.sampler
    of_each_image_once = method.predicts_under(config.replace(data={"sampler": "instance"}))
    if sampler != "instance" and of_each_image_once == "uniform":
        notes.append(
            f"data.sampler {sampler}: it shows rare classes more often, and method {name} corrects for the class "
            "frequencies of the training set too, so that rare classes are favoured twice; usual with it is method ce"
        )
    elif sampler != "instance" and method.predicts_under(config) == "train":
        notes.append(
            f"data.sampler {sampler}: it shows rare classes more often, and predictions under other class frequencies "
            "assume those of the training set, so that rare classes are favoured twice; the row «training» is without"
        )
    return notes


def adapted_network(config: Config) -> str:
    """Return the network with the adapters that ``tune`` asks for.

    Raises:
        LongtailError: it has no adapters.
    """
    kind, _, width = config.tune.partition(":")
    return with_adapters(config.network, int(width or ADAPTER_WIDTH)) if kind == "adapter" else config.network


def fit_network(config: Config, image_size: int | None) -> tuple[Config, list[str]]:
    """Return ``config`` with a network that has the adapters and the input size that the settings ask for.

    A network for images of one size is built for ``network_size``, its own argument ``img_size`` or
    ``data.image_size``; without them, images are resized to its own size.

    Args:
        config: its network is chosen.
        image_size: side in pixels of the images; None if it is not known yet.

    Raises:
        LongtailError: the network has no adapters, or cannot have that size.
    """
    config = config.replace(network=adapted_network(config))
    own = input_size(config.network)
    if own is None:
        return config, []
    named = own if "img_size" in parse_network(config.network)[1] else None
    size = config.network_size or named or config.data.image_size or own
    network = with_input_size(config.network, size)
    if image_size is None or (network, image_size) == (config.network, size):
        return config.replace(network=network), []
    config = config.replace(network=network, network_size=config.network_size or (None if image_size == size else size))
    return config, [f"network {network}: takes images of {size} × {size} pixels"]


def _teacher_knows_classes(teacher: Path, data: LongTailedData) -> bool:
    """Return whether a teacher has the classes of the data; what is wrong with a run is reported when it is loaded."""
    try:
        config = json.loads((teacher / "recognizer" / "config.json").read_text(encoding="utf-8"))
        return tuple(config["class_names"]) == data.class_names
    except (OSError, ValueError, KeyError, TypeError):
        return True

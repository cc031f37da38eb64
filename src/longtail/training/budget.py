"""Settings that fit into a given time: how much of a network is tuned, at what size, for how many epochs."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from longtail.config import Config, load_recipe, read_config, recipe_names
from longtail.data.dataset import LongTailedData
from longtail.data.sources import split_sizes
from longtail.devices import select_device
from longtail.errors import LongtailError
from longtail.inference.kept_features import num_missing_features
from longtail.nn import Encoder
from longtail.nn.backbones import input_size
from longtail.nn.experts import ExpertBackbone
from longtail.nn.network_name import is_decoder_network
from longtail.nn.pretrained import normalization
from longtail.nn.tuning import set_trainable
from longtail.registry import METHODS, TASKS
from longtail.training.auto_config import adapted_network, choose_tune, fine_tuning_epochs, least_feature_views
from longtail.training.duration import Sizes, Speed, expected_seconds, format_duration, measure_speed

_REFERENCE = 128  # side in pixels at which the speed is measured first
_SIDES = tuple(range(96, 225, 16))
_LARGEST_OF_SMALL = 160  # enlarging images of 32 pixels further gains nothing
_USUAL_STEPS, _USUAL_EPOCHS = 600, 6  # with fewer than these a network has not converged
_MOST_EPOCHS = 30
_LEAST_EPOCHS = 3
_MOST_FEATURE_VIEWS = 4
_WORTH_SAYING, _LONG = 20.0, 3600.0  # seconds
_REPORT = 6.0  # seconds for reading the model again, the report, and what else is neither network nor data


@dataclasses.dataclass(frozen=True)
class Choice:
    """Settings with the time that they are expected to take."""

    tune: str
    side: int
    """Side in pixels of the images that the network is given."""
    epochs: int
    feature_views: int
    seconds: float


def sides_up_to(largest: int) -> list[int]:
    """Return the sides in pixels to choose from, for images that have at most ``largest``."""
    return [side for side in _SIDES if side <= largest] or [largest]


def choose(
    config: Config,
    sizes: Sizes,
    speed: Speed,
    seconds: float,
    sides: Sequence[int],
    head: bool = True,
    epochs: int | None = None,
) -> Choice:
    """Return the settings that make the most of a time.

    The network is tuned where that leaves enough epochs; otherwise only the classifier is trained, on features that are
    computed once. Enough are 6 epochs and 600 steps; more than twice as many gain less than larger images do. Of what
    uses the time well, the largest images are taken.

    Args:
        config: settings of the run; ``tune`` is how the network is tuned.
        sizes: images of each split.
        speed: of the network at the smallest side.
        seconds: the time.
        sides: in pixels, in order.
        head: whether ``tune head`` is a choice, see :func:`head_is_possible`; where it is not, the fewest epochs at the
            smallest side are taken if nothing fits.
        epochs: that are given; chosen if None.
    """

    def choice(tune: str, side: int, epochs: int, views: int = 1) -> Choice:
        settings = config.replace(tune=tune, epochs=epochs, feature_views=views)
        expected = expected_seconds(settings, sizes, speed.at((side / sides[0]) ** 2))
        return Choice(tune, side, epochs, views, expected)

    def fitting(epochs: range) -> list[Choice]:
        choices = [choice(config.tune, side, number) for side in sides for number in epochs]
        return [each for each in choices if each.seconds <= seconds]

    def head_only() -> Choice:
        number = epochs or fine_tuning_epochs(sizes.train, config.batch_size)
        views = range(least_feature_views(config), _MOST_FEATURE_VIEWS + 1)
        heads = [choice("head", side, number, each) for side in sides for each in views]
        fits = [each for each in heads if each.seconds <= seconds]
        return max(fits, key=lambda each: each.seconds) if fits else min(heads, key=lambda each: each.seconds)

    if config.tune == "head":
        return head_only()
    if epochs is not None:
        given = fitting(range(epochs, epochs + 1))
        return given[-1] if given else head_only() if head else choice(config.tune, sides[0], epochs)
    steps = -(-sizes.train // config.batch_size)
    enough = min(_MOST_EPOCHS, max(_USUAL_EPOCHS, -(-_USUAL_STEPS // steps)))
    twice = min(_MOST_EPOCHS, 2 * enough)
    usual = fitting(range(enough, twice + 1))
    if usual:
        most = max(each.seconds for each in usual)
        best = max((each for each in usual if each.seconds >= 0.92 * most), key=lambda each: (each.side, each.seconds))
        if best.side == sides[-1] and best.epochs == twice:  # time is left
            best = max(fitting(range(twice, _MOST_EPOCHS + 1)), key=lambda each: (each.side, each.epochs))
        return best
    few = fitting(range(_LEAST_EPOCHS, enough))
    if few:
        return max(few, key=lambda each: (each.epochs, each.seconds))
    return head_only() if head else choice(config.tune, sides[0], _LEAST_EPOCHS)


def head_is_possible(config: Config, encoder: Encoder) -> bool:
    """Return whether the other settings of a run go together with ``tune head``, which would refuse them.

    Args:
        config: settings of the run, with any ``tune``.
        encoder: as the method trains it, see :meth:`longtail.methods.base.Method.prepare_encoder`.
    """
    teacher, frozen = config.teacher, config.replace(tune="head")
    own_encoder = (
        teacher.sources not in {("train",), ("ema",)}
        or teacher.network not in {"auto", config.network}
        or frozen.replace(**teacher.own_settings) != frozen
    )
    if own_encoder and METHODS[config.method].needs_teacher(config):
        return False  # its features are others than those that are kept
    if isinstance(encoder.backbone, ExpertBackbone):
        return False  # whose stages are the experts' own, and have to be trained
    # features take the place of images, which cannot be mixed then, or be on the device
    return config.mixing.kind == "none" and config.accelerator.batches != "device"


def choose_settings(
    config: Config, out: Path, started: float, resume: bool
) -> tuple[Config, list[str], LongTailedData | None]:
    """Return what :func:`fit_to_minutes` does where ``minutes`` is given; a resumed run keeps its choice.

    What is given and was not chosen stays, so that another value than the run's is refused as any other setting is.

    Args:
        config: settings of the run; ``pretrained`` is resolved.
        out: folder of the run.
        started: when the command started, of ``time.monotonic``.
        resume: whether a run that is there is continued.

    Raises:
        LongtailError: see :func:`fit_to_minutes`.
    """
    if config.minutes is None:
        return config, [], None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise LongtailError(
            f"minutes {config.minutes:g}: what fits is measured by one process, and several would choose differently; "
            "set epochs instead"
        )
    if resume and (out / "config.yaml").is_file():
        there = read_config(out / "config.yaml")
        if there.minutes == config.minutes:
            return _with_choice_of(there, config), [], None
    return fit_to_minutes(config, started)


def _with_choice_of(there: Config, config: Config) -> Config:
    """Return ``config`` with what ``minutes`` chose for another run, where it is left open here too."""
    default = _open_settings(config)
    kept: dict[str, object] = {
        name: getattr(there, name)
        for name in ("tune", "epochs", "network_size")
        if getattr(config, name) in {"auto", getattr(default, name)}
    }
    if config.data.image_size == default.data.image_size:
        kept["data"] = {"image_size": there.data.image_size}
    if there.tune == "head":
        kept["feature_views"] = there.feature_views
    return config.replace(**kept)


def _open_settings(config: Config) -> Config:
    """Return the recipe that a run started from: what has its values has not been given."""
    return load_recipe(config.recipe if config.recipe in recipe_names() else "folder").config


def remarks_on_duration(config: Config, data: LongTailedData, encoder: Encoder) -> list[str]:
    """Return what a user should know of how long a run will take on a CPU; empty for one of seconds.

    Accelerators are not measured in advance: what a step takes there depends on how it is launched, and trainings
    beside this one would be counted. See :func:`remark_on_remaining`.

    Args:
        config: settings of the run, without open ones.
        data: what it trains on.
        encoder: the network.
    """
    if TASKS[data.task].label_kind != "image" or config.minutes is not None:
        return []
    sizes = Sizes(len(data.train), 0 if data.val is None else len(data.val), len(data.test))
    speed = measure_speed(encoder, data.image_size, torch.device("cpu"))
    missing = num_missing_features(data, encoder, config) if config.tune == "head" else None
    seconds = expected_seconds(config, sizes, speed, missing)
    if seconds < _WORTH_SAYING:
        return []
    line = f"expected duration: about {format_duration(seconds)} ({config.epochs} epochs of {sizes.train:,} images)"
    if seconds < _LONG:
        return [line]
    head = expected_seconds(config.replace(tune="head"), sizes, speed)
    if config.pretrained == "none":
        return [f"{line}; quicker: start from a pretrained network (--pretrained auto), or a GPU"]
    possible = config.feature_views >= least_feature_views(config) and head_is_possible(config, encoder)
    quicker = f"--tune head (about {format_duration(head)}), " if config.tune != "head" and possible else ""
    return [f"{line}; quicker: {quicker}--minutes 20, or a GPU"]


def remark_on_remaining(epoch_seconds: float, left: int) -> list[str]:
    """Return how long the epochs that are left will take, from one that was measured; empty for seconds."""
    seconds = epoch_seconds * left
    if seconds < _WORTH_SAYING:
        return []
    return [f"expected duration: about {format_duration(seconds)} more ({left} epochs of {epoch_seconds:.1f} s)"]


def fit_to_minutes(config: Config, started: float) -> tuple[Config, list[str], LongTailedData | None]:
    """Choose tuning, size and epochs so that a run takes ``config.minutes``.

    Settings that differ from the recipe's are kept.

    Args:
        config: settings of the run; ``pretrained`` is resolved.
        started: when the command started, of ``time.monotonic``.

    Returns:
        The settings, the reasons, and the data where it had to be loaded to count its images.

    Raises:
        LongtailError: the data cannot be read, or the network is not a pretrained one for whole images.
    """
    minutes = config.minutes
    assert minutes is not None
    if is_decoder_network(config.network):
        raise LongtailError(
            f"minutes: is for networks that classify whole images, not for {config.network}; set --epochs instead"
        )
    if config.pretrained == "none":
        raise LongtailError(
            "minutes: chooses how a pretrained network is tuned; give --pretrained auto, timm or FILE, or set --epochs"
        )
    counts, data = split_sizes(config.data, config.seed)
    side = None if data is None else data.image_size
    sizes = Sizes(counts["train"], counts.get("val", 0), counts["test"])
    device = select_device(config.device)
    default = _open_settings(config)
    tune_is_open = config.tune == default.tune
    config, _ = choose_tune(config)
    encoder = Encoder(adapted_network(config), *normalization(config.network, 3), pretrained=config.pretrained)
    set_trainable(encoder.backbone, config.tune)
    METHODS[config.method].prepare_encoder(encoder, config)
    own = input_size(config.network)  # of a network that takes images of one size
    largest = _LARGEST_OF_SMALL if side is not None and side <= 64 else side or _SIDES[-1]
    sides = sides_up_to(largest) if own is None else [own]
    given = config.data.image_size if side is None else config.network_size
    side_is_open = own is None and given == (default.data.image_size if side is None else default.network_size)
    if own is None and not side_is_open:
        assert given is not None
        sides = [given]
    epochs = None if config.epochs in {"auto", default.epochs} else config.epochs
    reference = min(_REFERENCE, sides[-1]) if own is None else own
    measured = measure_speed(encoder, reference, device)
    left = minutes * 60 - (time.monotonic() - started) - _REPORT
    head = tune_is_open and head_is_possible(config, encoder)
    chosen = choose(config, sizes, measured.at((sides[0] / reference) ** 2), left, sides, head, epochs)
    changes: dict[str, object] = {"tune": chosen.tune}
    if chosen.tune == "head":
        changes["feature_views"] = chosen.feature_views
    changes["epochs"] = chosen.epochs
    if side_is_open and side is None:
        changes["data"] = {"image_size": chosen.side}
    elif side_is_open:
        changes["network_size"] = chosen.side
    config = config.replace(**changes)
    reason = (
        f"minutes {minutes:g}: tune {config.tune}, images of {chosen.side} pixels, "
        f"{chosen.epochs} epoch{'s' * (chosen.epochs != 1)}, "
        f"expected to take {format_duration(time.monotonic() - started + chosen.seconds + _REPORT)} in all (measured: "
        f"{1000 * measured.train:.0f} ms to train on an image of {reference} pixels, {1000 * measured.encode:.0f} ms "
        "to pass it through)"
    )
    if chosen.seconds > left:
        reason += "; no settings are faster" + (" with the epochs that are given" if epochs is not None else "")
    elif chosen.seconds < 0.8 * left and epochs is None and (side_is_open or own is not None):
        reason += "; more time would gain little"
    return config, [reason], data

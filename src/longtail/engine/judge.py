"""Judging a recogniser on a split: every image once, in however many processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from longtail.config import Config, read_config
from longtail.data.dataset import ImageSet, LongTailedData
from longtail.data.loaders import evaluation_batches
from longtail.data.sources import load_data
from longtail.engine.processes import rank, summed, world_size
from longtail.errors import LongtailError
from longtail.evaluation.metrics import metrics, tally
from longtail.recognizer import Card, Recognizer


def judge(recognizer: Recognizer, images: ImageSet, config: Config) -> dict[str, dict[str, Any]]:
    """Return the metrics of a split under the uniform prior and under the training prior, every image seen once."""
    device = recognizer.classifier.weight.device
    recognizer.encoder.eval()
    priors = {prior: recognizer.log_prior(prior) for prior in ("uniform", "train")}
    classes = len(recognizer.card.class_names)
    counted = {prior: torch.zeros(3, classes, dtype=torch.int64, device=device) for prior in priors}
    for views, truth in evaluation_batches(images, recognizer.card.image_size, rank=rank(), world=world_size()):
        scores, labels = recognizer.scores(views.to(device)), truth.to(device)
        for prior, bias in priors.items():
            counted[prior] += tally(scores, labels, None if bias is None else bias.to(device))
    counts, shots = recognizer.card.class_counts, config.shots
    return {prior: metrics(summed(found).cpu(), counts, shots) for prior, found in counted.items()}


def open_finished(run: Path, data_root: str | None = None) -> tuple[Recognizer, Config, LongTailedData]:
    """Return a finished run's recogniser, its settings, and the images that it was trained on and is judged by.

    Args:
        run: its folder.
        data_root: where the images are now, if not where they were.

    Raises:
        LongtailError: the run has not finished, or the images are not those that it was trained on.
    """
    recognizer = Recognizer.load(run)
    recognizer.to("cuda" if torch.cuda.is_available() else "cpu")
    if not (run / "config.yaml").is_file():
        raise LongtailError(f"{run}: has no config.yaml: expected the folder of a run, which names its test set")
    config = read_config(run / "config.yaml")
    if data_root is not None:
        config = config.replace(data={"root": data_root})
    data = load_data(config.data, config.seed)
    if data.class_names != recognizer.card.class_names:
        raise LongtailError(f"{run}: the classes of {config.data.root or config.data.source} are not those of the run")
    if recognizer.card.trained.get("images", data.fingerprint) != data.fingerprint:
        raise LongtailError(
            f"{run}: was trained on other images than {config.data.root or config.data.source} has for training now, "
            "so its test images may be among those it was trained on: give the images as they were"
        )
    return recognizer, config, data


def evaluate(run: Path, prior: str = "uniform", data_root: str | None = None) -> dict[str, Any]:
    """Judge a finished run on its test set.

    Args:
        run: its folder.
        prior: ``uniform`` or ``train``: assumed for the metrics at the top level.
        data_root: where the images are now, if not where they were.

    Returns:
        The metrics under ``prior``, with ``prior``, ``class_names`` and, under ``priors``, those under both.
    """
    recognizer, config, data = open_finished(run, data_root)
    judged = judge(recognizer, data.test, config)
    return described(judged, recognizer.card, prior)


def described(judged: dict[str, dict[str, Any]], card: Card, prior: str = "uniform") -> dict[str, Any]:
    """Return what ``evaluate --json`` holds: the metrics under one prior on top, and what they are of."""
    return {
        **judged[prior],
        "prior": prior,
        "class_names": list(card.class_names),
        "class_counts": list(card.class_counts),
        "priors": judged,
    }

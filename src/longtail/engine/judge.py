"""Judging a recogniser on a split: every image once, in however many processes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from longtail.config import Config, read_config
from longtail.data.dataset import ImageSet, LongTailedData
from longtail.data.loaders import evaluation_batches
from longtail.data.scenes import Scene, SceneImages
from longtail.data.sources import load_data
from longtail.engine.processes import rank, summed, world_size
from longtail.errors import LongtailError
from longtail.evaluation.metrics import metrics, tally
from longtail.evaluation.segmentation import pixel_metrics, tally_pixels
from longtail.objectives.posterior import along
from longtail.recognizer import Card, Recognizer
from longtail.segmenter import Looks, Segmenter, load_kept

_WORST = 6  # images that a report shows


def judge(
    recognizer: Recognizer, images: ImageSet, config: Config, looks: Looks | None = None
) -> dict[str, dict[str, Any]]:
    """Return the metrics of a split under the uniform prior and under the training prior, every image seen once."""
    if isinstance(recognizer, Segmenter):
        return _judge_pixels(recognizer, images, config, looks or Looks(window=config.segmentation.window))
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


def _judge_pixels(segmenter: Segmenter, images: ImageSet, config: Config, looks: Looks) -> dict[str, dict[str, Any]]:
    """Look at one image at a time, so that what comes out depends on neither batches nor processes."""
    device = segmenter.classifier.weight.device
    segmenter.encoder.eval()
    card, held = segmenter.card, images.images
    assert isinstance(held, SceneImages)
    classes = len(card.class_names)
    priors = {prior: segmenter.log_prior(prior) for prior in ("uniform", "train")}
    counted = {prior: torch.zeros(6, classes, dtype=torch.int64, device=device) for prior in priors}
    # pixels of a class that were missed, and pixels taken for it, an image
    wrong = torch.zeros(len(images), classes, dtype=torch.int64, device=device)
    for index, scene in _scenes_ahead(held, range(rank(), len(images), world_size())):
        scores = segmenter.scores(segmenter.prepared(scene.image), looks)
        labels = torch.from_numpy(scene.labels).to(device, torch.int64)
        for prior, bias in priors.items():
            predicted = (scores if bias is None else scores + along(bias.to(scores), scores)).argmax(dim=1)[0]
            found = tally_pixels(predicted, labels, classes, config.segmentation.boundary)
            counted[prior] += found
            if prior == card.predicts_under:
                wrong[index] = found[0] + found[1] - 2 * found[2]
    errors = summed(wrong).cpu()
    judged = {
        prior: pixel_metrics(summed(found).cpu(), card.class_counts, len(images)) for prior, found in counted.items()
    }
    # the worst classes first, each where most goes wrong with it; no image twice
    found_iou = judged[card.predicts_under]["per_class"]
    worst: list[dict[str, int]] = []
    for index in sorted(range(classes), key=lambda c: 100.0 if found_iou[c] is None else found_iou[c]):
        fresh = [
            image
            for image in errors[:, index].argsort(descending=True).tolist()
            if image not in {entry["image"] for entry in worst}
        ]
        if len(worst) < _WORST and fresh and found_iou[index] is not None:
            worst.append({"class": index, "image": fresh[0]})
    judged[card.predicts_under]["worst"] = worst
    return judged


def _scenes_ahead(images: SceneImages, indices: range) -> Iterator[tuple[int, Scene]]:
    """Yield scenes, each decoded while the one before is looked at."""
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(images.scene, indices[0]) if indices else None
        for place, index in enumerate(indices):
            assert pending is not None
            scene = pending.result()
            if place + 1 < len(indices):
                pending = pool.submit(images.scene, indices[place + 1])
            yield index, scene


def open_finished(run: Path, data_root: str | None = None) -> tuple[Recognizer, Config, LongTailedData]:
    """Return a finished run's recogniser, its settings, and the images that it was trained on and is judged by.

    Args:
        run: its folder.
        data_root: where the images are now, if not where they were.

    Raises:
        LongtailError: the run has not finished, or the images are not those that it was trained on.
    """
    recognizer = load_kept(run)
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


def evaluate(
    run: Path, prior: str = "uniform", data_root: str | None = None, looks: Looks | None = None
) -> dict[str, Any]:
    """Judge a finished run on its test set.

    Args:
        run: its folder.
        prior: ``uniform`` or ``train``: assumed for the metrics at the top level.
        data_root: where the images are now, if not where they were.
        looks: how often an image is looked at, of a segmenter.

    Returns:
        The metrics under ``prior``, with ``prior``, ``class_names`` and, under ``priors``, those under both.
    """
    recognizer, config, data = open_finished(run, data_root)
    if looks is not None and not isinstance(recognizer, Segmenter):
        raise LongtailError(f"{run}: is no segmenter: --window, --flip and --scales are for segmentation")
    judged = judge(recognizer, data.test, config, looks)
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

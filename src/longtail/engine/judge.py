"""Judging a recogniser on a split: every image once, in however many processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from longtail.config import Config
from longtail.data.dataset import ImageSet
from longtail.data.loaders import evaluation_batches
from longtail.data.scenes import Scene, SceneImages
from longtail.engine.processes import rank, summed, world_size
from longtail.evaluation.calibration import (
    Reliability,
    added,
    calibration_metrics,
    group_numbers,
    rejection_curve,
    reliability,
)
from longtail.evaluation.metrics import confusions, metrics, mistakes, tally
from longtail.evaluation.segmentation import pixel_metrics, tally_pixels
from longtail.objectives.posterior import along, posterior
from longtail.recognizer import Recognizer
from longtail.segmenter import Looks, Segmenter

_WORST = 6  # images that a report shows


def judge(
    recognizer: Recognizer,
    images: ImageSet,
    config: Config,
    looks: Looks | None = None,
    priors: Mapping[str, Sequence[float]] | None = None,
    known: tuple[Tensor, Tensor] | None = None,
    brief: bool = False,
) -> dict[str, dict[str, Any]]:
    """Return the metrics of a split under several priors, every image seen once.

    Args:
        recognizer: what is judged.
        images: the split.
        config: of the run.
        looks: how often an image is looked at, of a segmenter.
        priors: class frequencies by name, besides ``uniform`` and ``train``.
        known: what :func:`scored` made of the split already, so that no image goes through the network twice.
        brief: accuracies alone, as a look at the validation images needs them; of a classifier.
    """
    if isinstance(recognizer, Segmenter):
        looks = looks or Looks(window=config.segmentation.window)
        return _judge_pixels(recognizer, images, config, looks, _named(priors))
    device = recognizer.classifier.weight.device if known is None else known[0].device
    biases = {name: recognizer.log_prior(given) for name, given in _named(priors)}
    counts, shots = recognizer.card.class_counts, config.shots
    groups = group_numbers(shots.groups(counts)).to(device)
    counted = {name: torch.zeros(3, len(counts), dtype=torch.int64, device=device) for name in biases}
    none = torch.zeros(0, dtype=torch.int64, device=device)  # a process may have no image at all
    nothing = reliability(torch.zeros(0, len(counts), device=device), none, groups)
    trusted = dict.fromkeys(biases, nothing)
    # of every image: the confidence, whether it is right, and what it is taken for
    sure = {name: torch.zeros(3, len(images), dtype=torch.float64) for name in biases}
    place, done = torch.arange(rank(), len(images), world_size()), 0
    for scores, labels in _scored(recognizer, images) if known is None else [known]:
        for name, bias in biases.items():
            bias = None if bias is None else bias.to(scores.device)
            counted[name] += tally(scores, labels, bias)
            if brief:
                continue
            log_p = posterior(scores, bias)
            trusted[name] = added(trusted[name], reliability(log_p, labels, groups))
            best = log_p.max(dim=1)
            told = torch.stack([best.values.exp(), best.indices == labels, best.indices])
            sure[name][:, place[done : done + len(labels)]] = told.cpu().double()
        done += len(labels)
    judged = {name: metrics(summed(found).cpu(), counts, shots) for name, found in counted.items()}
    if brief:
        return judged
    each = {name: summed(values.to(device)).cpu() if world_size() > 1 else values for name, values in sure.items()}
    return {
        name: {
            **found,
            "calibration": {
                **calibration_metrics(Reliability(*(summed(part).cpu() for part in trusted[name]))),
                "rejection": rejection_curve(each[name][0], each[name][1]),
            },
            "confusions": confusions(images.labels, each[name][2].long(), counts),
            "mistakes": mistakes(images.labels, each[name][2].long(), each[name][0], counts),
        }
        for name, found in judged.items()
    }


def _named(priors: Mapping[str, Sequence[float]] | None) -> list[tuple[str, str | Sequence[float]]]:
    return [("uniform", "uniform"), ("train", "train"), *(priors or {}).items()]


def _scored(recognizer: Recognizer, images: ImageSet) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield prior-free scores and labels of this process's part of a split."""
    device = recognizer.classifier.weight.device
    recognizer.encoder.eval()
    for views, truth in evaluation_batches(images, recognizer.card.image_size, rank=rank(), world=world_size()):
        yield recognizer.scores(views.to(device)), truth.to(device)


def scored(recognizer: Recognizer, images: ImageSet) -> tuple[Tensor, Tensor]:
    """Return (N, C) prior-free scores and (N,) labels of a whole split, in its order, in every process."""
    classes, device = len(recognizer.card.class_names), recognizer.classifier.weight.device
    scores, labels = torch.zeros(len(images), classes, device=device), images.labels.to(device)
    place = torch.arange(rank(), len(images), world_size(), device=device)
    done = 0
    for part, _ in _scored(recognizer, images):
        scores[place[done : done + len(part)]] = part
        done += len(part)
    return summed(scores), labels


def _judge_pixels(
    segmenter: Segmenter,
    images: ImageSet,
    config: Config,
    looks: Looks,
    wanted: Sequence[tuple[str, str | Sequence[float]]],
) -> dict[str, dict[str, Any]]:
    """Look at one image at a time, so that what comes out depends on neither batches nor processes."""
    device = segmenter.classifier.weight.device
    segmenter.encoder.eval()
    card, held = segmenter.card, images.images
    assert isinstance(held, SceneImages)
    classes = len(card.class_names)
    priors = {name: segmenter.log_prior(given) for name, given in wanted}
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

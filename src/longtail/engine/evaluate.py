"""A finished run on its test set, under any class frequencies. Legend: N images, C classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtail.config import Config, read_config
from longtail.data.dataset import LongTailedData
from longtail.data.sources import load_data
from longtail.engine.judge import judge, scored
from longtail.errors import LongtailError
from longtail.evaluation.priors import long_tailed_prior, read_prior
from longtail.evaluation.shift import EstimatedPrior, estimate_bbse, estimate_em
from longtail.objectives import posterior
from longtail.recognizer import Card, Recognizer
from longtail.segmenter import Looks, Segmenter, load_kept


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
    run: Path,
    prior: str = "uniform",
    data_root: str | None = None,
    looks: Looks | None = None,
    target: str | None = None,
    imbalance: float = 100.0,
    coverage: float | None = None,
) -> dict[str, Any]:
    """Judge a finished run on its test set.

    Args:
        run: its folder.
        prior: assumed for the metrics at the top level: ``uniform``, ``train``, ``estimate`` (from the test images,
            without a look at their labels), or a file of class frequencies.
        data_root: where the images are now, if not where they were.
        looks: how often an image is looked at, of a segmenter.
        target: class frequencies that the test set is weighed to have: ``forward`` or ``backward`` (a long tail in the
            order of the training set's, or against it), ``uniform``, ``train``, or a file; its own if not given.
        imbalance: of a forward or backward target.
        coverage: of conformal sets, whose sizes and coverage are then told; in (0, 1).

    Returns:
        The metrics under ``prior``, with ``prior``, ``class_names`` and, under ``priors``, those under each; with a
        target, ``target_accuracy`` is the share of right predictions where the classes are so frequent.
    """
    recognizer, config, data = open_finished(run, data_root)
    if looks is not None and not isinstance(recognizer, Segmenter):
        raise LongtailError(f"{run}: is no segmenter: --window, --flip and --scales are for segmentation")
    card, more = recognizer.card, {}
    if isinstance(recognizer, Segmenter) and (target is not None or coverage is not None or prior == "estimate"):
        raise LongtailError(f"{run}: is a segmenter: --target, --coverage and --prior estimate are for whole images")
    wanted = None if target is None else frequencies(target, card, imbalance)
    given: dict[str, Sequence[float]] = {} if wanted is None else {"target": wanted}
    known = None
    if prior == "estimate" or coverage is not None:
        found_scores, found_labels = scored(recognizer, data.test)
        known = scores, labels = found_scores.cpu(), found_labels.cpu()
        if prior == "estimate":
            estimates = _estimates(recognizer, scores, labels, wanted)
            more["estimates"] = {entry.method: dataclasses.asdict(entry) for entry in estimates}
            if wanted is not None and recognizer.held_out is not None:
                # what an estimate is to be measured by: the truth, with the same correction of the scores
                truth = EstimatedPrior("target, corrected", list(wanted), [], [])
                given[truth.method] = recognizer.effective(truth)
            given |= {_row(entry): recognizer.effective(entry) for entry in estimates}
        if coverage is not None:
            more["conformal"] = _conformal(recognizer, scores, labels, coverage, config)
    if prior not in {"uniform", "train", "estimate"}:
        given["given"], prior = frequencies(prior, card), "given"
    judged = judge(recognizer, data.test, config, looks, given, known)
    if wanted is not None:
        for found in judged.values():
            seen = [(q, value) for q, value in zip(wanted, found["per_class"], strict=True) if value is not None]
            found["target_accuracy"] = sum(q * value for q, value in seen) / sum(q for q, _ in seen)
    return {**described(judged, card, prior), **more}


def frequencies(text: str, card: Card, imbalance: float = 100.0) -> list[float]:
    """Return the class frequencies that a word stands for.

    Args:
        text: ``uniform``, ``train``, ``forward``, ``backward``, or a file of them.
        card: names and counts the classes.
        imbalance: of forward and backward, at least 1.
    """
    if text == "uniform":
        return [1 / len(card.class_names)] * len(card.class_names)
    if text == "train":
        return [count / sum(card.class_counts) for count in card.class_counts]
    if text in {"forward", "backward"}:
        if not imbalance >= 1:
            raise LongtailError(f"--imbalance {imbalance:g}: expected at least 1")
        return long_tailed_prior(card.class_counts, text, imbalance)
    if not Path(text).is_file():
        raise LongtailError(f"'{text}': expected uniform, train or a file of class frequencies; there is no such file")
    return read_prior(Path(text), card.class_names)


def _row(estimate: EstimatedPrior) -> str:
    return "estimate" if estimate.method == "map" else estimate.method


def _estimates(
    recognizer: Recognizer, scores: Tensor, labels: Tensor, wanted: Sequence[float] | None
) -> list[EstimatedPrior]:
    """Return what the test images, weighed to a target by their labels, say of the class frequencies without them."""
    weights, drawn = None, torch.arange(len(scores))
    if wanted is not None:
        present = torch.bincount(labels, minlength=len(wanted)).double()
        weights = (torch.tensor(wanted, dtype=torch.float64) / present.clamp(min=1))[labels]
        weights = weights * len(labels) / weights.sum()
        drawn = torch.multinomial(weights, len(labels), replacement=True, generator=torch.Generator().manual_seed(0))
    held_out = recognizer.held_out
    found = [
        recognizer.estimated(scores, weights),
        estimate_em(scores if held_out is None else scores + held_out.bias, weights),
    ]
    if held_out is not None and len(held_out.labels.unique()) == scores.shape[1]:
        guesses = scores.argmax(dim=1)[drawn]
        found.append(estimate_bbse(guesses, held_out.labels, held_out.predicted, scores.shape[1]))
    return found


def _conformal(
    recognizer: Recognizer, scores: Tensor, labels: Tensor, coverage: float, config: Config
) -> dict[str, Any]:
    """Return how large conformal sets are, and how often they hold the truth, over the classes and by shot group."""
    in_set = posterior(scores).exp() >= recognizer.thresholds(coverage).to(scores)
    held = in_set.gather(1, labels[:, None])[:, 0].double()
    groups = config.shots.groups(recognizer.card.class_counts)
    told: dict[str, Any] = {"coverage": coverage}
    for name in ("all", "many", "medium", "few"):
        chosen = torch.tensor([name in {group, "all"} for group in groups])[labels]
        if bool(chosen.any()):
            told[name] = {
                "covered": 100 * float(held[chosen].mean()),
                "size": float(in_set[chosen].sum(dim=1).double().mean()),
            }
    return told


def described(judged: dict[str, dict[str, Any]], card: Card, prior: str = "uniform") -> dict[str, Any]:
    """Return what ``evaluate --json`` holds: the metrics under one prior on top, and what they are of."""
    return {
        **judged[prior],
        "prior": prior,
        "class_names": list(card.class_names),
        "class_counts": list(card.class_counts),
        "priors": judged,
    }

"""A finished classifier under any class frequencies: estimated priors, weighted test sets, conformal sets.

Legend: N images, C classes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longtail.config import Config
from longtail.data.dataset import LongTailedData
from longtail.data.images import Images
from longtail.evaluation.calibration import add_reliability, calibration_metrics, group_numbers, reliability
from longtail.evaluation.class_frequencies import resolve_class_frequencies
from longtail.evaluation.label_shift import MAX_BBSE_CLASSES, EstimatedPrior, estimate_bbse, estimate_em
from longtail.inference.options import InferenceOptions
from longtail.inference.recognizer import Recognizer
from longtail.losses import posterior
from longtail.tasks.base import EvaluationRequest, Metrics, log_priors
from longtail.tasks.classification.calibration import conformal_images
from longtail.tasks.classification.evaluator import collect_logits
from longtail.tasks.classification.tta import choose_tta
from longtail.tasks.evaluate import evaluate_split

_BATCH = 1000  # images at a time, for the memory that those of many classes take


def evaluate_run(
    model: Recognizer, config: Config, data: LongTailedData, request: EvaluationRequest
) -> tuple[dict[str, Metrics], str, dict[str, Any]]:
    """Return metrics by prior, the name of the main prior, and what else was asked for.

    That is estimates, conformal sets, what is predicted of every image (see
    :attr:`~longtail.tasks.base.EvaluationRequest.predictions`), and under ``tta`` what test-time augmentation gains on
    the validation images.
    With a test prior, ``target_accuracy`` and ``target_calibration`` are those of the test set weighted to these class
    frequencies, and so are the conformal sets.
    """
    names, counts = model.config.class_names, model.config.class_counts
    further: dict[str, Any] = {}
    if model.config.temperature_fits:
        further["temperature_fits"] = {
            name: dataclasses.asdict(fit) for name, fit in model.config.temperature_fits.items()
        }
    prior, thresholds = request.prior, None
    if request.coverage is not None:
        thresholds = model.conformal_thresholds(request.coverage, request.options.tta)
    test_prior = None
    if request.test_prior is not None:
        test_prior = resolve_class_frequencies(
            request.test_prior, names, counts, imbalance=request.imbalance, where="--test_prior"
        )
    priors: dict[str, Sequence[float]] = {} if test_prior is None else {"target": test_prior}
    choice = choose_tta(model, data.val, request.options.tta)
    if request.options.tta != "none":
        further["tta"] = choice.as_json()
    outputs = weights = None
    if prior == "estimate" or thresholds is not None or test_prior is not None or request.predictions:
        scores, labels = (tensor.cpu() for tensor in collect_logits(model, data.test, choice.tta))
        positions = torch.arange(len(labels))
        outputs = list(zip(positions.split(_BATCH), scores.split(_BATCH), labels.split(_BATCH), strict=True))
        weights = None if test_prior is None else _label_weights(labels, test_prior)
        if prior == "estimate":
            estimates = _estimate_priors(model, scores, labels, weights)
            further["estimates"] = {entry.method: dataclasses.asdict(entry) for entry in estimates}
            if test_prior is not None and model.calibration_stats is not None:
                # what an estimate is compared with: the true frequencies with the same correction of the scores
                truth = EstimatedPrior("target, corrected", list(test_prior), [], [])
                priors[truth.method] = model.corrected_frequencies(truth)
            for entry in estimates:
                name = "estimate" if entry.method == "map" else entry.method
                priors[name] = model.corrected_frequencies(entry)
        if thresholds is not None:
            assert request.coverage is not None
            further["conformal"] = {
                "coverage": request.coverage,
                **_conformal_sets(model, scores, labels, thresholds, config, weights),
                **conformal_images(model, request.coverage),
            }
    if prior not in {"uniform", "train", "estimate"}:
        priors["given"], prior = resolve_class_frequencies(prior, names, counts), "given"
    options = InferenceOptions(tta=choice.tta)
    metrics = evaluate_split(model, data.test, config, options=options, priors=priors, outputs=outputs)
    if test_prior is not None:
        assert outputs is not None
        assert weights is not None
        group_of = group_numbers(config.shots.groups(counts))
        for name, log_prior in log_priors(model, priors).items():
            values = metrics[name]
            pairs = [(q, value) for q, value in zip(test_prior, values["per_class"], strict=True) if value is not None]
            values["target_accuracy"] = sum(q * value for q, value in pairs) / sum(q for q, _ in pairs)
            log_prior = None if log_prior is None else log_prior.to(scores)
            sums = [reliability(posterior(s, log_prior), y, group_of, weights[rows]) for rows, s, y in outputs]
            values["target_calibration"] = calibration_metrics(functools.reduce(add_reliability, sums))
            del values["target_calibration"]["diagram"]  # its intervals are of images that count alike
    if request.predictions:
        assert outputs is not None
        further["predictions"] = _predictions(outputs, log_priors(model, priors)[prior], data.test.images, names)
    return metrics, prior, further


def _predictions(
    outputs: Sequence[tuple[Tensor, Tensor, Tensor]], log_prior: Tensor | None, images: Images, names: Sequence[str]
) -> list[dict[str, Any]]:
    """Return what is predicted of every image, the most confident errors first, the most confident hits last."""
    rows = []
    for positions, scores, labels in outputs:
        log_p = posterior(scores, None if log_prior is None else log_prior.to(scores))
        best, predicted = log_p.exp().max(dim=1)
        of_label = log_p.exp().gather(1, labels[:, None])[:, 0]
        columns = (positions, labels, predicted, best, of_label)
        for index, label, other, p, own in zip(*(column.tolist() for column in columns), strict=True):
            path = images.name(index) or str(index)
            row = {"path": path, "label": names[label], "class": names[other], "probability": p}
            rows.append((p if label == other else -p, {**row, "label_probability": own}))
    return [row for _, row in sorted(rows, key=lambda entry: entry[0])]


def _label_weights(labels: Tensor, test_prior: Sequence[float]) -> Tensor:
    """Return (N,) weights of sum N, by which the classes that have test images have the frequencies of a test prior."""
    present = torch.bincount(labels, minlength=len(test_prior)).double()
    weights = (torch.tensor(test_prior, dtype=torch.float64) / present.clamp(min=1))[labels]
    return weights * len(labels) / weights.sum()


def _estimate_priors(model: Recognizer, scores: Tensor, labels: Tensor, weights: Tensor | None) -> list[EstimatedPrior]:
    """Return class frequencies estimated from the test images, which may have (N,) weights."""
    drawn = torch.arange(len(scores))
    if weights is not None:
        drawn = torch.multinomial(weights, len(labels), replacement=True, generator=torch.Generator().manual_seed(0))
    stats = model.calibration_stats
    estimates = [
        model.estimate_prior(scores, weights),
        estimate_em(scores if stats is None else scores + stats.bias, weights),
    ]
    if stats is not None and len(stats.labels.unique()) == scores.shape[1] <= MAX_BBSE_CLASSES:
        predicted = scores.argmax(dim=1)[drawn]
        estimates.append(estimate_bbse(predicted, stats.labels, stats.predicted, scores.shape[1]))
    return estimates


def _conformal_sets(
    model: Recognizer, scores: Tensor, labels: Tensor, thresholds: Tensor, config: Config, weights: Tensor | None
) -> dict[str, Any]:
    """Return mean size and coverage of the conformal sets, over all images and by shot group.

    The means are over images with (N,) weights if given.
    """
    in_set = posterior(scores).exp() >= thresholds.to(scores)
    covered, size = in_set.gather(1, labels[:, None])[:, 0].double(), in_set.sum(dim=1).double()
    weights = torch.ones_like(covered) if weights is None else weights
    groups = config.shots.groups(model.config.class_counts)
    summary: dict[str, Any] = {}
    for name in ("all", "many", "medium", "few"):
        share = weights * torch.tensor([name in {group, "all"} for group in groups])[labels]
        if bool(share.sum() > 0):
            share = share / share.sum()
            summary[name] = {"covered": 100 * float(share @ covered), "size": float(share @ size)}
    return summary

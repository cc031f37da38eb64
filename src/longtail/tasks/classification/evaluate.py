"""A finished classifier under any class frequencies: estimated priors, weighted test sets, conformal sets.

Legend: N images, C classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longtail.config import Config
from longtail.data.dataset import LongTailedData
from longtail.evaluation.class_frequencies import resolve_class_frequencies
from longtail.evaluation.label_shift import EstimatedPrior, estimate_bbse, estimate_em
from longtail.inference.options import InferenceOptions
from longtail.inference.recognizer import Recognizer
from longtail.losses import posterior
from longtail.tasks.base import EvaluationRequest, Metrics
from longtail.tasks.classification.calibration import conformal_images
from longtail.tasks.classification.evaluator import collect_logits
from longtail.tasks.classification.tta import choose_tta
from longtail.tasks.evaluate import evaluate_split


def evaluate_run(
    model: Recognizer, config: Config, data: LongTailedData, request: EvaluationRequest
) -> tuple[dict[str, Metrics], str, dict[str, Any]]:
    """Return metrics by prior, the name of the main prior, and what else was asked for.

    That is estimates, conformal sets, and under ``tta`` what test-time augmentation gains on the validation images.
    With a test prior, ``target_accuracy`` is the accuracy where the classes have those frequencies.
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
    outputs = None
    if prior == "estimate" or thresholds is not None:
        scores, labels = (tensor.cpu() for tensor in collect_logits(model, data.test, choice.tta))
        outputs = [(torch.arange(len(labels)), scores, labels)]
        if prior == "estimate":
            estimates = _estimate_priors(model, scores, labels, test_prior)
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
                **_conformal_sets(model, scores, labels, thresholds, config),
                **conformal_images(model, request.coverage),
            }
    if prior not in {"uniform", "train", "estimate"}:
        priors["given"], prior = resolve_class_frequencies(prior, names, counts), "given"
    options = InferenceOptions(tta=choice.tta)
    metrics = evaluate_split(model, data.test, config, options=options, priors=priors, outputs=outputs)
    if test_prior is not None:
        for values in metrics.values():
            pairs = [(q, value) for q, value in zip(test_prior, values["per_class"], strict=True) if value is not None]
            values["target_accuracy"] = sum(q * value for q, value in pairs) / sum(q for q, _ in pairs)
    return metrics, prior, further


def _estimate_priors(
    model: Recognizer, scores: Tensor, labels: Tensor, test_prior: Sequence[float] | None
) -> list[EstimatedPrior]:
    """Return class frequencies estimated from the test images, weighted by label to a test prior if given."""
    weights, drawn = None, torch.arange(len(scores))
    if test_prior is not None:
        present = torch.bincount(labels, minlength=len(test_prior)).double()
        weights = (torch.tensor(test_prior, dtype=torch.float64) / present.clamp(min=1))[labels]
        weights = weights * len(labels) / weights.sum()
        drawn = torch.multinomial(weights, len(labels), replacement=True, generator=torch.Generator().manual_seed(0))
    stats = model.calibration_stats
    estimates = [
        model.estimate_prior(scores, weights),
        estimate_em(scores if stats is None else scores + stats.bias, weights),
    ]
    if stats is not None and len(stats.labels.unique()) == scores.shape[1]:
        predicted = scores.argmax(dim=1)[drawn]
        estimates.append(estimate_bbse(predicted, stats.labels, stats.predicted, scores.shape[1]))
    return estimates


def _conformal_sets(
    model: Recognizer, scores: Tensor, labels: Tensor, thresholds: Tensor, config: Config
) -> dict[str, Any]:
    """Return mean size and coverage of the conformal sets, over all images and by shot group."""
    in_set = posterior(scores).exp() >= thresholds.to(scores)
    covered = in_set.gather(1, labels[:, None])[:, 0].double()
    groups = config.shots.groups(model.config.class_counts)
    summary: dict[str, Any] = {}
    for name in ("all", "many", "medium", "few"):
        chosen = torch.tensor([name in {group, "all"} for group in groups])[labels]
        if bool(chosen.any()):
            summary[name] = {
                "covered": 100 * float(covered[chosen].mean()),
                "size": float(in_set[chosen].sum(dim=1).double().mean()),
            }
    return summary

"""Calibration of a classifier on validation images. Legend: N images, C classes."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from longtail.config import Config
from longtail.data.dataset import ImageSet
from longtail.evaluation.calibration import conformal_interval, conformal_minimum, fit_bias, fit_temperature
from longtail.evaluation.temperature_fit import TemperatureFit
from longtail.inference.model import CalibrationStats
from longtail.inference.recognizer import Recognizer
from longtail.losses import posterior
from longtail.tasks.classification.evaluator import collect_logits


def calibrate(model: Recognizer, images: ImageSet, config: Config) -> Recognizer:
    """Return the model with a temperature fitted on validation images, and its predictions on them."""
    model_config = dataclasses.replace(model.config, temperature=1.0, class_temperatures=(), temperature_fits={})
    calibrated = type(model)(model.encoder, model.classifier, model_config)
    scores, labels = collect_logits(calibrated, images)
    frequencies = torch.bincount(labels, minlength=scores.shape[1]).double()
    log_prior = (frequencies / frequencies.sum()).log()
    fits = {"all": fit_temperature(scores, labels, log_prior)}
    class_temperatures: tuple[float, ...] = ()
    if config.calibration == "group":
        groups = config.shots.groups(model_config.class_counts)
        fits |= fit_group_temperatures(scores, labels, log_prior, groups, fits["all"])
        class_temperatures = tuple(fits[group].temperature for group in groups)
    model_config = dataclasses.replace(
        model_config,
        temperature=fits["all"].temperature,
        class_temperatures=class_temperatures,
        temperature_fits=fits,
    )
    # with the temperature, but these scores are free of the prior already
    calibrated.config = dataclasses.replace(model_config, predicts_under="uniform")
    scores = calibrated.remove_prior(scores)
    probabilities = posterior(scores).exp()
    order = torch.argsort(labels, stable=True)  # every other image of a class goes into each half
    # their difference shows how certain the bias is: it would be none if both were shrunk to 0
    halves = [fit_bias(scores[half], labels[half], log_prior, shrink=False) for half in (order[::2], order[1::2])]
    stats = (
        labels,
        probabilities.argmax(dim=1),
        probabilities.gather(1, labels[:, None])[:, 0],
        fit_bias(scores, labels, log_prior),
        torch.stack(halves),
    )
    # on the host, as after loading
    stats_on_host = CalibrationStats(*(tensor.cpu() for tensor in stats))
    return type(model)(model.encoder, model.classifier, model_config, stats_on_host)


def fit_group_temperatures(
    scores: Tensor, labels: Tensor, log_prior: Tensor, groups: list[str], overall: TemperatureFit
) -> dict[str, TemperatureFit]:
    """Return a temperature for each shot group, fitted on the images predicted to be of it.

    Their prior is the temperature over all images, which a group keeps as long as its images do not show another one.

    Args:
        scores: (N, C) free of the prior.
        labels: (N,) true classes.
        log_prior: (C,) log class frequencies of these images.
        groups: (C,) shot group of each class.
        overall: the temperature over all images.
    """
    fits, predicted, scaled = {}, scores.argmax(dim=1).cpu(), scores / overall.temperature
    for name in dict.fromkeys(groups):
        chosen = torch.tensor([group == name for group in groups])[predicted].to(scores.device)
        if not bool(chosen.any()):
            fits[name] = dataclasses.replace(overall, images=0)
            continue
        fit = fit_temperature(scaled[chosen], labels[chosen], log_prior)
        low, high = (overall.temperature * end for end in fit.interval)
        fits[name] = TemperatureFit(
            temperature=overall.temperature * fit.temperature, interval=(low, high), images=fit.images
        )
    return fits


def conformal_images(model: Recognizer, coverage: float) -> dict[str, Any]:
    """Return how many validation images conformal sets rest on, and how far a class's coverage may be from theirs.

    Args:
        model: one with predictions on validation images.
        coverage: fraction of each class's images, in (0, 1).
    """
    assert model.calibration_stats is not None
    counts = torch.bincount(model.calibration_stats.labels, minlength=len(model.config.class_names))
    minimum = conformal_minimum(coverage)
    fitted = counts[counts >= minimum]
    entry: dict[str, Any] = {
        "validation_images": int(counts.sum()),
        "minimum_per_class": minimum,
        "classes_below_minimum": int((counts < minimum).sum()),
    }
    if len(fitted):  # the class with the fewest images has the widest interval
        fewest = int(fitted.min())
        entry |= {"fewest_per_class": fewest, "coverage_interval": list(conformal_interval(fewest, coverage))}
    return entry

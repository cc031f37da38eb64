"""Calibration of a classifier on validation images. Legend: N images, C classes."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from longtail.config import Config
from longtail.data.dataset import ImageSet
from longtail.evaluation.calibration import fit_bias, fit_temperature
from longtail.inference.model import CalibrationStats
from longtail.inference.model_config import ModelConfig
from longtail.inference.recognizer import Recognizer
from longtail.losses import posterior
from longtail.tasks.classification.evaluator import collect_logits

_MIN_GROUP_IMAGES = 20  # that a shot group needs for a temperature of its own


def calibrate(model: Recognizer, images: ImageSet, config: Config) -> Recognizer:
    """Return the model with a temperature fitted on validation images, and its predictions on them."""
    model_config = dataclasses.replace(model.config, temperature=1.0, class_temperatures=())
    calibrated = type(model)(model.encoder, model.classifier, model_config)
    scores, labels = collect_logits(calibrated, images)
    frequencies = torch.bincount(labels, minlength=scores.shape[1]).double()
    log_prior = (frequencies / frequencies.sum()).log()
    model_config = dataclasses.replace(model_config, temperature=fit_temperature(scores, labels, log_prior))
    if config.calibration == "group":
        temperatures = _group_temperatures(scores, labels, log_prior, model_config, config)
        model_config = dataclasses.replace(model_config, class_temperatures=temperatures)
    # with the temperature, but these scores are free of the prior already
    calibrated.config = dataclasses.replace(model_config, predicts_under="uniform")
    scores = calibrated.remove_prior(scores)
    probabilities = posterior(scores).exp()
    order = torch.argsort(labels, stable=True)  # every other image of a class goes into each half
    halves = [fit_bias(scores[half], labels[half], log_prior) for half in (order[::2], order[1::2])]
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


def _group_temperatures(
    scores: Tensor, labels: Tensor, log_prior: Tensor, model_config: ModelConfig, config: Config
) -> tuple[float, ...]:
    """Return the temperature of every class, that of its shot group: fitted on the images predicted to be of it."""
    groups = config.shots.groups(model_config.class_counts)
    predicted, temperatures = scores.argmax(dim=1).cpu(), {}
    for name in set(groups):
        chosen = torch.tensor([group == name for group in groups])[predicted].to(scores.device)
        enough = int(chosen.sum()) >= _MIN_GROUP_IMAGES
        fitted = fit_temperature(scores[chosen], labels[chosen], log_prior) if enough else model_config.temperature
        temperatures[name] = fitted
    return tuple(temperatures[group] for group in groups)

"""Fitting what a recogniser's probabilities lack, on validation images. Legend: N images, C classes."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from longtail.config import Config
from longtail.data.dataset import ImageSet
from longtail.engine.judge import scored
from longtail.evaluation.calibration import fit_bias, fit_temperature
from longtail.objectives import posterior
from longtail.recognizer import Card, HeldOut, Recognizer

_LEAST_CALIBRATED = 20  # images that a shot group needs for a temperature of its own


def calibrated(recognizer: Recognizer, images: ImageSet, config: Config) -> Recognizer:
    """Return the recogniser with a temperature fitted on the validation images, and what it makes of them."""
    card = dataclasses.replace(recognizer.card, temperature=1.0, class_temperatures=())
    plain = Recognizer(recognizer.encoder, recognizer.classifier, card)
    scores, labels = scored(plain, images)
    frequencies = torch.bincount(labels, minlength=scores.shape[1]).double()
    bias = (frequencies / frequencies.sum()).log()
    card = dataclasses.replace(card, temperature=fit_temperature(scores, labels, bias))
    if config.calibration == "group":
        card = dataclasses.replace(card, class_temperatures=_group_temperatures(scores, labels, bias, card, config))
    # as it predicts from now on
    plain.card = dataclasses.replace(card, predicts_under="uniform")
    scores = plain.free(scores)
    probabilities = posterior(scores).exp()
    # every other image of a class, in order of the classes
    order = torch.argsort(labels, stable=True)
    found = (
        labels,
        probabilities.argmax(dim=1),
        probabilities.gather(1, labels[:, None])[:, 0],
        fit_bias(scores, labels, bias),
        torch.stack([fit_bias(scores[half], labels[half], bias) for half in (order[::2], order[1::2])]),
    )
    # on the host, as it is after loading
    return Recognizer(recognizer.encoder, recognizer.classifier, card, HeldOut(*(tensor.cpu() for tensor in found)))


def _group_temperatures(scores: Tensor, labels: Tensor, bias: Tensor, card: Card, config: Config) -> tuple[float, ...]:
    """Return every class's temperature, its shot group's: fitted on the images that are predicted to be of it."""
    groups = config.shots.groups(card.class_counts)
    predicted, found = scores.argmax(dim=1).cpu(), {}
    for name in set(groups):
        chosen = torch.tensor([group == name for group in groups])[predicted].to(scores.device)
        enough = int(chosen.sum()) >= _LEAST_CALIBRATED
        found[name] = fit_temperature(scores[chosen], labels[chosen], bias) if enough else card.temperature
    return tuple(found[group] for group in groups)

"""Evaluation of a model of any task on a split: every image once, in any number of processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from longtail.config import Config
from longtail.data.dataset import ImageSet, LongTailedData
from longtail.evaluation.class_frequencies import resolve_class_frequencies
from longtail.inference.model import TrainedModel
from longtail.inference.model_config import ModelConfig
from longtail.inference.options import InferenceOptions
from longtail.registry import TASKS
from longtail.tasks.base import Evaluator, Metrics, log_priors


def evaluate_split(
    model: TrainedModel,
    images: ImageSet,
    config: Config,
    *,
    options: InferenceOptions | None = None,
    priors: Mapping[str, Sequence[float]] | None = None,
    outputs: Iterable[tuple[Tensor, Any, Tensor]] | None = None,
    accuracy_only: bool = False,
) -> dict[str, Metrics]:
    """Return the metrics of a split under several priors.

    Args:
        model: what is evaluated.
        images: the split.
        config: settings of the run.
        options: how the scores of an image are computed; those of the run's settings if not given.
        priors: class frequencies by name, besides ``uniform`` and ``train``.
        outputs: positions, scores and labels of the split, if the model has been applied to it already.
        accuracy_only: leave out what a look at the validation images does not need.
    """
    evaluator = TASKS[model.config.task].evaluator(model, images, config, log_priors(model, priors), accuracy_only)
    update_evaluator(evaluator, model, images, config, options, outputs)
    return evaluator.compute()


def update_evaluator(
    evaluator: Evaluator,
    model: TrainedModel,
    images: ImageSet,
    config: Config,
    options: InferenceOptions | None = None,
    outputs: Iterable[tuple[Tensor, Any, Tensor]] | None = None,
) -> None:
    """Add a split to an evaluator, see :func:`evaluate_split`."""
    task = TASKS[model.config.task]
    if outputs is None:
        outputs = task.predict_split(model, images, task.default_options(config) if options is None else options)
    for positions, scores, labels in outputs:
        evaluator.update(positions, scores, labels)


def evaluate_run_under(
    model: TrainedModel,
    config: Config,
    data: LongTailedData,
    prior: str,
    options: InferenceOptions | None = None,
) -> tuple[dict[str, Metrics], str, dict[str, Any]]:
    """Return the metrics of a run on its test set by prior, the main prior, and no further results.

    Args:
        model: of the run.
        config: its settings.
        data: its data.
        prior: uniform, train, or a file of class frequencies.
        options: see :func:`evaluate_split`.

    Raises:
        LongtailError: the frequencies do not fit.
    """
    if prior in {"uniform", "train"}:
        return evaluate_split(model, data.test, config, options=options), prior, {}
    frequencies = resolve_class_frequencies(prior, model.config.class_names, model.config.class_counts)
    return evaluate_split(model, data.test, config, options=options, priors={"given": frequencies}), "given", {}


def format_metrics(metrics: dict[str, Metrics], config: ModelConfig, prior: str = "uniform") -> dict[str, Any]:
    """Return what ``evaluate --json`` holds: the metrics under one prior at the top level, and what they are of."""
    return {
        **metrics[prior],
        "prior": prior,
        "class_names": list(config.class_names),
        "class_counts": list(config.class_counts),
        "priors": metrics,
    }

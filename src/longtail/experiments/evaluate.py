"""Evaluation of a finished run on its test set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longtail.inference.options import InferenceOptions
from longtail.registry import TASKS
from longtail.tasks.base import EvaluationRequest
from longtail.tasks.evaluate import format_metrics
from longtail.tasks.loading import load_run


def evaluate(
    run: Path | str,
    prior: str = "uniform",
    data_root: str | None = None,
    options: InferenceOptions | None = None,
    test_prior: str | None = None,
    imbalance: float = 100.0,
    coverage: float | None = None,
    *,
    predictions: bool = False,
) -> dict[str, Any]:
    """Return the metrics of a finished run on its test set.

    Args:
        run: its folder.
        prior: assumed for the metrics at the top level: ``uniform``, ``train``, ``estimate`` (from the test images
            without their labels), or a file of class frequencies.
        data_root: where the images are now, if not where they were.
        options: how the scores of an image are computed.
        test_prior: class frequencies that the test set is weighted to have: ``forward`` or ``backward`` (a long tail in
            the order of the training set, or reversed), ``uniform``, ``train``, or a file; its own if not given.
        imbalance: imbalance factor of a forward or backward test prior.
        coverage: coverage of conformal sets, in (0, 1), whose size and coverage are then reported.
        predictions: whether to return what is predicted of every test image, see
            :attr:`longtail.tasks.base.EvaluationRequest.predictions`.

    Returns:
        The metrics under ``prior``, with ``prior``, ``class_names`` and, under ``priors``, those under each prior.
    """
    model, config, data = load_run(Path(run), data_root)
    request = EvaluationRequest(
        prior=prior,
        options=options or InferenceOptions(),
        test_prior=test_prior,
        imbalance=imbalance,
        coverage=coverage,
        predictions=predictions,
    )
    metrics, main, further = TASKS[data.task].evaluate_run(model, config, data, request)
    return {**format_metrics(metrics, model.config, main), **further}

"""A new classifier on the encoder of a finished run; see :mod:`longtail.training.second_stage`."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch

from longtail.errors import LongtailError
from longtail.files import make_folder
from longtail.inference.kept_features import feature_data
from longtail.registry import TASKS
from longtail.tasks.loading import load_run
from longtail.training.metric_log import MetricLogger
from longtail.training.run_results import calibrate_model, save_model, write_inputs
from longtail.training.second_stage import HeadSettings, retrain_classifier


@dataclasses.dataclass(frozen=True)
class RebalanceSettings(HeadSettings):
    """How the classifier of a finished run is trained again."""

    views: int = 4
    """V, augmented views of every training image."""


def rebalance(
    run: Path, out: Path, settings: RebalanceSettings, data_root: str | None = None
) -> dict[str, dict[str, Any]]:
    """Train a new classifier on a run's encoder, evaluate it, and save it as a run of its own.

    Args:
        run: folder of a finished run; it is not changed.
        out: folder of the new one: ``config.yaml``, ``metrics.jsonl``, ``recognizer/``.
        settings: how.
        data_root: where the images are now, if not where they were.

    Returns:
        Metrics on the test set, under the prior ``uniform`` and under ``train``.

    Raises:
        LongtailError: the run has not finished, ``out`` is not empty, or a setting is out of its range.
    """
    for name, low in (("epochs", 1), ("views", 1)):
        if getattr(settings, name) < low:
            raise LongtailError(f"--{name} {getattr(settings, name)}: expected at least {low}")
    if settings.tau is not None and not 0 <= settings.tau <= 10:
        raise LongtailError(f"--tau {settings.tau}: expected a value between 0 (no change) and 10")
    if settings.tau is not None and settings.method != "tau":
        raise LongtailError(f"--tau {settings.tau}: is for --method tau, not {settings.method}")
    if out.exists() and any(out.iterdir()):
        raise LongtailError(f"{out}: is not empty; choose another --out")
    # the random state of the caller stays as it is
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        model, config, data = load_run(run, data_root)
        task = TASKS[data.task]
        if task.label_kind != "image":
            raise LongtailError(f"{run}: labels {task.label_kind}; a new classifier is supported for whole images only")
        started = time.monotonic()
        source = data
        if config.tune == "head":  # its features are kept
            data = feature_data(data, model.encoder, config, device=model.device)
        assert isinstance(config.epochs, int)
        # views that the training has not shown
        rebalanced, tau = retrain_classifier(
            model, data, config, settings, views=settings.views, first_view=config.epochs
        )
    training_info = {
        **model.config.training_info,
        "rebalanced": settings.method,
        "rebalanced_seconds": round(time.monotonic() - started, 3),
        **({"tau": tau} if settings.method == "tau" else {}),
    }
    rebalanced.config = dataclasses.replace(rebalanced.config, training_info=training_info)
    rebalanced = calibrate_model(rebalanced, data, config)
    make_folder(out)
    metrics = save_model(out, rebalanced, data, config)
    write_inputs(out, config, source)
    log = MetricLogger(out, also=(), name=out.name, step=0)
    log.add({"kind": "test", "step": 0, **metrics})
    return metrics

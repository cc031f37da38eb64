"""A new classifier on the encoder of a finished run; see :mod:`longtail.training.second_stage`."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch

from longtail.config import Config
from longtail.data.dataset import LongTailedData
from longtail.errors import LongtailError
from longtail.files import make_folder, write_text
from longtail.inference.kept_features import feature_data
from longtail.inference.model import TrainedModel
from longtail.registry import TASKS
from longtail.run_folder import is_partial
from longtail.tasks.loading import load_run
from longtail.training.metric_log import MetricLogger
from longtail.training.run_io import alone_in
from longtail.training.run_results import calibrate_model, save_model, write_inputs
from longtail.training.second_stage import HeadSettings, retrain_classifier

_UNFINISHED = ".rebalance.partial"
"""In a folder whose writing has begun and has not ended, which the same command may replace."""


@dataclasses.dataclass(frozen=True)
class RebalanceSettings(HeadSettings):
    """How the classifier of a finished run is trained again."""

    views: int = 4
    """V, augmented views of every training image."""


def rebalance(
    run: Path | str, out: Path | str, settings: RebalanceSettings, data_root: str | None = None
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
        LongtailError: the run has not finished, ``out`` is not empty, another process writes it, or a setting is out of
            its range. What an interrupted call left in ``out`` is replaced.
    """
    run, out = Path(run), Path(out)
    for name, low in (("epochs", 1), ("views", 1)):
        if getattr(settings, name) < low:
            raise LongtailError(f"--{name} {getattr(settings, name)}: expected at least {low}")
    if settings.tau is not None and not 0 <= settings.tau <= 10:
        raise LongtailError(f"--tau {settings.tau}: expected a value between 0 (no change) and 10")
    if settings.tau is not None and settings.method != "tau":
        raise LongtailError(f"--tau {settings.tau}: is for --method tau, not {settings.method}")
    _check_out(out)
    # the random state of the caller stays as it is
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        model, config, data = load_run(run, data_root)
        kind = TASKS[data.task].label_kind
        if kind != "image":
            raise LongtailError(f"{run}: labels {kind}; a new classifier is supported for whole images only")
        with alone_in(out):
            _check_out(out)  # another process may have finished it meanwhile
            return _rebalance(model, config, data, out, settings)


def _check_out(out: Path) -> None:
    written = out.exists() and any(not is_partial(path.name) for path in out.iterdir())
    if written and not (out / _UNFINISHED).exists():
        raise LongtailError(f"{out}: is not empty; choose another --out")


def _rebalance(
    model: TrainedModel, config: Config, source: LongTailedData, out: Path, settings: RebalanceSettings
) -> dict[str, dict[str, Any]]:
    started = time.monotonic()
    # its features are kept
    data = feature_data(source, model.encoder, config, device=model.device) if config.tune == "head" else source
    assert isinstance(config.epochs, int)
    # views that the training has not shown
    rebalanced, tau = retrain_classifier(model, data, config, settings, views=settings.views, first_view=config.epochs)
    training_info = {
        **model.config.training_info,
        "rebalanced": settings.method,
        "rebalanced_seconds": round(time.monotonic() - started, 3),
        **({"tau": tau} if settings.method == "tau" else {}),
    }
    rebalanced.config = dataclasses.replace(rebalanced.config, training_info=training_info)
    rebalanced = calibrate_model(rebalanced, data, config)
    make_folder(out)
    write_text(out / _UNFINISHED, "")
    metrics = save_model(out, rebalanced, data, config)
    write_inputs(out, config, source)
    log = MetricLogger(out, also=(), name=out.name, step=0)
    log.add({"kind": "test", "step": 0, **metrics})
    (out / _UNFINISHED).unlink()
    return metrics

"""What a finished run leaves in its folder beside its log; written in the same way by a training and a rebalancing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from longtail.config import Config
from longtail.data.dataset import LongTailedData
from longtail.distributed import rank
from longtail.files import write_text
from longtail.inference.model import TrainedModel
from longtail.registry import TASKS
from longtail.tasks.base import log_priors
from longtail.tasks.evaluate import update_evaluator
from longtail.training.run_io import write_image_results, write_unreadable
from longtail.training.seen_images import write_train_images


def write_inputs(folder: Path, config: Config, data: LongTailedData) -> None:
    """Write the settings of a run, its training images, and the images that could not be read."""
    if rank() == 0:
        write_text(folder / "config.yaml", config.to_yaml())
        write_train_images(folder, config, data)
    write_unreadable(folder, data)


def calibrate_model(model: TrainedModel, data: LongTailedData, config: Config) -> TrainedModel:
    """Return the model with scores calibrated on the validation images; as it is where there are none."""
    return model if data.val is None else TASKS[data.task].calibrate(model, data.val, config)


def save_model(folder: Path, model: TrainedModel, data: LongTailedData, config: Config) -> dict[str, dict[str, Any]]:
    """Save a trained model with its test metrics, and the test images that a report shows.

    Returns:
        Metrics on the test set, under the prior ``uniform`` and under ``train``.
    """
    task = TASKS[data.task]
    evaluator = task.evaluator(model, data.test, config, log_priors(model), accuracy_only=False)
    update_evaluator(evaluator, model, data.test, config)
    metrics = evaluator.compute()
    of_images = {} if config.recipe == "teacher" else evaluator.image_results()
    model.config = dataclasses.replace(model.config, metrics=metrics["uniform"])
    if rank() == 0:
        model.save(folder / "recognizer")
        if of_images:
            write_image_results(folder, of_images)
        if config.recipe != "teacher":
            task.save_examples(folder, data.test, metrics[model.config.predicts_under])
    return metrics

"""Models and finished runs of any task."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from longtail.config import Config, read_config
from longtail.data.dataset import LongTailedData
from longtail.data.paths import find_path
from longtail.data.run_tables import with_tables
from longtail.data.sources import load_data
from longtail.data.sources.unreadable import log_unreadable
from longtail.devices import select_device
from longtail.errors import LongtailError
from longtail.inference.model import TrainedModel
from longtail.inference.model_config import read_model_config
from longtail.registry import TASKS

logger = logging.getLogger(__name__)


def load_model(folder: Path | str) -> TrainedModel:
    """Read a model of any task from its folder, or from the folder of its run.

    Raises:
        LongtailError: there is none, or its files do not fit together.
    """
    model: TrainedModel = TASKS[read_model_config(folder).task].model_class.load(folder)
    return model


def load_run(run: Path, data_root: str | None = None) -> tuple[TrainedModel, Config, LongTailedData]:
    """Return the model of a finished run, its settings, and its data.

    Args:
        run: its folder.
        data_root: where the images are now, if not where they were.

    Raises:
        LongtailError: the run has not finished, or the images are not those that it was trained on.
    """
    model = load_model(run).to(select_device())
    if not (run / "config.yaml").is_file():
        raise LongtailError(f"{run}: has no config.yaml: expected the folder of a run, which names its test set")
    config = read_config(run / "config.yaml")
    if data_root is not None:
        config = config.replace(data={"root": data_root})
    config = dataclasses.replace(config, data=with_tables(run, config.data))
    root = config.data.root
    if root is not None and not find_path(Path(root)).exists():
        raise LongtailError(
            f"{root}: there is no such folder, where the images were; say where they are: --root FOLDER"
        )
    data = load_data(config.data, config.seed)
    log_unreadable(data)
    source = config.data.root or config.data.source
    if data.class_names != model.config.class_names:
        raise LongtailError(f"{run}: the classes of {source} are not those of the run")
    if model.config.training_info.get("images", data.fingerprint) != data.fingerprint:
        raise LongtailError(
            f"{run}: was trained on other images than {source} has for training now, so its test images may be among "
            "those it was trained on: give the images as they were"
        )
    if model.config.training_info.get("test_images") not in {None, data.fingerprints["test_images"]}:
        logger.info("%s: has other test images than when it was trained: its metrics are not those of then", run)
    return model, config, data

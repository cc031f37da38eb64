"""Shared by the tests: real digits, a network of 2,000 parameters, folders of images, and the command line."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from longtail.cli import main
from longtail.config import Config, load_recipe
from longtail.inference.model_config import ModelConfig

# no test asks a network for anything; the library reads this once, when it is imported
os.environ["HF_HUB_OFFLINE"] = "1"

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep resized copies and features out of the user's cache, in this process and in those that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LONGTAIL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _logger() -> Iterator[None]:
    """Undo what a command does to the package's logger, so that the next test can see its messages."""
    logger = logging.getLogger("longtail")
    state = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = state


@pytest.fixture
def random_seed() -> int:
    """A seed that is another one in every run; LONGTAIL_TEST_SEED repeats a run that has failed."""
    text = os.environ.get("LONGTAIL_TEST_SEED")
    seed = int.from_bytes(os.urandom(4), "big") if text is None else int(text)
    print(f"LONGTAIL_TEST_SEED={seed}")  # which pytest shows with a failure
    return seed


@pytest.fixture
def tiny() -> Config:
    """digits-lt on a network of 2,000 parameters, for two epochs, with the paper's three views."""
    config = load_recipe("digits-lt").config
    return config.replace(network="conv8-tiny", epochs=2, checkpoint_seconds=0.0, gml={"share_query": False})


TINY = ["--network", "conv8-tiny", "--epochs", "2", "--quiet"]


@pytest.fixture
def cifar_folder() -> Path:
    folder = SHARED / "cifar100"
    if not folder.is_dir():
        pytest.skip("needs CIFAR-100 in ../shared/data/cifar100")
    return folder


def small_card(class_names: tuple[str, ...], class_counts: tuple[int, ...], **changes: Any) -> ModelConfig:
    """Return the configuration of a model of grey 8 × 8 images."""
    values: dict[str, Any] = {
        "class_names": class_names,
        "class_counts": class_counts,
        "network": "conv8-tiny",
        "scale": 30.0,
        "mean": (0.5,),
        "std": (0.5,),
        "image_size": 8,
        "stored_size": 8,
        "predicts_under": "uniform",
    }
    return ModelConfig(**(values | changes))


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run the command line in this process; returns its exit code, output and errors."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["longtail", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def save_image(path: Path, size: tuple[int, int] = (16, 16), seed: int = 0, mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of three classes with 12, 6 and 3 images."""
    root = tmp_path / "photos"
    for index, (name, count) in enumerate({"cat": 12, "dog": 6, "emu": 3}.items()):
        for number in range(count):
            save_image(root / name / f"{number}.png", seed=100 * index + number)
    return root


def save_scene(
    root: Path, split: str, name: str, values: np.ndarray, seed: int = 0, mode: str = "L"
) -> tuple[Path, Path]:
    """Write an annotation and an image whose colours tell its values, with noise; returns both paths."""
    image = root / "images" / split / f"{name}.png"
    mask = root / "annotations" / split / f"{name}.png"
    for path in (image, mask):
        path.parent.mkdir(parents=True, exist_ok=True)
    colors = np.array([(0, 0, 0), (220, 40, 40), (40, 200, 60), (60, 60, 220)], dtype=np.int16)
    noise = np.random.default_rng(seed).integers(-25, 26, (*values.shape, 3))
    Image.fromarray((colors[values % 4] + noise).clip(0, 255).astype(np.uint8)).save(image)
    Image.fromarray(values.astype(np.uint8)).save(mask)
    return image, mask


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """Twelve images to train on, four to validate with and six to be tested on: three classes, the last one rare."""
    root = tmp_path / "scenes"
    rng = np.random.default_rng(0)
    for split, count in {"training": 12, "validation": 4, "test": 6}.items():
        for number in range(count):
            values = np.ones((50, 66), dtype=np.uint8)
            values[rng.integers(15, 35) :] = 2
            values[:2] = 0
            if number % 3 == 0:
                top, left = rng.integers(0, 36), rng.integers(0, 50)
                values[top : top + 12, left : left + 12] = 3
            save_scene(root, split, f"{number:02}", values, seed=number)
    (root / "classes.txt").write_text("sky\nground\nsign\n")
    return root


@pytest.fixture
def segmenting(scenes: Path) -> Config:
    """A segmentation of these scenes by a network of 100,000 parameters, for two epochs."""
    config = load_recipe("camvid").config.replace(
        method="la", network="upernet:test_efficientnet:8", pretrained="none", epochs=2, batch_size=4, validate_every=1
    )
    return config.replace(
        data={"source": "masks", "root": str(scenes), "workers": 0},
        gml={"queue_size": 64, "queue_minimum": 4, "embedding_dim": 8},
        segmentation={"crop": (48, 64), "pixels_per_image": 16},
        optimizer={"learning_rate": 0.1},
    )

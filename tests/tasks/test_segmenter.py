"""A segmenter: what memory it takes, images that need more of it than there is, its model card and worst examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from longtail import Segmenter
from longtail.config import Config
from longtail.data.dataset import ImageSet
from longtail.data.palette import class_colors
from longtail.errors import LongtailError
from longtail.inference.label_images import overlay, predict_label_images
from longtail.inference.model_config import ModelConfig
from longtail.inference.options import InferenceOptions
from longtail.losses import posterior
from longtail.nn import Encoder
from longtail.tasks.segmentation.evaluator import SegmentationEvaluator
from tests.conftest import Command, save_image

pytest.importorskip("segmentation_models_pytorch")
SIDE = 320


def build_segmenter(classes: int, predicts_under: Literal["uniform", "train"] = "train") -> Segmenter:
    config = ModelConfig(
        class_names=tuple(f"class {number}" for number in range(classes)),
        class_counts=tuple(range(1, classes + 1)),
        network="upernet:test_efficientnet:8",
        task="segmentation",
        scale=30.0,
        mean=(0.5, 0.5, 0.5),
        std=(0.2, 0.2, 0.2),
        image_size=SIDE,
        stored_size=SIDE,
        shape=(SIDE, SIDE),
        predicts_under=predicts_under,
    )
    encoder = Encoder(config.network, config.mean, config.std, build=Segmenter.build_backbone)
    return Segmenter(encoder, Segmenter.build_classifier(config, encoder), config)


class Allocations(TorchDispatchMode):
    """Counts the tensors of at least some number of values that operations return in new memory."""

    def __init__(self, values: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.values, self.count = values, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() >= self.values:
            given = {each.untyped_storage().data_ptr() for each in args if isinstance(each, torch.Tensor)}
            self.count += result.untyped_storage().data_ptr() not in given
        return result


@pytest.mark.parametrize("window", [None, 96])
def test_the_scores_of_an_image_are_in_memory_once(window: int | None) -> None:
    segmenter = build_segmenter(classes := 40)
    image = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    options = InferenceOptions(sliding_window=window)
    with Allocations(classes * SIDE * SIDE) as allocations:
        labels = next(segmenter.segment(image, "train", options))
    assert allocations.count == 1
    scores = segmenter.scores(segmenter.preprocess(Image.fromarray(image)), options)
    assert torch.equal(labels, posterior(scores, segmenter.log_prior("train")).argmax(dim=1)[0])


def test_an_image_for_which_there_is_no_memory_is_named_and_the_others_are_labelled(tmp_path: Path) -> None:
    files = [save_image(tmp_path / f"{name}.png", (size, 9)) for name, size in zip("abcd", (8, 9, 10, 11), strict=True)]

    def predict(image: Image.Image) -> Any:
        if image.width == 9:
            torch.empty(2**58)
        if image.width == 10:
            np.empty(2**58)
        return np.zeros(image.size[::-1], dtype=np.int64)

    output = predict_label_images(files, predict, ["sky", "ground"], tmp_path / "out")
    assert [record["path"] for record in output.records] == [str(files[0]), str(files[3])]
    assert list(output.unreadable) == files[1:3]
    message = "b.png: labelling its pixels needs more memory than there is; shrink it"
    assert output.unreadable[files[1]].endswith(message)
    with pytest.raises(LongtailError, match="needs more memory than there is"):
        predict_label_images(files[1:3], predict, ["sky", "ground"], tmp_path / "out")
    with pytest.raises(RuntimeError, match="a fault of the program"):
        predict_label_images(files, lambda _: _fail(), ["sky", "ground"], tmp_path / "out")


def _fail() -> Any:
    raise RuntimeError("a fault of the program")


def test_an_overlay_of_a_high_image_mixes_every_row() -> None:
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (700, 5, 3), dtype=np.uint8), rng.integers(-1, 3, (700, 5))
    colors = np.array(class_colors(3), dtype=np.float32)[labels.clip(min=0)]
    expected = np.where((labels >= 0)[..., None], 0.6 * colors + 0.4 * pixels.astype(np.float32), pixels).round()
    assert np.array_equal(np.asarray(overlay(Image.fromarray(pixels), labels, 3)), expected.astype(np.uint8))


def test_the_model_card_does_not_ask_for_validation_images(tmp_path: Path) -> None:
    build_segmenter(3).save(tmp_path)
    assert "Probabilities were not calibrated.\n" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_no_image_without_wrong_pixels_is_an_example_of_a_class() -> None:
    labels = torch.tensor([[[0, 1, 1, 2]], [[0, 1, 2, 2]]])
    predicted = torch.tensor([[[1, 0, 0, 2]], [[0, 1, 2, 2]]])  # classes 0 and 1 are wrong in the first image alone
    segmenter = build_segmenter(3)
    images = ImageSet([None, None], torch.zeros(2), torch.arange(2))  # type: ignore[arg-type]
    evaluator = SegmentationEvaluator(segmenter, images, Config(), {"train": None}, accuracy_only=True)
    for position in range(2):
        scores = torch.nn.functional.one_hot(predicted[position], 3).permute(2, 0, 1)[None].float()
        evaluator.update(torch.tensor([position]), scores, labels[position][None])
    (worst,) = evaluator.compute()["train"]["worst"]
    assert worst["image"] == 0
    assert worst["class"] in {0, 1}


def test_predictions_are_made_on_the_device_that_there_is(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_segmenter(3).save(tmp_path / "model")
    devices: list[torch.device] = []
    real = Segmenter.to
    monkeypatch.setattr("longtail.devices.select_device", lambda: torch.device("cpu", 0))

    def moved(model: Segmenter, device: torch.device) -> Segmenter:
        devices.append(device)
        return real(model, device)

    monkeypatch.setattr(Segmenter, "to", moved)
    table = tmp_path / "p.json"
    image = save_image(tmp_path / "a.png", (40, 40))
    assert command("predict", tmp_path / "model", image, "--out", tmp_path / "out", "--json", table)[0] == 0
    assert len(json.loads(table.read_text(encoding="utf-8"))) == 1
    assert devices == [torch.device("cpu", 0)]

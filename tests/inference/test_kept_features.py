"""``tune head``: features of a frozen network that are computed once, kept on disk, and used by every run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from longtail import Recognizer
from longtail.config import Config
from longtail.data.dataset import LongTailedData
from longtail.data.sources import load_data
from longtail.errors import LongtailError
from longtail.experiments.rebalance import RebalanceSettings, rebalance
from longtail.inference.kept_features import FeatureImages, draw_view, feature_data, num_missing_features
from longtail.nn import Encoder, FrozenEncoder
from longtail.tasks.evaluate import evaluate_split
from longtail.training.trainer import fit


@pytest.fixture
def frozen(tiny: Config, tmp_path: Path) -> Config:
    """digits-lt on the features of a network of random weights."""
    changes: dict[str, Any] = {"data": {"cache": str(tmp_path / "cache"), "val_fraction": 0.2, "augment": "digits"}}
    return tiny.replace(method="la", network="conv8", tune="head", classifier={"init": "class_means"}, **changes)


def count_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the number of images of every pass through a frozen encoder; features do not count."""
    passes: list[int] = []
    forward = FrozenEncoder.forward

    def counted(self: FrozenEncoder, images: torch.Tensor) -> torch.Tensor:
        if images.ndim == 4:
            passes.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(FrozenEncoder, "forward", counted)
    return passes


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "recognizer" / "model.safetensors")


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def digits(config: Config) -> tuple[LongTailedData, Encoder]:
    data = load_data(config.data, 0)
    torch.manual_seed(0)
    return data, Encoder("conv8", data.mean, data.std)


def test_every_image_passes_the_network_once(frozen: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = count_passes(monkeypatch)
    data = load_data(frozen.data, 0)
    assert data.val is not None
    fit(frozen, tmp_path / "first", quiet=True)
    assert sum(passes) == len(data.train) + len(data.val) + len(data.test)
    passes.clear()
    fit(frozen, tmp_path / "second", quiet=True)
    assert sum(passes) == 0
    assert equal(weights(tmp_path / "first"), weights(tmp_path / "second"))
    # another method and another split of the same images need no pass; the network of another seed is another one
    fit(frozen.replace(method="ce", data={"val_fraction": 0.0}), tmp_path / "third", quiet=True)
    added = len(load_data(frozen.replace(data={"val_fraction": 0.0}).data, 0).train) - len(data.train) - len(data.val)
    assert sum(passes) <= max(added, 0) + len(data.train)
    passes.clear()
    fit(frozen.replace(seed=1), tmp_path / "fourth", quiet=True)
    assert sum(passes) > 0


def test_the_model_takes_images_and_gives_what_the_features_gave(frozen: Config, tmp_path: Path) -> None:
    run = fit(frozen.replace(epochs=5), tmp_path / "run", quiet=True)
    data = load_data(frozen.data, 0)
    metrics = evaluate_split(Recognizer.load(tmp_path / "run"), data.test, frozen)
    assert metrics["uniform"]["balanced_accuracy"] == pytest.approx(run.metrics["balanced_accuracy"], abs=0.3)
    assert run.metrics["balanced_accuracy"] > 60  # even a random network's features tell digits apart
    assert run.model_config.stored_size == 8


def test_a_stop_keeps_what_is_computed_and_the_result_is_the_same(frozen: Config) -> None:
    data, encoder = digits(frozen)
    config = frozen.replace(feature_views=2)
    device = torch.device("cpu")

    class StoppedError(Exception):
        pass

    for stop_after in (1, 2, 3):
        calls = 0

        def check(limit: int = stop_after) -> None:
            nonlocal calls
            calls += 1
            if calls > limit:
                raise StoppedError

        with pytest.raises(StoppedError):
            feature_data(data, encoder, config, device=device, check=check)
    resumed = feature_data(data, encoder, config, device=device)
    whole = feature_data(data, encoder, config.replace(data={"cache": "none"}), device=device)
    for ours, theirs in ((resumed.train, whole.train), (resumed.test, whole.test)):
        assert isinstance(ours.images, FeatureImages)
        assert isinstance(theirs.images, FeatureImages)
        for a, b in zip(ours.images.features, theirs.images.features, strict=True):
            assert torch.equal(a, b)


def test_views_of_an_image_are_drawn_alike_by_its_id(frozen: Config) -> None:
    data, encoder = digits(frozen)
    kept = feature_data(data, encoder, frozen.replace(feature_views=3), device=torch.device("cpu"))
    images = kept.train.images
    assert isinstance(images, FeatureImages)
    plain, first, second = images.features
    assert not torch.equal(plain, first)
    assert not torch.equal(first, second)
    rows = torch.arange(len(kept.train))
    drawn = draw_view(images.take(rows), kept.train.ids, (0, 1))
    again = draw_view(images.take(rows.flip(0)), kept.train.ids.flip(0), (0, 1)).flip(0)
    assert torch.equal(drawn, again)
    shares = [float((drawn == view).all(dim=1).float().mean()) for view in (plain, first, second)]
    assert all(0.2 < share < 0.5 for share in shares), shares
    assert torch.equal(images.plain(rows[:5], 8), plain[:5])


def test_features_without_augmentation_are_the_networks(frozen: Config) -> None:
    data, encoder = digits(frozen)
    kept = feature_data(data, encoder, frozen, device=torch.device("cpu"))
    expected = encoder.eval()(data.test.images.plain(torch.arange(20), 8))
    assert torch.allclose(kept.test.images.plain(torch.arange(20), 8), expected, atol=1e-4)


def test_what_is_left_to_compute_is_counted(frozen: Config) -> None:
    data, encoder = digits(frozen)
    assert data.val is not None
    others = len(data.val) + len(data.test)
    assert num_missing_features(data, encoder, frozen) == len(data.train) + others
    feature_data(data, encoder, frozen, device=torch.device("cpu"))
    assert num_missing_features(data, encoder, frozen) == 0
    assert num_missing_features(data, encoder, frozen.replace(feature_views=3)) == 2 * len(data.train)
    without = frozen.replace(data={"cache": "none"})
    assert num_missing_features(data, encoder, without) == len(data.train) + others


def test_a_changed_image_or_network_is_computed_again(frozen: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    data, encoder = digits(frozen)
    passes = count_passes(monkeypatch)
    device = torch.device("cpu")
    feature_data(data, encoder, frozen, device=device)
    passes.clear()
    data.test.images.pixels[3] += 1  # type: ignore[attr-defined]
    feature_data(data, encoder, frozen, device=device)
    assert passes == [1]
    passes.clear()
    with torch.no_grad():
        next(encoder.parameters()).add_(1.0)
    feature_data(data, encoder, frozen, device=device)
    assert sum(passes) == sum(len(split) for split in (data.train, data.val, data.test) if split is not None)


def test_gml_and_its_teacher_train_on_the_same_features(
    frozen: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = count_passes(monkeypatch)
    fit(frozen, tmp_path / "la", quiet=True)
    passes.clear()
    fit(frozen.replace(method="gml"), tmp_path / "run", quiet=True)
    assert passes == []
    assert (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").count("loss/mixture") == 2


def test_a_teacher_with_another_network_is_refused(frozen: Config, tmp_path: Path) -> None:
    config = frozen.replace(method="gml", teacher={"network": "conv8-tiny"})
    with pytest.raises(LongtailError, match="the teacher must have the same encoder"):
        fit(config, tmp_path / "run", quiet=True)


def test_rebalancing_uses_the_kept_features(frozen: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(frozen, tmp_path / "run", quiet=True)
    passes = count_passes(monkeypatch)
    metrics = rebalance(tmp_path / "run", tmp_path / "crt", RebalanceSettings("crt"))
    assert passes == []
    assert metrics["uniform"]["balanced_accuracy"] > 60


def test_a_resumed_run_equals_an_uninterrupted_one(frozen: Config, tmp_path: Path) -> None:
    config = frozen.replace(epochs=3, feature_views=2)
    fit(config, tmp_path / "whole", quiet=True)
    fit(config, tmp_path / "cut", quiet=True)
    # as if the process had been killed after training and before the model was saved
    for file in (tmp_path / "cut" / "recognizer").iterdir():
        file.unlink()
    fit(config, tmp_path / "cut", resume=True, quiet=True)
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_a_cache_that_cannot_be_written_is_one_line(frozen: Config, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = dataclasses.replace(frozen, data=dataclasses.replace(frozen.data, cache=str(tmp_path / "file")))
    with pytest.raises(LongtailError, match=r"cannot be written.*--data.cache"):
        fit(config, tmp_path / "run", quiet=True)

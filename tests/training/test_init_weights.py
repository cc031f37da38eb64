"""A training that starts from another run's weights: what it takes over, how it goes on, and what is refused."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from longtail.config import Config, load_recipe, read_config
from longtail.data.dataset import LongTailedData, from_arrays
from longtail.data.sources import load_data
from longtail.data.splits import write_split
from longtail.errors import LongtailError
from longtail.experiments.rebalance import RebalanceSettings, rebalance
from longtail.inference.model_config import read_model_config
from longtail.inference.recognizer import Recognizer
from longtail.nn.encoder import Encoder
from longtail.tasks.loading import load_model
from longtail.training.auto_config import fine_tuning_epochs
from longtail.training.metric_log import read_metrics
from longtail.training.seen_images import seen_test_images, write_train_images
from longtail.training.teacher import teacher_folder
from longtail.training.trainer import fit
from tests.conftest import TINY, Command, save_image
from tests.training.runs import equal, fit_in_two, weights

STILL: dict[str, Any] = {"learning_rate": 1e-12, "head_learning_rate": 1e-12, "weight_decay": 0.0, "momentum": 0.0}
"""An optimizer whose steps are far below the precision of the weights."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on digits-lt, long enough to have learned something."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    config = load_recipe("digits-lt").config.replace(network="conv8-tiny", method="la", epochs=6)
    fit(config, folder, quiet=True)
    return folder


@pytest.fixture
def first(trained: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(trained, tmp_path / "first"))


def still(config: Config, run: Path, **changes: Any) -> Config:
    """Return the settings of a training from a run's weights that changes none of them."""
    return config.replace(
        **{"method": "la", "epochs": 1, "tune": "head", "init": str(run), "optimizer": STILL, **changes}
    )


def digits(class_names: dict[int, str]) -> LongTailedData:
    """Return digits-lt with some of its classes, under other names; the order of the classes is that of the mapping."""
    whole = load_data(load_recipe("digits-lt").config.data, 0)

    def part(images: Any) -> tuple[torch.Tensor, torch.Tensor]:
        numbers = torch.tensor([int(whole.class_names[label]) for label in images.labels.tolist()])
        chosen = torch.nonzero(torch.isin(numbers, torch.tensor(list(class_names)))).flatten()
        order = {number: index for index, number in enumerate(class_names)}
        return images.images.take(chosen), torch.tensor([order[number] for number in numbers[chosen].tolist()])

    return from_arrays(part(whole.train), part(whole.test), class_names=list(class_names.values()))


def test_it_starts_where_the_other_run_ended(tiny: Config, first: Path, tmp_path: Path) -> None:
    before = weights(first)
    for name, source in (("run", first), ("model", first / "recognizer")):  # a saved model will do as well
        run = fit(still(tiny, source), tmp_path / name, quiet=True)
        assert equal(weights(tmp_path / name), before)
        old, new = read_model_config(first), run.model_config
        assert (new.mean, new.std, new.metrics["top1"]) == (old.mean, old.std, old.metrics["top1"])
    assert equal(weights(first), before)


@pytest.mark.parametrize("method", ["la", "gml"])
def test_it_goes_on_with_a_new_schedule(tiny: Config, first: Path, tmp_path: Path, method: str) -> None:
    settings = tiny.replace(method=method, epochs=2, teacher={"epochs": 1}, optimizer={"ema_decay": 0.9})
    fit(settings, tmp_path / "anew", quiet=True)
    longer = settings.replace(init=str(first))
    fit(longer, tmp_path / "longer", quiet=True)
    anew, log = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("anew", "longer"))
    assert [line["step"] for line in log] == [line["step"] for line in anew]
    assert log[0]["learning_rate"] == anew[0]["learning_rate"]
    assert log[0]["loss/classifier"] < 0.8 * anew[0]["loss/classifier"]
    assert read_config(tmp_path / "longer" / "config.yaml").init == str(first)


def test_a_cut_one_equals_a_whole_one(
    tiny: Config, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.replace(init=str(first), teacher={"epochs": 1})
    fit(config, tmp_path / "whole", quiet=True)
    fit_in_two(config, tmp_path / "cut", 9, monkeypatch)
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    with pytest.raises(LongtailError, match=r"cut: was started with init .*first, not None; resume with the same"):
        fit(config.replace(init=None), tmp_path / "cut", resume=True, quiet=True)


def test_it_equals_a_training_of_a_model_with_these_weights(
    tiny: Config, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, model = tiny.replace(method="la"), Recognizer.load(first)
    fit(config.replace(init=str(first)), tmp_path / "run", quiet=True)

    def build(*args: Any, **kwargs: Any) -> Encoder:
        encoder = Encoder(*args, **kwargs)
        encoder.load_state_dict(model.encoder.state_dict())
        return encoder

    def init(classifier: Any, *_: Any) -> None:
        classifier.load_state_dict(model.classifier.state_dict())

    with monkeypatch.context() as patched:
        patched.setattr("longtail.training.trainer.Encoder", build)
        patched.setattr("longtail.training.trainer.init_classifier", init)
        fit(config, tmp_path / "expected", quiet=True)
    assert equal(weights(tmp_path / "run"), weights(tmp_path / "expected"))


@pytest.mark.parametrize("init", ["random", "class_means"])
def test_classes_are_matched_by_name(tiny: Config, tmp_path: Path, init: str, caplog: pytest.LogCaptureFixture) -> None:
    old = digits({1: "one", 2: "two", 3: "three", 4: "four"})
    fit(tiny.replace(method="la", epochs=2), tmp_path / "old", quiet=True, data=old)
    # one class is gone, one is new, the order is another one
    new = digits({3: "three", 7: "seven", 1: "one", 2: "two"})
    assert new.mean != old.mean  # of other images
    config = still(tiny, tmp_path / "old", classifier={"init": init})
    with caplog.at_level(logging.INFO, "longtail"):
        run = fit(config, tmp_path / "new", quiet=True, data=new)
    assert f"init {tmp_path / 'old'}: the encoder, and the classifier of 3 of 4 classes; new: seven" in caplog.text
    assert (run.model_config.mean, run.model_config.class_names) == (old.mean, ("three", "seven", "one", "two"))
    before, after = weights(tmp_path / "old"), weights(tmp_path / "new")
    rows, expected = after.pop("classifier.weight"), before.pop("classifier.weight")
    assert equal(before, after)
    assert torch.equal(rows[[0, 2, 3]], expected[[2, 0, 1]])
    if init == "random":
        fit(config.replace(init=None), tmp_path / "anew", quiet=True, data=new)
        assert torch.equal(rows[1], weights(tmp_path / "anew")["classifier.weight"][1])
        return
    model = Recognizer.load(tmp_path / "new")
    with torch.no_grad():
        images = new.train.images.take(torch.nonzero(new.train.labels == 1).flatten()).float() / 255
        mean = F.normalize(F.normalize(model.encoder(images)).mean(dim=0), dim=0)
    torch.testing.assert_close(rows[1], mean, atol=1e-5, rtol=0)


def test_with_no_class_in_common_the_encoder_is_taken(tiny: Config, tmp_path: Path) -> None:
    fit(tiny.replace(method="la"), tmp_path / "old", quiet=True, data=digits({1: "one", 2: "two"}))
    other = digits({3: "three", 4: "four", 5: "five"})
    fit(still(tiny, tmp_path / "old"), tmp_path / "new", quiet=True, data=other)
    fit(still(tiny, tmp_path / "old", init=None), tmp_path / "anew", quiet=True, data=other)
    old, new, anew = (weights(tmp_path / name) for name in ("old", "new", "anew"))
    assert torch.equal(new["classifier.weight"], anew["classifier.weight"])
    assert all(torch.equal(new[name], old[name]) for name in new if name.startswith("encoder."))


@pytest.mark.slow
def test_heads_of_other_kinds(tiny: Config, first: Path, tmp_path: Path) -> None:
    mixture = tiny.replace(gml={"ensemble_weight": 0.5, "queue_size": 64}, teacher={"epochs": 1})
    fit(mixture, tmp_path / "mixture", quiet=True)
    rebalance(first, tmp_path / "linear", RebalanceSettings("crt", epochs=1, views=1))
    for name, key in (("mixture", "classifier.classifier.weight"), ("linear", "classifier.weight")):
        expected = weights(tmp_path / name)[key]
        fit(still(tiny, tmp_path / name), tmp_path / f"from-{name}", quiet=True)
        assert torch.equal(weights(tmp_path / f"from-{name}")["classifier.weight"], expected)


def test_the_teacher_is_the_same_as_without(tiny: Config, first: Path, tmp_path: Path) -> None:
    data = load_data(tiny.data, 0)
    assert teacher_folder(tiny.replace(init=str(first)), data, tmp_path) == teacher_folder(tiny, data, tmp_path)
    fit(tiny.replace(init=str(first), teacher={"epochs": 1}), tmp_path / "run", quiet=True)
    (folder,) = (tmp_path / "teachers").glob("digits-lt-*")
    assert read_config(folder / "config.yaml").init is None


def test_a_frozen_encoder_with_a_teacher(tiny: Config, first: Path, tmp_path: Path) -> None:
    config = tiny.replace(init=str(first), tune="head")
    with pytest.raises(
        LongtailError, match=r"tune head: the teacher must have the encoder of init; use --teacher.sour"
    ):
        fit(config, tmp_path / "run", quiet=True)
    run = fit(config.replace(teacher={"source": str(first)}), tmp_path / "run", quiet=True)
    assert run.config.tune == "head"


def test_the_network_is_the_other_runs_and_epochs_are_those_of_fine_tuning(
    tiny: Config, first: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = still(tiny, first, network="auto", pretrained="auto", epochs="auto", network_size=16)
    with caplog.at_level(logging.INFO, "longtail"):
        run = fit(config, tmp_path / "run", quiet=True)
    assert (run.config.network, run.config.pretrained) == ("conv8-tiny", "none")
    assert run.config.epochs == fine_tuning_epochs(len(load_data(tiny.data, 0).train), tiny.batch_size)
    assert "was trained on images of 8 × 8 pixels, these have 16 × 16; --network_size 8 resizes them" in caplog.text
    assert f"epochs {run.config.epochs}: fine-tuning with" in caplog.text


def test_on_the_command_line(first: Path, tmp_path: Path, command: Command) -> None:
    flags = ["train", "digits-lt", "--method", "la", *TINY]
    code, _, error = command(*flags, "--out", first, "--resume")
    assert code == 2
    advice = (
        f"resume with the same settings and images, use --init {first} with another --out to go on for longer, or use"
    )
    assert f"was started with epochs 6, not 2; {advice} --overwrite or another --out" in error
    assert error.count("\n") == 1
    code, _, error = command(*flags, "--init", first, "--out", tmp_path / "longer")
    assert code == 0, error
    code, _, error = command(*flags, "--init", first, "--out", first, "--overwrite")
    assert (code, error.count("\n")) == (2, 1)
    assert "is the run in --out itself, which is not overwritten; choose another --out" in error
    assert (first / "recognizer").is_dir()


@pytest.fixture
def broken_photos(tmp_path: Path) -> Path:
    """A folder whose images cannot be decoded, which is found out only after what is wrong with the settings."""
    for name in ("cat", "dog"):
        (tmp_path / "broken" / name).mkdir(parents=True)
        for number in range(3):
            (tmp_path / "broken" / name / f"{number}.png").write_text("not an image")
    return tmp_path / "broken"


def missing(run: Path) -> None:
    shutil.rmtree(run)


def unfinished(run: Path) -> None:
    shutil.rmtree(run / "recognizer")


def truncated(run: Path) -> None:
    path = run / "recognizer" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def empty(run: Path) -> None:
    (run / "recognizer" / "model.safetensors").write_bytes(b"")


def foreign(run: Path) -> None:
    (run / "recognizer" / "config.json").write_text('{"model_type": "bert"}')


def detecting(run: Path) -> None:
    path = run / "recognizer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "head": "regions", "task": "detection"}))


def whole(_run: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("spoil", "flags", "message"),
    [
        (missing, [], "first: there is no such folder; expected a finished run, or a saved model"),
        (unfinished, [], "contains no model: the run has not finished; use --resume to continue"),
        (truncated, [], "model.safetensors: is truncated or holds no weights"),
        (empty, [], "model.safetensors: is truncated or holds no weights"),
        (foreign, [], "config.json: "),
        (detecting, [], "first: is a model for detection, for which init is not supported; leave it out"),
        (whole, ["--network", "resnet8"], "network 'resnet8': expected 'conv8-tiny', the network of init"),
        (whole, ["--network", "resnet8"], "; give --network 'conv8-tiny'"),
        (whole, ["--tune", "adapter"], "tune adapter: network 'conv8-tiny' has no adapters"),
        (whole, ["--minutes", "3"], "minutes: is for pretrained networks, not for the weights of init; set --epochs"),
        (whole, ["--classifier.init", "text"], "use --classifier.init class_means"),
    ],
)
def test_what_does_not_fit_is_one_line_before_any_image_is_read(
    first: Path, broken_photos: Path, tmp_path: Path, command: Command, spoil: Any, flags: list[str], message: str
) -> None:
    spoil(first)
    code, _, error = command("train", "--data", broken_photos, "--init", first, *flags, "--out", tmp_path / "run")
    assert (code, error.count("\n")) == (2, 1), error
    assert message in error
    assert not (tmp_path / "run").exists()


def test_an_error_in_the_data_is_reported_first(first: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    flags = ["--init", first, "--network", "resnet8", "--out", tmp_path / "run"]
    code, _, error = command("train", "--data", tmp_path / "photos", *flags)
    assert code == 2
    assert "the class 'cat' has no images" in error


def test_images_with_other_channels_are_refused(first: Path, photos: Path, tmp_path: Path, command: Command) -> None:
    code, _, error = command("train", "--data", photos, "--init", first, "--out", tmp_path / "run")
    assert (code, error.count("\n")) == (2, 1)
    assert f"init {first}: its network takes images of 1 channels, these have 3; give a run on such images" in error
    assert not (tmp_path / "run").exists()


def test_weights_of_another_shape_are_refused(tiny: Config, first: Path, tmp_path: Path) -> None:
    path = first / "recognizer" / "model.safetensors"
    tensors = {name: t.clone() for name, t in load_file(path).items()}  # not the file's own memory, which is written
    save_file({**tensors, "classifier.weight": tensors["classifier.weight"][:, 1:].contiguous()}, path)
    with pytest.raises(LongtailError, match=r"init .*: its classifier is for features of width 11, expected 12"):
        fit(still(tiny, first), tmp_path / "run", quiet=True)
    save_file({**tensors, "classifier.weight": tensors["classifier.weight"][1:].contiguous()}, path)
    with pytest.raises(LongtailError, match=r"init .*: its weights have no classifier for its 10 classes"):
        fit(still(tiny, first), tmp_path / "run", quiet=True)
    save_file({name: t for name, t in tensors.items() if "layers.0" not in name}, path)
    with pytest.raises(LongtailError, match=r"init .*: its weights do not fit network 'conv8-tiny'"):
        fit(still(tiny, first), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def colour(photos: Path, network: str, **changes: Any) -> Config:
    config = load_recipe("folder").config.replace(network=network, pretrained="none", epochs=1, batch_size=4)
    small = {"root": str(photos), "image_size": 32, "workers": 0, "cache": "none"}
    return config.replace(data=small, checkpoint_seconds=1e9).replace(**changes)


@pytest.mark.slow
def test_light_tuning_goes_on_from_all_of_the_weights(photos: Path, tmp_path: Path) -> None:
    """LoRA and adapters are beside the other run's weights; what they had learned there is kept."""
    fit(colour(photos, "test_vit"), tmp_path / "full", quiet=True)
    full = weights(tmp_path / "full")
    for name, source in (("lora:2", "full"), ("adapter:4", "full"), ("adapter:4", "adapter-4"), ("full", "adapter-4")):
        folder = tmp_path / (name.replace(":", "-") if source == "full" else f"{name.replace(':', '-')}-again")
        settings = colour(photos, "auto", init=str(tmp_path / source), tune=name, optimizer=STILL)
        before, run = weights(tmp_path / source), fit(settings, folder, quiet=True)
        adapted = "(adapter=4, img_size=32)" if "adapter" in (name + source) else "(img_size=32)"
        assert run.model_config.network == f"test_vit{adapted}"
        after = {key.replace(".layer.", "."): t for key, t in weights(folder).items() if ".adapter." not in key}
        assert after.keys() == full.keys()
        assert all(torch.allclose(t, full[key], atol=1e-6) for key, t in after.items())
        if source == "full" and name == "adapter:4":  # adapters that have learned something
            path = folder / "recognizer" / "model.safetensors"
            learned = {key: t + 0.01 * (".adapter." in key) for key, t in load_file(path).items()}
            save_file(learned, path)
        elif source != "full":
            assert all(torch.allclose(t, before[key], atol=1e-6) for key, t in weights(folder).items())
    with pytest.raises(
        LongtailError, match=r"network 'test_vit\(adapter=8, img_size=32\)': expected 'test_vit\(adapter"
    ):
        fit(colour(photos, "auto", init=str(tmp_path / "adapter-4"), tune="adapter:8"), tmp_path / "x", quiet=True)


@pytest.mark.slow
def test_a_network_for_images_of_one_size(photos: Path, tmp_path: Path) -> None:
    fit(colour(photos, "test_vit"), tmp_path / "first", quiet=True)
    init = str(tmp_path / "first")
    larger = colour(photos, "test_vit", init=init, data={"image_size": 48})
    with pytest.raises(
        LongtailError, match=r"network_size 48: expected 32, the size of images that the network of init"
    ):
        fit(larger, tmp_path / "run", quiet=True)
    run = fit(larger.replace(network_size=32), tmp_path / "run", quiet=True)
    assert (run.model_config.network, run.model_config.network_size) == ("test_vit(img_size=32)", 32)
    # the tag of pretrained weights does not make it another network
    fit(colour(photos, "test_vit.r160_in1k", init=init), tmp_path / "tagged", quiet=True)


def test_label_maps(segmenting: Config, photos: Path, scenes: Path, tmp_path: Path) -> None:
    fit(segmenting, tmp_path / "first", quiet=True)
    names = (scenes / "classes.txt").read_text().split()
    (scenes / "classes.txt").write_text("\n".join([names[0], "meadow", names[2]]))
    init = str(tmp_path / "first")
    fit(segmenting.replace(init=init, epochs=1, optimizer=STILL), tmp_path / "second", quiet=True)
    fit(segmenting.replace(epochs=1, optimizer=STILL), tmp_path / "anew", quiet=True)
    first, second, anew = (weights(tmp_path / name) for name in ("first", "second", "anew"))
    assert torch.equal(second["classifier.weight"][[0, 2]], first["classifier.weight"][[0, 2]])
    assert torch.equal(second["classifier.weight"][1], anew["classifier.weight"][1])
    learned = [name for name in first if name.startswith("encoder.") and "running" not in name and "num" not in name]
    assert all(torch.allclose(second[name], first[name], atol=1e-6) for name in learned)
    assert not math.isnan(load_model(tmp_path / "second").config.metrics["mean_iou"])
    # and neither task starts from the other
    with pytest.raises(LongtailError, match=r"init .*: is a model for segmentation, and folder is for classification"):
        fit(colour(photos, "auto", init=init), tmp_path / "of photos", quiet=True)
    fit(colour(photos, "test_efficientnet"), tmp_path / "whole", quiet=True)
    with pytest.raises(LongtailError, match="network 'upernet:test_efficientnet:8': expected 'test_efficientnet'"):
        fit(segmenting.replace(init=str(tmp_path / "whole")), tmp_path / "other", quiet=True)


def test_more_photographs_of_more_classes(photos: Path, tmp_path: Path) -> None:
    """The way of a person who adds a class to a folder."""
    fit(colour(photos, "test_efficientnet"), tmp_path / "first", quiet=True)
    for number in range(4):
        save_image(photos / "bee" / f"{number}.png", seed=1000 + number)
    config = colour(photos, "auto", init=str(tmp_path / "first"), optimizer=STILL)
    run = fit(config, tmp_path / "second", quiet=True)
    assert run.model_config.class_names == ("bee", "cat", "dog", "emu")
    old, new = (weights(tmp_path / name)["classifier.weight"] for name in ("first", "second"))
    torch.testing.assert_close(new[1:], old)
    assert torch.allclose(new[0].norm(), torch.ones(()), atol=1e-5)  # a class mean


def test_test_images_that_the_other_run_was_trained_on_are_counted(
    tiny: Config, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "longtail")
    config = load_recipe("folder").config.replace(
        method="la", network="conv8-tiny", pretrained="none", tune="full", epochs=1, data={"root": str(photos)}
    )
    config = config.replace(data={"image_size": 16, "memory_gib": 1.0})
    first = fit(config, tmp_path / "first", quiet=True)
    trained_on = set(np.load(tmp_path / "first" / "train_images.npy").tolist())
    assert len(trained_on) == sum(first.model_config.class_counts)
    fit(config.replace(init=str(tmp_path / "first")), tmp_path / "same", quiet=True)
    assert "training images of" not in caplog.text
    for number in range(5):
        save_image(photos / "ant" / f"{number}.png", seed=900 + number)
    again = config.replace(init=str(tmp_path / "first"))
    seen = len(trained_on & set(load_data(again.data, again.seed).test.ids.tolist()))
    assert seen > 0
    fit(again, tmp_path / "again", quiet=True)
    sentence = rf"{seen} of \d+ test images were training images of .*first, so the accuracy will be too high"
    assert re.search(f"init .*: {sentence}", caplog.text)
    # the ids are the same where one run is of the folder, and the other of a table of its files
    write_split(again.data, tmp_path / "split.csv", 0.0, 0.2, 1)
    listed = again.replace(data={"source": "list", "train": str(tmp_path / "split.csv")})
    assert f"test images were training images of {tmp_path / 'first'}" in str(
        seen_test_images(str(tmp_path / "first"), listed, load_data(listed.data, 0))
    )
    distilled = config.replace(
        classifier={"distillation_weight": 0.0},
        method="gml",
        gml={"distillation_weight": 0.0},
        data={"memory_gib": 1.0},
    )
    fit(distilled.replace(teacher={"source": str(tmp_path / "first")}), tmp_path / "taught", quiet=True)
    assert re.search(f"teacher.source .*: {sentence}", caplog.text)


def test_a_run_knows_where_its_images_were(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def settings(root: Path | str, seed: int) -> Config:
        return Config().replace(data={"source": "folder", "root": str(root), "cache": "none", "seed": seed})

    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    monkeypatch.chdir(photos.parent)
    config = settings(photos.name, 0)
    (run / "config.yaml").write_text(config.to_yaml())
    write_train_images(run, config, load_data(config.data, 0))
    shutil.copytree(photos, elsewhere / photos.name)
    monkeypatch.chdir(elsewhere)
    for root, known in ((photos, True), (photos.name, False)):
        again = settings(root, 1)
        assert (seen_test_images(str(run), again, load_data(again.data, 1)) is not None) == known

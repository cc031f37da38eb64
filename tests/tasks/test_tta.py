"""Test-time augmentation from the command line, and what it gains on validation images."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longtail import Recognizer, Segmenter
from longtail.config import Config, load_recipe, read_config
from longtail.data.dataset import ImageSet
from longtail.data.images import ArrayImages
from longtail.data.sources import load_data
from longtail.errors import LongtailError
from longtail.experiments.evaluate import evaluate
from longtail.inference.options import TTA, InferenceOptions
from longtail.nn import CosineClassifier, Encoder
from longtail.registry import TASKS
from longtail.tasks.classification.evaluator import collect_logits
from longtail.tasks.classification.tta import choose_tta, paired_gain, tta_lines
from longtail.training.trainer import fit
from tests.conftest import Command, save_image, small_card


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = load_recipe("digits-lt").config.replace(method="ce", network="conv8-tiny", epochs=3)
    folder = tmp_path_factory.mktemp("tta") / "run"
    fit(config.replace(data={"val_fraction": 0.2}), folder, quiet=True)
    return folder


def test_the_gain_of_balanced_accuracy() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.cat([torch.randint(0, 4, (60,), generator=generator), torch.tensor([5])])  # class 4 has no image
    before, after = (torch.rand(61, generator=generator) < chance for chance in (0.5, 0.7))
    gain = paired_gain(before, after, labels)
    mean, variance = 0.0, 0.0
    for c in (0, 1, 2, 3, 5):
        members = [i for i in range(61) if int(labels[i]) == c]
        for i in members:
            difference = (int(after[i]) - int(before[i])) / len(members) / 5
            mean, variance = mean + difference, variance + difference**2
    assert gain.balanced_accuracy == pytest.approx(100 * mean)
    assert gain.low == pytest.approx(100 * (mean - 1.96 * math.sqrt(variance)))
    assert gain.high == pytest.approx(100 * (mean + 1.96 * math.sqrt(variance)))
    assert paired_gain(before, before, labels) == (0, 0, 0)


def test_where_nothing_is_gained_it_is_rarely_found_to_be() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(10).repeat_interleave(torch.arange(2, 40, 4))
    found = 0
    for _ in range(2000):
        before, after = torch.rand(2, len(labels), generator=generator) < 0.6
        found += paired_gain(before, after, labels).low > 0
    assert 0.01 < found / 2000 < 0.045  # 2.5 % of one side are expected


def with_correct(monkeypatch: pytest.MonkeyPatch, correct: dict[TTA, int]) -> list[TTA]:
    """Have the first so many of 100 images of two classes predicted correctly; returns what is asked for."""
    asked: list[TTA] = []

    def logits(_model: Recognizer, images: Split, tta: TTA) -> tuple[Tensor, Tensor]:
        asked.append(tta)
        predicted = torch.where(torch.arange(100) < correct[tta], images.labels, 1 - images.labels)
        return torch.nn.functional.one_hot(predicted, 2).float(), images.labels

    monkeypatch.setattr("longtail.tasks.classification.tta.collect_logits", logits)
    return asked


class Split:
    """A hundred images of two classes."""

    labels = torch.arange(100) % 2

    def __len__(self) -> int:
        return 100


@pytest.mark.parametrize(
    ("flip", "crops", "chosen"),
    [(50, 50, "none"), (52, 53, "none"), (40, 30, "none"), (62, 60, "flip"), (62, 64, "flip"), (62, 75, "crops")],
)
def test_the_cheapest_that_no_other_exceeds_by_more_than_noise(
    monkeypatch: pytest.MonkeyPatch, flip: int, crops: int, chosen: str
) -> None:
    with_correct(monkeypatch, {"none": 50, "flip": flip, "crops": crops})
    choice = choose_tta(None, Split(), "auto")  # type: ignore[arg-type]
    assert choice.tta == chosen
    assert {name: gain.balanced_accuracy for name, gain in choice.gains.items()} == {
        "flip": pytest.approx(flip - 50),
        "crops": pytest.approx(crops - 50),
    }
    (line,) = tta_lines({"tta": json.loads(json.dumps(choice.as_json()))})
    assert line.startswith(f"test-time augmentation {chosen}, chosen automatically")
    assert "on 100 validation images" in line
    assert line.endswith("not more than noise") == (chosen == "none")


def test_what_is_requested_is_used_and_its_gain_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = with_correct(monkeypatch, {"none": 50, "flip": 40})
    choice = choose_tta(None, Split(), "flip")  # type: ignore[arg-type]
    assert (choice.tta, asked) == ("flip", ["none", "flip"])
    (line,) = tta_lines({"tta": choice.as_json()})
    assert "flip (2 times the computation): " in line
    assert "-10.0 (-16.2 to -3.8), not more than noise; --tta none is faster" in line
    asked.clear()
    assert choose_tta(None, Split(), "none").tta == "none"  # type: ignore[arg-type]
    assert asked == []


def test_without_validation_images(tiny: Config, tmp_path: Path, command: Command) -> None:
    fit(tiny.replace(method="la"), tmp_path / "run", quiet=True)
    code, out, err = command("evaluate", tmp_path / "run", "--tta", "auto")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "--tta auto: needs validation images, and the run had none; train with some" in err
    code, out, _ = command("evaluate", tmp_path / "run", "--tta", "flip", "--json", tmp_path / "e.json")
    assert code == 0
    assert "its gain is not known, because the run had no validation images" in out
    values = json.loads((tmp_path / "e.json").read_text())["tta"]
    assert values == {"used": "flip", "requested": "flip", "validation_images": 0, "gains": {}}


@pytest.mark.parametrize("tta", ["flip", "crops"])
def test_evaluation(run: Path, tta: TTA) -> None:
    metrics, plain = evaluate(run, options=InferenceOptions(tta=tta)), evaluate(run)
    assert "tta" not in plain
    recognizer, data = Recognizer.load(run), load_data(read_config(run / "config.yaml").data, 0)
    for prior in ("uniform", "train"):
        images = data.test.images.take(torch.arange(len(data.test)))
        predicted = recognizer.predict(images, prior, tta=tta).labels
        assert metrics["priors"][prior]["top1"] == pytest.approx(
            100 * float((predicted == data.test.labels).double().mean())
        )
    assert metrics["per_class"] != plain["per_class"]
    # the same where the scores are collected first
    estimated = evaluate(run, "estimate", options=InferenceOptions(tta=tta))
    assert estimated["priors"]["uniform"]["per_class"] == metrics["per_class"]
    assert data.val is not None
    before, after = (
        collect_logits(recognizer, data.val, each)[0].argmax(dim=1) == data.val.labels for each in ("none", tta)
    )
    gain = paired_gain(before, after, data.val.labels)
    assert metrics["tta"]["gains"][tta]["balanced_accuracy"] == pytest.approx(gain.balanced_accuracy)
    with pytest.raises(LongtailError, match="calibrated on predictions without test-time augmentation"):
        evaluate(run, options=InferenceOptions(tta=tta), coverage=0.9)


def test_the_crops_of_a_split_are_cut_from_its_images_as_they_are_kept() -> None:
    torch.manual_seed(0)
    config = small_card(("ant", "bee", "cow"), (90, 9, 1), image_size=8, stored_size=12)
    encoder = Encoder("conv8-tiny", [0.5], [0.5])
    model = Recognizer(encoder, CosineClassifier(encoder.num_features, 3, 30.0), config)
    pixels = torch.randint(0, 256, (600, 1, 12, 12), dtype=torch.uint8)
    images = ImageSet(ArrayImages(pixels), torch.zeros(600, dtype=torch.int64), torch.arange(600))
    options: dict[TTA, Tensor] = {"none": pixels[..., 2:-2, 2:-2], "flip": pixels[..., 2:-2, 2:-2], "crops": pixels}
    for tta, inputs in options.items():
        parts = TASKS["classification"].predict_split(model, images, InferenceOptions(tta=tta))
        positions, scores, _ = (torch.cat(part) for part in zip(*parts, strict=True))
        assert torch.equal(positions, torch.arange(600))
        assert torch.allclose(scores, model.scores(inputs.float() / 255, tta), atol=1e-4)


def test_chosen_automatically(run: Path, tmp_path: Path, command: Command) -> None:
    code, out, _ = command("evaluate", run, "--tta", "auto", "--json", tmp_path / "e.json")
    assert code == 0
    assert "test-time augmentation none, chosen automatically: gain of balanced accuracy on " in out
    metrics = json.loads((tmp_path / "e.json").read_text())
    assert list(metrics["tta"]["gains"]) == ["flip", "crops"]  # a mirrored digit is another one
    assert metrics["tta"]["used"] == "none"
    assert metrics["top1"] == evaluate(run)["top1"]


def test_prediction(run: Path, tmp_path: Path, command: Command) -> None:
    image, recognizer = save_image(tmp_path / "a.png", (9, 12), mode="L"), Recognizer.load(run)
    shown = {}
    for flags in (["--tta", "flip"], ["--tta_flip"], ["--tta", "crops"], []):
        code, _, err = command("predict", run, image, "--json", tmp_path / "p.json", *flags)
        assert code == 0, err
        shown[" ".join(flags)] = json.loads((tmp_path / "p.json").read_text())[0]["probability"]
    assert shown["--tta flip"] == shown["--tta_flip"]
    assert len(set(shown.values())) == 3
    for tta in ("flip", "crops"):
        assert shown[f"--tta {tta}"] == pytest.approx(recognizer.predict(image, tta=tta).top(1)[0][0][1], abs=1e-5)
    for flags, message in (
        (["--tta", "auto"], "by longtail evaluate RUN --tta auto; here use what it reports"),
        (["--tta", "flip", "--coverage", "0.9"], "use either --coverage or --tta"),
        (["--tta", "crops", "--tta_flip"], "--tta_flip: is the same as --tta flip; remove it, or --tta crops"),
        (["--tta", "mirror"], "--tta"),
    ):
        code, out, err = command("predict", run, image, *flags)
        assert (code, out, message in err, len(err.splitlines())) == (2, "", True, 1), err


@pytest.mark.slow
def test_an_exported_file(run: Path, tmp_path: Path, command: Command) -> None:
    image, file = save_image(tmp_path / "a.png", (9, 12), mode="L"), tmp_path / "m.onnx"
    code, out, err = command("export", run, "--out", file, "--tta", "flip")
    assert code == 0, err
    assert "prior uniform, test-time augmentation flip" in out
    probabilities = []
    for arguments in ((run, image, "--tta", "flip"), (file, image), (file, image, "--tta", "flip")):
        code, _, err = command("predict", *arguments, "--json", tmp_path / "p.json")
        assert code == 0, err
        probabilities.append(json.loads((tmp_path / "p.json").read_text())[0]["probability"])
    assert probabilities == pytest.approx([probabilities[0]] * 3, abs=1e-4)
    code, _, err = command("predict", file, image, "--tta", "crops")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "--tta crops needs a file with it inside, this one has flip; use longtail export RUN --tta crops" in err


@pytest.fixture
def labelling(segmenting: Config, tmp_path: Path) -> Path:
    fit(segmenting.replace(method="ce", epochs=1), tmp_path / "run", quiet=True)
    return tmp_path / "run"


def test_models_that_label_pixels(labelling: Path, tmp_path: Path, command: Command) -> None:
    segmenter, images = Segmenter.load(labelling), torch.rand(1, 3, 50, 66)
    flipped = segmenter.scores(images, InferenceOptions(tta="flip"))
    assert torch.equal(flipped, segmenter.scores(images, InferenceOptions(tta_flip=True)))
    assert not torch.equal(flipped, segmenter.scores(images))
    scores = []
    for flag in (["--tta", "flip"], ["--tta_flip"], []):
        code, _, err = command("evaluate", labelling, *flag, "--json", tmp_path / "e.json")
        assert code == 0, err
        scores.append(json.loads((tmp_path / "e.json").read_text())["mean_iou"])
    assert scores[0] == scores[1] != scores[2]
    image = save_image(tmp_path / "a.png", (66, 50))
    for arguments in (("evaluate", labelling), ("predict", labelling, image), ("export", labelling)):
        code, out, err = command(*arguments, "--tta", "crops")
        assert (code, out, len(err.splitlines())) == (2, "", 1), err
        assert "--tta crops is for models that classify whole images" in err

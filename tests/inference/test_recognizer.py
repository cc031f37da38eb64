from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from longtail import Recognizer
from longtail.config import Config
from longtail.errors import LongtailError
from longtail.inference.model import CalibrationStats
from longtail.inference.model_config import ModelConfig
from longtail.inference.recognizer import Predictions
from longtail.nn import CosineClassifier, Encoder
from longtail.tasks.base import PredictionRequest
from longtail.tasks.classification.predict import predict_files
from longtail.training.trainer import fit
from tests.conftest import save_image


def build_recognizer(predicts_under: str = "uniform", size: int = 32) -> Recognizer:
    torch.manual_seed(0)
    config = ModelConfig(
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
    encoder = Encoder(config.network, config.mean, config.std)
    return Recognizer(encoder, CosineClassifier(encoder.num_features, 3, config.scale), config)


def test_saved_and_loaded_it_predicts_the_same(tmp_path: Path) -> None:
    recognizer = build_recognizer()
    recognizer.save(tmp_path / "saved")
    images = torch.rand(4, 3, 32, 32)
    loaded = Recognizer.load(tmp_path / "saved")
    assert torch.allclose(loaded.predict(images).probabilities, recognizer.predict(images).probabilities, atol=1e-6)
    assert loaded.config == recognizer.config
    assert "Images per class: ant 90, bee 9, cow 1." in (tmp_path / "saved" / "README.md").read_text()


def test_saved_over_another_model_nothing_of_that_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = build_recognizer(), build_recognizer(size=48)
    first.calibration_stats = CalibrationStats(
        torch.arange(3), torch.arange(3), torch.zeros(3), torch.zeros(3), torch.zeros(2, 3)
    )
    first.save(tmp_path)
    assert Recognizer.load(tmp_path).calibration_stats is not None

    def full(*_: object) -> None:
        raise LongtailError("README.md: cannot be written: No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("longtail.inference.model.write_text", full)
        with pytest.raises(LongtailError, match="No space left"):
            second.save(tmp_path)
    assert Recognizer.load(tmp_path).config == first.config  # whole, as before
    second.save(tmp_path)
    loaded = Recognizer.load(tmp_path)
    assert loaded.config == second.config
    assert loaded.calibration_stats is None
    assert len(list(tmp_path.iterdir())) == 3


def test_every_kind_of_image_is_the_same_image(tmp_path: Path) -> None:
    recognizer = build_recognizer()
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
    predictions = build_recognizer().predict(torch.rand(5, 3, 32, 32))
    assert predictions.probabilities.sum(1).tolist() == pytest.approx([1] * 5)
    for name, row in zip(predictions.names, predictions.top(2), strict=True):
        assert row[0][0] == name
        assert row[0][1] >= row[1][1]
    assert len(predictions.top(9)[0]) == 3


def test_batches_are_the_parts_of_a_prediction() -> None:
    recognizer = build_recognizer()
    counts = torch.tensor([30, 20, 0])
    labels = torch.arange(3).repeat_interleave(counts)
    recognizer.calibration_stats = CalibrationStats(
        labels, labels, torch.linspace(0.2, 0.6, 50), torch.zeros(3), torch.zeros(2, 3)
    )
    images = torch.rand(5, 3, 32, 32)
    for prior in ("uniform", "train", [0.2, 0.3, 0.5]):
        whole = recognizer.predict(images, prior, batch_size=2, coverage=0.9)
        parts = list(recognizer.predict_batches(images, prior, batch_size=2, coverage=0.9))
        assert [len(part.probabilities) for part in parts] == [2, 2, 1]
        assert torch.equal(torch.cat([part.probabilities for part in parts]), whole.probabilities)
        assert [names for part in parts for names in part.sets or []] == whole.sets
        assert [row for part in parts for row in part.top(2)] == whole.top(2)
    # an estimate rests on every image
    (whole,) = recognizer.predict_batches(images, "estimate", batch_size=2)
    assert len(whole.probabilities) == 5
    assert whole.prior is not None
    empty = recognizer.predict([], coverage=0.9)
    assert (empty.probabilities.shape, empty.sets) == ((0, 3), [])


def test_files_are_not_predicted_with_a_matrix_of_all_images_and_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recognizer, largest = build_recognizer(), 0
    files = [save_image(tmp_path / f"{number}.png", (32, 32), number) for number in range(5)]
    expected = recognizer.predict(files)

    class Watched(Predictions):
        def top(self, k: int = 5) -> list[list[tuple[str, float]]]:
            nonlocal largest
            largest = max(largest, len(self.probabilities))
            return super().top(k)

    monkeypatch.setattr("longtail.inference.recognizer.Predictions", Watched)
    batches = recognizer.predict_batches
    monkeypatch.setattr(
        recognizer, "predict_batches", lambda images, **options: batches(images, batch_size=2, **options)
    )
    output = predict_files(recognizer, files, PredictionRequest(prior="uniform"))
    assert largest == 2
    assert [(record["path"], record["class"]) for record in output.records] == [
        (str(file), name) for file, name in zip(files, expected.names, strict=True)
    ]


def test_sets_of_every_class_are_refused(tmp_path: Path) -> None:
    recognizer, file = build_recognizer(), save_image(tmp_path / "a.png", (32, 32))
    for count, coverage, refused in ((8, 0.9, True), (9, 0.9, False), (8, 0.8, False)):
        labels = torch.arange(3).repeat_interleave(torch.tensor([count, 2, 1]))
        recognizer.calibration_stats = CalibrationStats(
            labels, labels, torch.ones(len(labels)), torch.zeros(3), torch.zeros(2, 3)
        )
        request = PredictionRequest(prior="uniform", coverage=coverage)
        if refused:
            with pytest.raises(LongtailError) as error:
                predict_files(recognizer, [file], request)
            assert str(error.value) == ("coverage: no class has 9 validation images; every set would be all 3 classes")
        else:
            assert predict_files(recognizer, [file], request).records[0]["set"] == ["bee", "cow"]


def test_a_class_without_training_images_keeps_its_score() -> None:
    recognizer = build_recognizer("train")
    recognizer.config = dataclasses.replace(recognizer.config, class_counts=(90, 0, 10), temperature=2.0)
    raw = torch.tensor([[1.0, 3.0, 2.0], [1.0, 0.9, 0.0], [0.0, 9.0, 2.0]])
    expected = (raw - torch.tensor([0.9, 1.0, 0.1]).log()) / 2
    scores = recognizer.remove_prior(raw)
    assert torch.allclose(scores, expected)
    # it is predicted only where its raw score is the highest
    assert scores.argmax(dim=1).tolist() == [2, 2, 1]
    images = torch.rand(4, 3, 32, 32)
    assert bool(recognizer.predict(images).probabilities.isfinite().all())
    assert recognizer.predict(images, prior="train").probabilities[:, 1].tolist() == [0] * 4


def test_the_prior_is_the_users_choice() -> None:
    images = torch.rand(3, 3, 32, 32)
    free, bound = build_recognizer("uniform"), build_recognizer("train")
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
    with pytest.raises(LongtailError, match="contains no model"):
        Recognizer.load(tmp_path)
    build_recognizer().save(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    changes: list[tuple[dict[str, Any], str]] = [
        ({"network": "resnet32"}, "does not fit config.json"),
        ({"class_names": ["a", "b"]}, "does not fit config.json"),
        ({"network": "resnet33"}, "network 'resnet33' is not known"),
        ({"scale": "large"}, "config.json: scale"),
        ({"colour": 1}, "config.json: colour"),
    ]
    for change, message in changes:
        (tmp_path / "config.json").write_text(json.dumps({**values, **change}))
        with pytest.raises(LongtailError, match=message):
            Recognizer.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(LongtailError, match="cannot be read"):
        Recognizer.load(tmp_path)


def test_arrays_of_the_wrong_kind_are_named() -> None:
    with pytest.raises(LongtailError, match="expected an array of uint8"):
        build_recognizer().predict(np.zeros((4, 4)))
    with pytest.raises(LongtailError, match="with 1 to 4 channels, got uint8 of shape"):
        build_recognizer().predict(np.zeros((4, 4, 5), dtype=np.uint8))


def test_tensors_of_other_types_are_converted_or_named() -> None:
    recognizer = build_recognizer()
    side, channels = recognizer.config.image_size, recognizer.config.channels
    images = torch.rand(3, channels, side, side)
    expected = recognizer.predict(images).probabilities
    assert torch.equal(recognizer.predict(images.double()).probabilities, expected)
    for numbers in ((images * 255).long(), (images * 255).long()[0], images > 0.5):
        with pytest.raises(LongtailError, match="expected a tensor of uint8 from 0 to 255 or of floats"):
            recognizer.predict(numbers)


def test_saved_and_read_as_the_hub_does(tiny: Config, tmp_path: Path) -> None:
    fit(tiny.replace(method="la"), tmp_path / "run", quiet=True)
    recognizer = Recognizer.from_pretrained(tmp_path / "run")
    recognizer.save_pretrained(tmp_path / "shared")
    names = {"README.md", "config.json", "model.safetensors"}
    assert {path.name for path in (tmp_path / "shared").iterdir()} == names
    again = Recognizer.from_pretrained(str(tmp_path / "shared"))
    images = torch.rand(4, 1, 8, 8)
    assert torch.equal(again.predict(images).probabilities, recognizer.predict(images).probabilities)
    page = (tmp_path / "shared" / "README.md").read_text(encoding="utf-8")
    header = yaml.safe_load(page.split("---")[1])
    assert header["library_name"] == "longtail"
    for part in ("method la", "10 classes", "| few |", "Limits", "from_pretrained", "to "):
        assert part in page


def test_a_name_on_the_hub(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(tiny.replace(method="la"), tmp_path / "run", quiet=True)
    asked: list[dict[str, Any]] = []

    def download(name: str, **options: Any) -> str:
        asked.append({"name": name, **options})
        return str(tmp_path / "run" / "recognizer")

    monkeypatch.setattr("longtail.inference.model.snapshot_download", download)
    monkeypatch.setattr(
        "huggingface_hub.hub_mixin.hf_hub_download",
        lambda **_: str(tmp_path / "run" / "recognizer" / "config.json"),
    )
    recognizer = Recognizer.from_pretrained("somebody/digits", revision="v1")
    assert recognizer.config.network == "conv8-tiny"
    assert (asked[0]["name"], asked[0]["revision"]) == ("somebody/digits", "v1")
    assert not any("*" in pattern or pattern.endswith((".bin", ".pt")) for pattern in asked[0]["allow_patterns"])


def test_what_cannot_be_had_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", fail)
    with pytest.raises(
        LongtailError, match=r"'somebody/digits': is not a folder and could not be downloaded from the Hub: no network"
    ):
        Recognizer.from_pretrained("somebody/digits")


def test_a_folder_with_a_pickle_is_refused(tiny: Config, tmp_path: Path) -> None:
    fit(tiny.replace(method="la"), tmp_path / "run", quiet=True)
    (tmp_path / "run" / "recognizer" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(LongtailError, match=r"pytorch_model\.bin: may run code when it is read; .* remove it"):
        Recognizer.load(tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network": "conv8"}, "model.safetensors: does not fit config.json"),
        ({"class_names": ["a", "b"]}, "does not fit config.json"),
        ({"scale": "much"}, "config.json: scale"),
        ({"temperature": 0}, "config.json: temperature"),
        ({"colour": 1}, "config.json: colour"),
        ({"task": "poetry"}, "config.json: task 'poetry' is not known"),
    ],
)
def test_an_edited_config(tiny: Config, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    fit(tiny.replace(method="la", epochs=1), tmp_path / "run", quiet=True)
    path = tmp_path / "run" / "recognizer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(LongtailError, match=message):
        Recognizer.load(tmp_path / "run")


def test_what_is_pushed_to_the_hub(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(tiny.replace(method="la", epochs=1), tmp_path / "run", quiet=True)
    sent: dict[str, Any] = {}

    class Api:
        def __init__(self, **_: Any) -> None: ...

        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return type("Repo", (), {"repo_id": repo_id})()

        def upload_folder(self, folder_path: Path, **options: Any) -> str:
            sent.update(options, names={path.name for path in Path(folder_path).iterdir()})
            return "done"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    Recognizer.load(tmp_path / "run").push_to_hub("somebody/digits")
    assert sent["repo_id"] == "somebody/digits"
    assert sent["names"] == {"README.md", "config.json", "model.safetensors"}
    for name, expected in ((None, "digits"), ("somebody/other", "somebody/other")):
        address = Recognizer.load(tmp_path / "run").save_pretrained(
            tmp_path / "digits", repo_id=name, push_to_hub=True, commit_message="again"
        )
        assert (address, sent["repo_id"], sent["commit_message"]) == ("done", expected, "again")


def test_files_are_decoded_ahead_and_predicted_in_order(tmp_path: Path) -> None:
    recognizer = build_recognizer()
    random = np.random.default_rng(0)
    paths = [tmp_path / f"{index}.png" for index in range(12)]
    for path in paths:
        Image.fromarray(random.integers(0, 256, (36, 36, 3), dtype=np.uint8)).save(path)
    alone = torch.cat([recognizer.predict(path).probabilities for path in paths])
    together = recognizer.predict((path for path in paths), batch_size=2).probabilities
    assert torch.allclose(together, alone, atol=1e-6)
    assert len(torch.unique(alone, dim=0)) == 12
    paths[7].write_bytes(b"no image")
    paths[9].unlink()
    with pytest.raises(LongtailError, match=r"7\.png: is not an image"):
        recognizer.predict(paths, batch_size=2)


def test_floats_that_are_not_from_0_to_1_raise() -> None:
    recognizer = build_recognizer()
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    for images in (
        pixels.float(),
        pixels[0].float(),
        (pixels / 255 - 0.5) / 0.2,
        torch.full((1, 3, 32, 32), torch.nan),
    ):
        with pytest.raises(LongtailError, match="images: expected floats from 0 to 1, got values from"):
            recognizer.predict(images)
    for tta in ("none", "crops"):
        with pytest.raises(LongtailError, match="images: expected floats in"):
            recognizer.scores(pixels, tta)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_has_an_image(batch_size: int) -> None:
    recognizer, image = build_recognizer(), np.zeros((32, 32, 3), np.uint8)
    with pytest.raises(LongtailError, match=f"batch_size: expected at least 1, got {batch_size}"):
        recognizer.predict([image], batch_size=batch_size)
    with pytest.raises(LongtailError, match="batch_size: expected at least 1"):
        recognizer.predict(torch.zeros(2, 3, 32, 32), batch_size=batch_size)


def test_a_model_that_is_there_stays_whole_where_it_cannot_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recognizer = build_recognizer()
    recognizer.save_pretrained(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("longtail.inference.model.save_file", full)
    with pytest.raises(LongtailError, match="No space left"):
        recognizer.save_pretrained(tmp_path)
    assert Recognizer.load(tmp_path).config == recognizer.config

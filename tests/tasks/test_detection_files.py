"""Files that a detector's predictions write beside others: drawings, and results of several predictions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from longtail.data.detection import Detections
from longtail.errors import LongtailError
from longtail.inference.output import PredictionOutput
from longtail.inference.pictures import source_of
from longtail.tasks.base import PredictionRequest
from longtail.tasks.detection.predict import predict_files
from tests.conftest import save_image


def predict(out: Path, *files: Path, name: str = "red", fails: BaseException | None = None) -> PredictionOutput:
    """Predict with a detector that finds one object in every image, and after the last raises an error if given."""

    def find(images: Iterator[Image.Image], *_: Any) -> Iterator[Detections]:
        for _image in images:
            yield Detections(torch.tensor([[1.0, 1.0, 5.0, 5.0]]), torch.tensor([0]), torch.tensor([0.9]))
        if fails is not None:
            raise fails

    config = SimpleNamespace(class_names=(name, "blue"), class_ids=())
    model: Any = SimpleNamespace(config=config, log_prior=lambda _: None, find=find)
    return predict_files(model, files, PredictionRequest(out=out))


def ids(out: Path) -> dict[str, int]:
    entries = json.loads((out / "detections.json").read_text(encoding="utf-8"))
    assert len({entry["file_name"] for entry in entries}) == len(entries)
    return {Path(entry["file_name"]).name: entry["image_id"] for entry in entries}


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    files = [tmp_path / "photos" / name for name in ("a.png", "b.png", "c.png")]
    for file in files:
        save_image(file, (16, 16))
    return files


def test_drawings_replace_those_of_the_same_image_alone(photos: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "a-objects.jpg").write_bytes(b"of the user")
    save_image(tmp_path / "other" / "a.png", (16, 16))
    for _ in range(2):
        drawings = [predict(out, file).records[0]["drawing"] for file in (photos[0], tmp_path / "other" / "a.png")]
        assert drawings == [str(out / "a-2-objects.jpg"), str(out / "a-3-objects.jpg")]
    assert (out / "a-objects.jpg").read_bytes() == b"of the user"
    assert source_of(Path(drawings[0])) == str(photos[0].resolve())


def test_results_of_other_images_are_kept(photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    predict(out, *photos[:2])
    output = predict(out, photos[2])
    assert ids(out) == {"a.png": 1, "b.png": 2, "c.png": 3}
    assert [record["image_id"] for record in output.records] == [3]
    assert "keeps the objects of earlier predictions of other images (2)" in output.notes[-1]
    monkeypatch.chdir(tmp_path)
    output = predict(out, Path("photos/b.png"))  # another spelling of the same path
    assert ids(out) == {"a.png": 1, "c.png": 3, "b.png": 2}
    for name in ("01.png", "7.png"):
        save_image(tmp_path / "numbers" / name, (16, 16))
    predict(out, tmp_path / "numbers" / "7.png")
    predict(out, tmp_path / "numbers" / "01.png")  # whose number another image has
    assert ids(out) == {"a.png": 1, "c.png": 3, "b.png": 2, "7.png": 7, "01.png": 4}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("shopping list", "is not valid JSON"),
        ('{"images": []}', "expected a list of detections"),
        ('[{"image_id": 1, "category_id": 1, "score": 0.5}]', "has entries without file_name"),
        (
            '[{"image_id": 1, "category_id": 1, "score": 0.5, "file_name": "x.png", "category_name": "cat"}]',
            "category 1 of x.png, which is not predicted now, is no class of this model",
        ),
    ],
)
def test_results_that_would_be_lost_are_refused(photos: list[Path], tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "detections.json").write_text(content)
    with pytest.raises(LongtailError, match=message) as raised:
        predict(tmp_path, *photos)
    assert str(raised.value).endswith("name another --out")
    assert (tmp_path / "detections.json").read_text() == content
    assert not list(tmp_path.glob("*.jpg"))


def test_another_model_may_replace_all_results(photos: list[Path], tmp_path: Path) -> None:
    predict(tmp_path, *photos)
    predict(tmp_path, *photos, name="cat")
    assert "red" not in (tmp_path / "detections.json").read_text()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), LongtailError("out of memory")])
def test_what_was_found_before_an_error_is_written(photos: list[Path], tmp_path: Path, error: BaseException) -> None:
    predict(tmp_path, *photos[1:])
    with pytest.raises(type(error)):
        predict(tmp_path, photos[0], fails=error)
    assert ids(tmp_path) == {"b.png": 1, "c.png": 2, "a.png": 3}


def test_a_very_long_name_does_not_end_the_prediction(photos: list[Path], tmp_path: Path) -> None:
    file = photos[0].rename(photos[0].with_name(f"{'ä' * 124}.png"))
    output = predict(tmp_path, file, photos[1])
    assert [Path(record["drawing"]).name for record in output.records] == [
        f"{'ä' * 100}-objects.jpg",
        "b-objects.jpg",
    ]

"""The teacher: trained first and found again, a run, a timm model; and the cache of its outputs."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from longtail.config import Config
from longtail.data.loader import Batch
from longtail.data.sources import load_data
from longtail.data.transforms import PerImageTransform, build_transform
from longtail.errors import LongtailError
from longtail.inference.recognizer import Recognizer
from longtail.methods.gml import GML, GMLSettings
from longtail.training.auto_config import auto_config
from longtail.training.teacher import teacher_folder
from longtail.training.teacher_cache import rng_keys
from longtail.training.trainer import fit


def test_a_teacher_is_trained_once_and_found_again(
    tiny: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="longtail")
    fit(tiny, tmp_path / "first", quiet=True)
    assert "teacher: training conv8-tiny first" in caplog.text
    assert "teacher: found in" not in caplog.text
    caplog.clear()
    # settings that only the student depends on do not ask for another teacher
    other = tiny.replace(gml={"embedding_dim": 8, "queue_minimum": 1})
    fit(other, tmp_path / "second", quiet=True)
    assert "teacher: found in" in caplog.text
    assert "teacher: training" not in caplog.text
    data = load_data(tiny.data, tiny.seed)
    here = teacher_folder(tiny, data, tmp_path)
    assert teacher_folder(other, data, tmp_path) == here
    assert teacher_folder(tiny.replace(data={"root": "/elsewhere"}), data, tmp_path) == here
    for changed in (tiny.replace(seed=1), tiny.replace(epochs=3), tiny.replace(data={"imbalance": 10.0})):
        assert teacher_folder(changed, data, tmp_path) != here
    # the same settings over other images: another teacher
    assert teacher_folder(tiny, load_data(tiny.data, 1), tmp_path) != here


def test_a_run_can_be_the_teacher(tiny: Config, tmp_path: Path) -> None:
    fit(tiny.replace(method="la"), tmp_path / "teacher", quiet=True)
    config = tiny.replace(teacher={"source": str(tmp_path / "teacher")})
    run = fit(config, tmp_path / "student", quiet=True)
    assert run.config.section(GMLSettings).distillation_weight == 1
    assert not (tmp_path / "teachers").exists()


def test_a_teacher_of_other_classes_is_not_distilled(tiny: Config, photos: Path, tmp_path: Path) -> None:
    other = tiny.replace(method="la", data={"source": "folder", "root": str(photos), "image_size": 16})
    fit(other.replace(network="resnet8", data={"augment": "none"}), tmp_path / "teacher", quiet=True)
    grey = tiny.replace(teacher={"source": str(tmp_path / "teacher")})
    with pytest.raises(LongtailError, match="expects images of 3 channels"):
        fit(grey, tmp_path / "student", quiet=True)
    config, reasons = auto_config(grey, load_data(tiny.data, 0))
    assert config.section(GMLSettings).distillation_weight == 0
    assert "the teacher was trained on other classes" in " ".join(reasons)


@pytest.mark.slow
def test_a_timm_model_can_be_teacher_and_student(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    # its weights lie on a hub; what is tested is everything but the download
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **kw: create(name, pretrained=False, **kw))
    config = tiny.replace(
        epochs=1, network="resnet10t", teacher={"source": "timm:test_convnext"}, data={"imbalance": 100.0}
    )
    run = fit(config, tmp_path / "run", quiet=True)
    assert run.teacher_seconds == 0
    assert run.config.section(GMLSettings).distillation_weight == 0
    assert Recognizer.load(tmp_path / "run").config.network == "resnet10t"
    with pytest.raises(LongtailError, match="no classifier for these classes to distil from"):
        fit(config.replace(gml={"distillation_weight": 1.0}), tmp_path / "other", quiet=True)
    with pytest.raises(LongtailError, match="timm has no model 'resnet999'"):
        fit(config.replace(teacher={"source": "timm:resnet999"}), tmp_path / "other", quiet=True)
    assert not (tmp_path / "other").exists()


def test_the_cache_contains_the_teachers_outputs_for_the_very_view(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="longtail")
    config = tiny.replace(gml={"distillation_weight": 1.0}, teacher={"cache": 3}, epochs=4)
    seen: list[Batch] = []
    original = GML.training_step

    def recording(self: GML, batch: Batch) -> dict[str, torch.Tensor]:
        seen.append(batch)
        return original(self, batch)

    monkeypatch.setattr(GML, "training_step", recording)
    run = fit(config, tmp_path / "run", quiet=True)
    assert len(seen) == 4 * 6
    assert "teacher: 3 views of 357 images once" in caplog.text
    files = sorted(path.name.rpartition("-")[2] for path in (tmp_path / "teachers" / "cache").iterdir())
    assert files == ["features.npy", "scores.npy"]
    data = load_data(config.data, 0)
    teacher = Recognizer.load(teacher_folder(run.config, data, tmp_path / "teachers"))
    view = build_transform("digits", 8)
    assert not isinstance(view, PerImageTransform)
    for number, batch in enumerate(seen):
        assert batch.teacher_scores is not None
        assert batch.key_features is not None
        assert len(batch.views) == 2  # classification and query: the key was not drawn
        with torch.no_grad():
            features = teacher.encoder(batch.views[0])
            assert torch.allclose(teacher.classifier(features), batch.teacher_scores, atol=1e-4)
        # the key is another view than the classification's
        assert not torch.allclose(features, batch.key_features, atol=1e-3)
        # epoch 4 shows the first view again
        positions = torch.tensor([data.train.ids.tolist().index(image) for image in batch.ids.tolist()])
        pixels = data.train.images.take(positions)
        expected = view(pixels, batch.ids, rng_keys(0, (number // 6) % 3))
        assert torch.allclose(batch.views[0], expected, atol=1e-6)
    # found again by another run with the same teacher and views
    caplog.clear()
    fit(config.replace(gml={"embedding_dim": 8}), tmp_path / "other", quiet=True)
    assert "teacher: found in" in caplog.text
    assert "views of" not in caplog.text

"""The teacher: trained first and found again, a run, a timm model; and the cache of its outputs."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from longtail.config import Config, parse_config, read_config
from longtail.data.batch import Batch
from longtail.data.loader import TrainLoader
from longtail.data.sources import load_data
from longtail.data.transforms import PerImageTransform, build_transform
from longtail.errors import LongtailError
from longtail.inference.recognizer import Recognizer
from longtail.methods.base import Method
from longtail.methods.gml import GML, GMLSettings
from longtail.nn import Encoder, EncoderEnsemble, TeacherEncoder, build_backbone
from longtail.training import teacher as teacher_module
from longtail.training.auto_config import auto_config
from longtail.training.run_io import read_finished
from longtail.training.teacher import load_teacher, teacher_config, teacher_folder, teacher_runs, train_once
from longtail.training.teacher_cache import rng_keys, teacher_cache
from longtail.training.trainer import fit
from tests.training.runs import equal, fit_in_two, weights


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
            assert torch.allclose(teacher.classifier(features), batch.teacher_scores[:, 0], atol=1e-4)
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


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "la", "classifier": {"views": 2, "distillation_weight": 1.0}},
        {"gml": {"distillation_weight": 1.0, "share_query": False}, "classifier": {"every_view": True}},
        {
            "method": "la",
            "classifier": {"views": 2, "distillation_weight": 1.0},
            "data": {"sampler": "class"},
        },
    ],
    ids=["la", "gml", "la, repeated images"],
)
def test_the_cache_contains_the_scores_of_every_distilled_view(
    changes: dict[str, Any], tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.replace(**changes).replace(classifier={"distill_every_view": True}, teacher={"cache": 3}, epochs=3)
    seen: list[Batch] = []
    original = Method.training_step

    def recording(self: Method, batch: Batch) -> dict[str, torch.Tensor]:
        seen.append(batch)
        return original(self, batch)

    monkeypatch.setattr(Method, "training_step", recording)
    run = fit(config, tmp_path / "run", quiet=True)
    seen = seen[-3 * 6 :]  # the teacher's steps come first
    data = load_data(config.data, 0)
    teacher = Recognizer.load(teacher_folder(run.config, data, tmp_path / "teachers"))
    kept = {path.name.rpartition("-")[2] for path in (tmp_path / "teachers" / "cache").iterdir()}
    assert kept == ({"scores.npy"} if config.method == "la" else {"scores.npy", "features.npy"})
    for number, batch in enumerate(seen):
        assert batch.teacher_scores is not None
        assert (batch.key_features is None) == (config.method == "la")
        assert batch.teacher_scores.shape[1:] == (2, 10)
        assert not torch.allclose(batch.views[0], batch.views[1])
        with torch.no_grad():
            features = [teacher.encoder(view) for view in batch.views]
            scores = torch.stack([teacher.classifier(each) for each in features], dim=1)
        torch.testing.assert_close(scores, batch.teacher_scores, rtol=0, atol=1e-4)
        if config.data.sampler == "class":  # an image that is shown again is given the views of the next epoch
            assert len(batch.views[0].unique(dim=0)) > len(batch.ids.unique())
            continue
        positions = torch.tensor([data.train.ids.tolist().index(image) for image in batch.ids.tolist()])
        pixels, view = data.train.images.take(positions), build_transform("digits", 8)
        assert not isinstance(view, PerImageTransform)
        for shown, made in enumerate(batch.views):  # epoch 0: views 0 and 1, epoch 1: 2 and 0, epoch 2: 1 and 2
            expected = view(pixels, batch.ids, rng_keys(0, (2 * (number // 6) + shown) % 3))
            assert torch.allclose(made, expected, atol=1e-6)
    with pytest.raises(LongtailError, match=r"teacher.cache 1: 2 views of an image are distilled in a step"):
        fit(config.replace(teacher={"cache": 1}), tmp_path / "other", quiet=True)
    assert not (tmp_path / "other").exists()


def test_a_pretrained_teacher_gets_a_classifier_first(tiny: Config, tmp_path: Path) -> None:
    """Its encoder stays as it is, and sees the images at a size of its own."""
    file = tmp_path / "weights.safetensors"
    network = "resnet10t"
    weights = {name: tensor.contiguous() for name, tensor in build_backbone(network, 1).state_dict().items()}
    save_file(weights, file)
    settings = {"network": network, "pretrained": str(file), "tune": "head", "network_size": 16}
    config = tiny.replace(method="la", classifier={"distillation_weight": 1.0}, teacher=settings, epochs=1)
    run = fit(config, tmp_path / "run", quiet=True)
    data = load_data(config.data, 0)
    teacher = Recognizer.load(teacher_folder(run.config, data, tmp_path / "teachers"))
    assert (teacher.config.network, teacher.config.network_size) == (network, 16)
    for name, tensor in teacher.encoder.backbone.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(tensor, weights[name], rtol=0, atol=0)
    assert not teacher.classifier.weight.equal(torch.zeros_like(teacher.classifier.weight))
    assert read_config(tmp_path / "run" / "config.yaml").teacher.pretrained == str(file)
    assert Recognizer.load(tmp_path / "run").config.network == tiny.network
    missing = config.replace(teacher={"pretrained": str(tmp_path / "none.pth")})
    with pytest.raises(LongtailError, match=r"none.pth"):
        fit(missing, tmp_path / "other", quiet=True)
    assert not (tmp_path / "other").exists()
    with pytest.raises(LongtailError, match=r"teacher.tune head: is for a teacher that is trained; set teacher.source"):
        tiny.replace(teacher={"source": "ema", "tune": "head"})
    with pytest.raises(LongtailError, match=r"teacher.tune 'heads': expected auto, full, norm"):
        tiny.replace(teacher={"tune": "heads"})


def test_teachers_are_shared_where_their_settings_are_equal(tiny: Config, tmp_path: Path) -> None:
    data = load_data(tiny.data, 0)
    config = tiny.replace(gml={"distillation_weight": 1.0})
    one = teacher_folder(config, data, tmp_path)
    changes: tuple[dict[str, Any], ...] = ({"views": 2}, {"generations": 2}, {"epochs": 5})
    folders = [teacher_folder(config.replace(teacher=teacher), data, tmp_path) for teacher in changes]
    assert len({one, *folders}) == 4
    # the student's own settings, and which of several it is, do not matter
    for student in ({"second_stage": "crt"}, {"teacher": {"count": 3}}, {"teacher": {"ema_decay": 0.5, "cache": 2}}):
        assert teacher_folder(config.replace(**student), data, tmp_path) == one
    # each of several has a seed of its own, and the same images
    several = config.replace(teacher={"count": 3})
    settings = [teacher_config(several, data, member) for member in range(3)]
    assert len({each.seed for each in settings}) == 3
    assert settings[0].seed == 0
    assert {each.data.seed for each in settings} == {None, 0}
    assert all(load_data(each.data, each.seed).fingerprint == data.fingerprint for each in settings)
    # another student's are not among them
    others = [teacher_folder(several.replace(seed=1), data, tmp_path, member) for member in range(3)]
    assert not {teacher_folder(several, data, tmp_path, member) for member in range(3)} & set(others)


def test_a_teacher_of_other_weights_chooses_what_of_it_is_trained(tiny: Config) -> None:
    data = load_data(tiny.data, 0)
    config = tiny.replace(network="test_resnet", pretrained="auto", data={"sampler": "class"})

    def tune(student: str, given: str | None = None, **teacher: Any) -> str:
        return teacher_config(config.replace(tune=student, teacher={**teacher, "tune": given}), data).tune

    assert [tune(student) for student in ("lora", "full", "norm")] == ["lora", "full", "norm"]
    other = {"network": "conv8", "pretrained": "none"}
    assert [tune(student, **other) for student in ("lora", "full", "norm")] == ["full"] * 3
    pretrained = {"network": "test_vit"}
    assert [tune(student, **pretrained) for student in ("lora", "full", "norm")] == ["auto", "auto", "norm"]
    assert tune("lora", "head", **pretrained) == "head"
    # as they are: its scores are corrected by the frequencies of the data set, not by those of a sampler
    assert teacher_config(config, data).data.sampler == "instance"


def test_generations_follow_one_another(tiny: Config, tmp_path: Path) -> None:
    data = load_data(tiny.data, 0)
    plain = tiny.replace(gml={"distillation_weight": 0.7}, teacher={"network": "conv8", "views": 2})
    config = plain.replace(teacher={"generations": 3, "generation_network": "student", "cache": 2})
    stages = teacher_runs(config, data, tmp_path)
    assert [len(stage) for stage in stages] == [1, 1, 1]
    settings = [next(iter(stage.values())) for stage in stages]
    assert [each.network for each in settings] == ["conv8", "conv8-tiny", "conv8-tiny"]
    assert [each.classifier.distillation_weight for each in settings] == [0.0, 0.7, 0.7]
    assert all(each.classifier.views == 2 and each.epochs == 2 and each.method == "la" for each in settings)
    assert [each.teacher.cache for each in settings] == [0, 2, 2]
    # each is the teacher of the next, and a student of one generation shares the first
    for before, after in itertools.pairwise([*stages]):
        assert teacher_folder(next(iter(after.values())), data, tmp_path) == next(iter(before))
    assert teacher_folder(plain, data, tmp_path) == next(iter(stages[0]))
    assert teacher_folder(config, data, tmp_path) == next(iter(stages[2]))
    same = plain.replace(teacher={"generations": 2})
    assert [next(iter(stage.values())).network for stage in teacher_runs(same, data, tmp_path)] == ["conv8"] * 2
    assert [len(stage) for stage in teacher_runs(same.replace(teacher={"count": 2}), data, tmp_path)] == [2, 2]


def test_a_generation_of_the_students_network_is_initialised_and_tuned_as_the_student(
    tiny: Config, tmp_path: Path
) -> None:
    data = load_data(tiny.data, 0)
    own = {"network": "resnet10t", "pretrained": "timm", "tune": "head", "network_size": 16, "generations": 3}

    def generations(network: str) -> list[tuple[Any, ...]]:
        config = tiny.replace(teacher={**own, "generation_network": network})
        stages = [next(iter(stage.values())) for stage in teacher_runs(config, data, tmp_path)]
        return [(each.network, each.pretrained, each.tune, each.network_size, each.classifier.init) for each in stages]

    given = ("resnet10t", "timm", "head", 16, "class_means")
    student = (tiny.network, tiny.pretrained, tiny.tune, tiny.network_size, tiny.classifier.init)
    assert student != given
    assert generations("student") == [given, student, student]
    assert generations("teacher") == [given] * 3


def test_a_cache_belongs_to_the_resize_and_the_normalisation_of_the_encoder(tiny: Config, tmp_path: Path) -> None:
    config = tiny.replace(teacher={"cache": 2})
    data = load_data(config.data, 0)
    view = build_transform("digits", 8)

    def loader(draws: Any) -> TrainLoader:
        return TrainLoader(data.train, 64, [view], config.seed, cache=draws)

    def cached(encoder: TeacherEncoder, settings: Config = config) -> torch.Tensor:
        cache = teacher_cache(settings, data, encoder.eval(), None, loader, tmp_path, torch.device("cpu"))
        assert cache.features is not None
        return torch.from_numpy(cache.features.copy())

    def encoder(mean: float = 0.3, std: float = 0.4, resize: int | None = None) -> Encoder:
        torch.manual_seed(0)
        return Encoder("conv8-tiny", [mean], [std], resize=resize)

    plain = cached(encoder())
    assert torch.equal(cached(encoder()), plain)
    assert len(list(tmp_path.iterdir())) == 1
    changed = [encoder(mean=0.1), encoder(std=0.1), encoder(resize=16)]
    for other in changed:
        features = cached(other)
        assert not torch.allclose(features, plain)
        # of several encoders each counts
        assert torch.equal(cached(EncoderEnsemble([encoder(), other])), torch.cat([plain, features], dim=2))
    assert len(list(tmp_path.iterdir())) == 7
    frozen = config.replace(tune="head")
    cached(encoder(), frozen)
    cached(encoder(), frozen.replace(feature_views=3))
    assert len(list(tmp_path.iterdir())) == 9


def test_a_cache_has_the_precision_of_the_training(tiny: Config, tmp_path: Path) -> None:
    cached: dict[Path, str] = {}
    for precision in ("32-true", "bf16-mixed"):
        config = tiny.replace(precision=precision, teacher={"cache": 2}, gml={"distillation_weight": 1.0}, epochs=1)
        fit(config, tmp_path / precision, quiet=True, teachers=tmp_path / "teachers")
        files = set((tmp_path / "teachers" / "cache").glob("*-features.npy")) - set(cached)
        cached |= dict.fromkeys(files, precision)
    exact, rounded = (torch.from_numpy(np.load(file)) for file in cached)
    assert list(cached.values()) == ["32-true", "bf16-mixed"]
    # not only the weights differ, as these teachers were trained apart: the features themselves are rounded
    assert torch.equal(rounded, rounded.bfloat16().float())
    assert not torch.equal(exact, exact.bfloat16().float())


@pytest.mark.slow
def test_several_teachers_of_two_generations_are_trained_and_cached(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="longtail")
    config = tiny.replace(
        gml={"distillation_weight": 1.0}, epochs=1, teacher={"count": 2, "generations": 2, "views": 2, "cache": 2}
    )
    seen: list[Batch] = []
    original = GML.training_step

    def recording(self: GML, batch: Batch) -> dict[str, torch.Tensor]:
        seen.append(batch)
        return original(self, batch)

    monkeypatch.setattr(GML, "training_step", recording)
    run = fit(config, tmp_path / "run", quiet=True)
    data, kept = load_data(config.data, 0), tmp_path / "teachers"
    folders = {folder for stage in teacher_runs(run.config, data, kept) for folder in stage}
    assert folders == {path for path in (tmp_path / "teachers").glob("digits-lt-*") if path.is_dir()}
    trained = [read_finished(folder) for folder in folders]
    assert run.teacher_seconds > sum(each.seconds for each in trained)  # and the time of their caches
    teachers = [Recognizer.load(teacher_folder(run.config, data, kept, member)) for member in (0, 1)]
    for batch in seen:
        assert batch.teacher_scores is not None
        assert batch.key_features is not None
        with torch.no_grad():
            each = [F.softmax(t.classifier(t.encoder(batch.views[0])) / 4, dim=1) for t in teachers]
        assert not torch.allclose(each[0], each[1], atol=1e-3)
        assert torch.allclose(F.softmax(batch.teacher_scores[:, 0] / 4, dim=1), (each[0] + each[1]) / 2, atol=1e-5)
        assert batch.key_features.shape[1] == sum(t.encoder.num_features for t in teachers)
    # the scores of several depend on the temperature, and so does the cache
    caplog.clear()
    fit(config.replace(gml={"embedding_dim": 8}), tmp_path / "other", quiet=True)
    assert "views of" not in caplog.text
    fit(config.replace(teacher={"distillation_temperature": 2.0, "generations": 1}), tmp_path / "warmer", quiet=True)
    caplog.clear()
    fit(config.replace(teacher={"distillation_temperature": 3.0, "generations": 1}), tmp_path / "cooler", quiet=True)
    assert "teacher (2 of 2): found in" in caplog.text
    assert "2 views of 357 images once" in caplog.text


def test_several_runs_can_be_the_teacher(tiny: Config, tmp_path: Path) -> None:
    folders = tuple(str(tmp_path / name) for name in ("first", "second"))
    for seed, folder in enumerate(folders):
        fit(tiny.replace(method="la", epochs=1, seed=seed, data={"seed": 0}), Path(folder), quiet=True)
    config = tiny.replace(method="la", epochs=1, classifier={"distillation_weight": 1.0}, teacher={"source": folders})
    assert parse_config(config.to_dict()) == config
    run = fit(config, tmp_path / "both", quiet=True)
    assert run.teacher_seconds == 0
    assert not (tmp_path / "teachers").exists()
    teacher = load_teacher(config, load_data(config.data, 0), distils=True)
    assert teacher.classifier is not None
    images = torch.rand(5, 1, 8, 8)
    with torch.no_grad():
        scores = teacher.classifier(teacher.encoder.eval()(images))
        each = [F.softmax(Recognizer.load(Path(f)).scores(images) / 4, dim=1) for f in folders]
    assert torch.allclose(F.softmax(scores / 4, dim=1), (each[0] + each[1]) / 2, atol=1e-5)
    with pytest.raises(LongtailError, match=r"teacher.source '/nowhere': expected train, ema, the folder of a run"):
        fit(config.replace(teacher={"source": (folders[0], "/nowhere")}), tmp_path / "none", quiet=True)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("steps", [3, 8])
def test_a_run_with_several_teachers_resumes_with_the_same_bits(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    config = tiny.replace(
        method="la",
        classifier={"distillation_weight": 1.0},
        teacher={"count": 2, "generations": 2, "epochs": 1},
    )
    fit(config, tmp_path / "whole", quiet=True)
    # in folders of their own: interrupted in the second generation of the first teacher, or later
    fit_in_two(config, tmp_path / "other" / "cut", steps, monkeypatch)
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "other" / "cut"))


def test_the_prior_of_a_given_teacher_is_removed_from_its_scores(tiny: Config, tmp_path: Path) -> None:
    data = load_data(tiny.data, 0)
    fit(tiny.replace(method="ce"), tmp_path / "ce", quiet=True)
    teacher = load_teacher(tiny.replace(teacher={"source": str(tmp_path / "ce")}), data, distils=True)
    model = Recognizer.load(tmp_path / "ce")
    images = torch.rand(4, 1, 8, 8)
    assert teacher.classifier is not None
    with torch.no_grad():
        scores = teacher.classifier(teacher.encoder(images))
        own = model.classifier(model.encoder(images))
    expected = own.double() - torch.tensor(data.class_counts).double().div(len(data.train)).log()
    torch.testing.assert_close(scores.double(), expected.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"method": "gml", "classifier": {"views": 2}}, "classifier.views 2: without effect, method gml"),
        ({"method": "la", "teacher": {"source": "ema"}}, "teacher.source: without effect, method la learns nothing"),
        ({"method": "la", "data": {"sampler": "class"}}, "data.sampler class: it shows rare classes more often"),
    ],
)
def test_settings_without_effect_are_named(tiny: Config, changes: dict[str, Any], note: str) -> None:
    data = load_data(tiny.data, 0)
    assert any(line.startswith(note) for line in auto_config(tiny.replace(**changes), data)[1])
    plain = {"method": "ce", "data": {"sampler": "class"}, "classifier": {"views": 2}, "gml": {"share_query": True}}
    assert not any("effect" in line or "sampler" in line for line in auto_config(tiny.replace(**plain), data)[1])


def test_cached_scores_are_of_the_view_that_is_shown(tiny: Config) -> None:
    config = tiny.replace(
        method="gml",
        gml={"share_query": False, "distillation_weight": 1.0},
        classifier={"every_view": True, "distill_every_view": True},
        teacher={"cache": 2},
        data={"contrast_augment": "none"},
    )
    data = load_data(config.data, 0)
    with pytest.raises(LongtailError, match=r"teacher\.cache 2: .*data\.contrast_augment none; set both alike"):
        auto_config(config, data)
    auto_config(config.replace(data={"contrast_augment": "auto"}), data)


def test_equal_views_of_kept_features_are_refused(tiny: Config) -> None:
    config = tiny.replace(method="la", tune="head", init="run", classifier={"views": 2})
    with pytest.raises(LongtailError, match=r"classifier\.views 2: with tune head and feature_views 1 all views"):
        auto_config(config, load_data(tiny.data, 0))


def test_processes_agree_on_whether_a_teacher_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher that another job has just written: what process 0 finds holds for all."""
    trained: list[int] = []
    monkeypatch.setattr(teacher_module, "gather_objects", lambda _own: [True, False])
    for process in (0, 1):
        monkeypatch.setattr(teacher_module, "rank", lambda process=process: process)
        train_once(tmp_path / "teacher", lambda: trained.append(1))
    assert trained == []

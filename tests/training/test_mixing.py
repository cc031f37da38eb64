"""Trainings with mixed images: the loss and the teacher, resume, several processes, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from longtail.config import Config
from longtail.data.dataset import LongTailedData
from longtail.data.loader import TrainLoader
from longtail.data.sources import load_data
from longtail.data.transforms import build_transform
from longtail.errors import LongtailError
from longtail.nn import CosineClassifier
from longtail.registry import METHODS
from longtail.training.checkpoint import load_checkpoint
from longtail.training.metric_log import read_metrics
from longtail.training.mixing import build_mixer
from longtail.training.trainer import fit
from tests.conftest import TINY, Command
from tests.methods.steps import build_method, new_encoder
from tests.training.runs import equal, fit_in_two, weights
from tests.training.test_distributed import run_ranks

TWO_VIEWS = {"method": "la", "classifier": {"views": 2, "distillation_weight": 0.5, "distill_every_view": True}}
UNSHARED: dict[str, dict[str, Any]] = {
    "gml": {"gml": {"share_query": False, "distillation_weight": 1.0}},
    **{name: {name: {"share_view": False}} for name in ("supcon", "bcl", "proco")},
}


@pytest.fixture
def data(tiny: Config) -> LongTailedData:
    return load_data(tiny.data, 0)


def mixing_loader(config: Config, data: LongTailedData) -> TrainLoader:
    method = METHODS[config.method]
    views = [build_transform("digits", 8)] * len(method.view_plan(config).uses)
    mixer = build_mixer(config, method, data.class_counts, label_kind="image")
    return TrainLoader(data.train, 64, views, seed=0, epochs=2, mixer=mixer)


@pytest.mark.parametrize("kind", ["mixup", "cutmix", "remix"])
@pytest.mark.parametrize("adjusted", [True, False])
def test_the_loss_against_a_loop(tiny: Config, data: LongTailedData, kind: str, adjusted: bool) -> None:
    config = tiny.replace(**TWO_VIEWS, mixing={"kind": kind}).replace(classifier={"logit_adjustment": adjusted})
    teacher = new_encoder()
    classifier = CosineClassifier(teacher.num_features, 10)
    method = build_method(config, data, teacher, classifier).eval()
    teacher.eval()
    batch = next(mixing_loader(config, data).epoch(0))
    assert batch.mixed_labels is not None
    assert batch.label_weights is not None
    terms = method(batch)
    frequencies = torch.tensor(data.class_counts, dtype=torch.float64) / sum(data.class_counts)
    prior = frequencies if adjusted else torch.ones(10, dtype=torch.float64)
    contained = torch.zeros(10, dtype=torch.float64) if adjusted else frequencies.log()  # in the student's scores
    losses, divergences = [], []
    for view in batch.views:
        scores = method.classifier(method.encoder(view)).double()
        teacher_scores = classifier(teacher(view)).double()  # of the mixed image
        for image in range(len(batch)):
            posterior = (scores[image].exp() * prior) / (scores[image].exp() * prior).sum()
            own, other = int(batch.labels[image]), int(batch.mixed_labels[image])
            weight = float(batch.label_weights[image])
            losses.append(-weight * posterior[own].log() - (1 - weight) * posterior[other].log())
            p, q = (teacher_scores[image] / 4).softmax(0), ((scores[image] - contained) / 4).softmax(0)
            divergences.append(16 * (p * (p / q).log()).sum())
    assert terms["classifier"].item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
    assert terms["distillation"].item() == pytest.approx(0.5 * torch.stack(divergences).mean().item(), rel=1e-4)


@pytest.mark.parametrize("name", ["ce", "la", "focal", "cb", *UNSHARED])
def test_every_method_that_allows_it_learns_from_mixed_images(tiny: Config, data: LongTailedData, name: str) -> None:
    config = tiny.replace(method=name, mixing={"kind": "cutmix"}).replace(**UNSHARED.get(name, {}))
    method = build_method(config, data)
    for _, batch in zip(range(2), mixing_loader(config, data).epoch(0), strict=False):
        terms = method(batch)
        torch.stack(list(terms.values())).sum().backward()
        assert all(bool(term.isfinite()) for term in terms.values())
    assert all(bool(p.grad.isfinite().all()) for p in method.parameters() if p.grad is not None)


def test_until_is_a_fraction_of_the_first_stage(tiny: Config, data: LongTailedData) -> None:
    config = tiny.replace(method="la", epochs=10, second_stage="crt", second_stage_fraction=0.5)
    mixer = build_mixer(
        config.replace(mixing={"kind": "mixup", "until": 0.6}), METHODS["la"], data.class_counts, label_kind="image"
    )
    assert mixer is not None
    labels = torch.zeros(50, dtype=torch.int64)
    mixed = [
        bool((mixer.draw(torch.arange(50), labels, labels, epoch, (8, 8)).image_weights < 1).any())
        for epoch in range(5)  # of the first stage; the second one mixes nothing
    ]
    assert mixed == [True, True, True, False, False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "ldam"}, "method ldam has a margin for the one true class; use la, ce, focal or cb"),
        ({"method": "paco"}, "method paco has one softmax over classes and samples"),
        ({"method": "gpaco"}, "method gpaco has one softmax over classes and samples"),
        ({"method": "bcl"}, r"method bcl compares the classified view .* set bcl\.share_view and"),
        ({"method": "supcon", "supcon": {"share_view": False}, "classifier": {"every_view": True}}, "method supcon"),
        ({"method": "gml", "gml": {"share_query": True}}, r"method gml compares .* set gml\.share_query"),
        ({"method": "gml", "gml": {"query_all_views": True}}, r"method gml compares .* gml\.query_all_views"),
        ({"method": "gml", "gml": {"share_key": True}}, r"method gml takes its keys .* gml\.share_key to false"),
        ({"method": "la", "tune": "head"}, "tune head trains on kept features"),
    ],
)
def test_mixing_without_a_meaning_is_refused_before_anything_is_written(
    tiny: Config, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(LongtailError, match=f"mixing.kind mixup: .*{message}") as caught:
        fit(tiny.replace(mixing={"kind": "mixup"}, **changes), tmp_path / "run", quiet=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_labels_of_pixels_are_not_mixed(segmenting: Config, tmp_path: Path) -> None:
    with pytest.raises(LongtailError, match=r"mixing\.kind cutmix: mixes images with one label each"):
        fit(segmenting.replace(mixing={"kind": "cutmix"}), tmp_path / "run", quiet=True)


def test_the_command_line_ends_with_2(command: Command, tmp_path: Path) -> None:
    arguments = ["train", "digits-lt", *TINY, "--method", "ldam", "--mixing.kind", "mixup", "--out", tmp_path / "run"]
    code, _, errors = command(*arguments)
    assert code == 2
    assert errors.strip() == (
        "longtail: error: mixing.kind mixup: method ldam has a margin for the one true class; use la, ce, focal or cb"
    )


@pytest.mark.parametrize(
    ("changes", "forwards"),  # the student's before the interruption; a step has as many as it has passes
    [
        (
            {
                **TWO_VIEWS,
                "mixing": {"kind": "cutmix", "probability": 0.7, "until": 0.5},
                "data": {"sampler": "class"},  # which repeats images
            },
            8,
        ),
        (
            {
                "mixing": {"kind": "mixup"},
                "optimizer": {"sharpness": "sam"},
                "gml": {"share_query": False, "keys": "both", "distillation_weight": 1.0},
            },
            17,
        ),
        ({"method": "la", "mixing": {"kind": "remix"}, "optimizer": {"sharpness": "focal", "name": "adamw"}}, 23),
    ],
    ids=["la distilled", "gml, sam", "la, focal"],
)
@pytest.mark.parametrize("batches", ["host", "device"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], forwards: int, batches: str
) -> None:
    config = tiny.replace(accelerator={"batches": batches}, **changes)
    fit(config, tmp_path / "whole", quiet=True)
    fit_in_two(config, tmp_path / "cut", forwards, monkeypatch)
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


@pytest.mark.parametrize(
    "changes",
    [
        {**TWO_VIEWS, "mixing": {"kind": "cutmix"}},
        {
            "method": "la",
            "mixing": {"kind": "mixup"},
            "teacher": {"cache": 2},
            "classifier": {"distillation_weight": 1},
        },
        {"mixing": {"kind": "remix"}, "gml": {"share_query": False, "distillation_weight": 1.0}},
        {
            "method": "la",
            "mixing": {"kind": "mixup"},
            "data": {"sampler": "class"},
            "teacher": {"cache": 2},
            "classifier": {"distillation_weight": 1},
        },
    ],
    ids=["la distilled", "la cached", "gml", "la cached, repeated images"],
)
def test_batches_of_the_device_train_the_same(tiny: Config, tmp_path: Path, changes: dict[str, Any]) -> None:
    config, found = tiny.replace(**changes), []
    for batches in ("host", "device"):
        fit(config.replace(accelerator={"batches": batches}), tmp_path / batches, quiet=True)
        found.append(load_checkpoint(tmp_path / batches / "last.ckpt")["method"])
        lines = [line for line in read_metrics(tmp_path / batches / "metrics.jsonl") if line["kind"] == "epoch"]
        # the loss of a mixed image is no estimate of the entropy of its label
        assert (lines[0]["information_bits"] is None) == (config.method == "la")
    for name, value in found[0].items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(found[1][name], value, rtol=5e-3, atol=3e-3)


def test_the_teacher_is_trained_without_mixing_and_shared(tiny: Config, tmp_path: Path) -> None:
    plain = tiny.replace(**TWO_VIEWS)
    mixed = plain.replace(mixing={"kind": "mixup"}, optimizer={"sharpness": "sam"})
    for number, config in enumerate((plain, mixed)):
        fit(config, tmp_path / str(number), quiet=True, teachers=tmp_path / "teachers")
    assert len([path for path in (tmp_path / "teachers").iterdir() if path.is_dir()]) == 1


@pytest.mark.slow
def test_two_processes_train_with_mixing_and_sam(tmp_path: Path) -> None:
    arguments = ["train", "digits-lt", *TINY, "--method", "la", "--mixing.kind", "cutmix", "--batch_size", "50"]
    arguments += ["--optimizer.sharpness", "imbsam", "--out", str(tmp_path / "run")]
    done = run_ranks(2, *arguments)
    assert [each.returncode for each in done] == [0, 0], done
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["uniform"]["images"] == 500

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from longtail.config import Shots
from longtail.evaluation.metrics import classification_metrics
from longtail.evaluation.paired import paired_half_width
from longtail.experiments.records import Record, columns, differences, recommendation, summarize, table


def record(method: str, seed: int, accuracy: float, many: float | None = None) -> Record:
    return Record(
        method=method,
        seed=seed,
        metrics={"balanced_accuracy": accuracy, "top1": accuracy, "many": many, "medium": 1.0, "few": 2.0},
        seconds=3.0,
        student_passes=100,
        teacher_seconds=0.0,
        epochs=5,
        predicts_under="uniform",
    )


def test_means_and_deviations() -> None:
    records = [record("la", 0, 80.0), record("la", 1, 84.0)]
    summary = summarize(records, "la", "balanced_accuracy")
    assert summary is not None
    assert summary.mean == 82
    assert summary.deviation == pytest.approx(2.828, abs=1e-3)
    assert summarize(records, "la", "many") is None
    assert table(records)[1][0][:3] == ["la", "82.0 ± 2.8", "n/a"]


def test_a_record_survives_json() -> None:
    first = record("la", 3, 80.0)
    values = json.loads(json.dumps(first.to_dict()))
    assert list(values)[:4] == ["method", "seed", "balanced_accuracy", "top1"]  # metrics stand beside the rest
    assert "metrics" not in values
    assert Record.from_dict(values) == first


def test_differences_are_paired() -> None:
    # far apart from seed to seed, but always two points ahead, give or take a tenth
    records = [record("la", s, a) for s, a in enumerate([50.0, 70.0, 90.0])]
    records += [record("gml", s, a) for s, a in enumerate([52.1, 71.9, 92.0])]
    (difference,) = differences(records)
    assert (difference.method, difference.baseline, difference.seeds) == ("gml", "la", 3)
    assert difference.mean == pytest.approx(2.0)
    # t-quantile for two degrees of freedom times .1 / √3
    assert difference.high == pytest.approx(2 + 4.3027 * 0.1 / 3**0.5, abs=1e-3)
    assert "a difference" in str(difference)
    (level,) = differences([record("la", 0, 1.0), record("la", 1, 2.0), record("gml", 0, 2.0), record("gml", 1, 1.0)])
    assert "no difference shown" in str(level)
    (single,) = differences([record("la", 0, 1.0), record("gml", 0, 2.0)])
    assert single.low is None
    assert "one seed" in str(single)


def test_the_same_difference_with_every_seed_says_nothing_of_its_spread() -> None:
    records = [*runs("ce", [80.0, 75.0, 85.1], 1), *runs("la", [85.0, 80.0, 90.1], 1)]
    (difference,) = differences(records)
    assert difference.mean == pytest.approx(5)
    assert (difference.low, difference.high, difference.seeds) == (None, None, 3)
    assert str(difference) == (
        "la − ce: +5.0 points (the same with all 3 seeds, so its spread is not known: more seeds)"
    )
    assert recommendation(records) == (
        "best: la (balanced accuracy 85.0); the same lead over ce with every seed, so differences may be chance: "
        "more seeds"
    )
    # it is no doubt of another method
    assert "the same lead over ce with" in recommendation([*records, *runs("bcl", [60.0, 61.0, 62.0], 1)])
    (none,) = differences([*runs("ce", [80.0, 75.0], 1), *runs("la", [80.0, 75.0], 1)])
    assert str(none).endswith("no difference shown")


def test_the_same_test_images_with_every_seed_are_said() -> None:
    def on(images: Sequence[str | None], half_widths: tuple[float, float] = (3.0, 4.0)) -> str:
        accuracies = {"ce": [80.0, 75.0, 85.1], "la": [85.0, 80.2, 90.0]}
        records = [
            replace(each, test_images=hashed, num_test_images=1000, half_widths={"balanced_accuracy": half})
            for (method, values), half in zip(accuracies.items(), half_widths, strict=True)
            for each, hashed in zip(runs(method, values, 1), images, strict=True)
        ]
        (difference,) = differences([Record.from_dict(json.loads(json.dumps(each.to_dict()))) for each in records])
        return str(difference).partition(") over ")[2]

    # of independent errors: √(3² + 4²)
    same = "3 seeds on the same 1,000 test images (other images: up to ±5.0 more): a difference on these images"
    assert on(["a", "a", "a"]) == same
    for images in (["a", "b", "c"], [None, None, None], ["a", "a", None]):
        assert on(images) == "3 seeds: a difference"


def test_the_interval_over_other_test_images_holds_for_independent_errors() -> None:
    rng, classes, images, seeds = np.random.default_rng(0), 5, 30, 3
    accuracy = {"ce": 0.6, "la": 0.7}
    covered = []
    for _ in range(200):
        # every seed of a method is right on the same images, so that only their choice makes a difference vary
        hits = {name: rng.random((classes, images)) < p for name, p in accuracy.items()}
        records = []
        for name, right in hits.items():
            counts = torch.tensor([[images] * classes, right.sum(axis=1).tolist(), [images] * classes])
            metrics = classification_metrics(counts, [1] * classes, Shots())
            value, (low, _) = metrics["balanced_accuracy"], metrics["intervals"]["balanced_accuracy"]
            records += [
                replace(each, test_images="a", num_test_images=150, half_widths={"balanced_accuracy": value - low})
                for each in runs(name, [value + 1e-6 * seed * (name == "la") for seed in range(seeds)], 1)
            ]
        (difference,) = differences(records)
        assert difference.sampling is not None
        covered.append(abs(difference.mean - 10) < difference.sampling)
    assert 0.92 < np.mean(covered) < 0.99


def on_images(method: str, right: NDArray[np.bool_], labels: NDArray[np.int64]) -> list[Record]:
    """Return a record of each seed, of (S, N) whether an image is predicted correctly."""
    predicted = np.where(right, labels, -1)
    accuracies = [100 * float(np.mean([row[labels == c].mean() for c in np.unique(labels)])) for row in right]
    return [
        replace(each, test_images="a", num_test_images=len(labels), image_results={"labels": labels, "predicted": own})
        for each, own in zip(runs(method, accuracies, 1), predicted, strict=True)
    ]


def test_predictions_of_the_same_test_images_are_paired() -> None:
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(4), 50)
    hard = rng.random(200)
    theirs, ours = ((hard + 0.1 * rng.random((3, 200))) < share for share in (0.6, 0.7))
    (difference,) = differences([*on_images("ce", theirs, labels), *on_images("la", ours, labels)])
    assert difference.sampling is not None
    assert difference.sampling == pytest.approx(paired_half_width(labels, list(ours), list(theirs)))
    assert difference.low is not None
    assert difference.overall is not None
    # both half widths are the legs of a right triangle
    seeds, both = difference.mean - difference.low, difference.mean - difference.overall[0]
    assert both**2 == pytest.approx(seeds**2 + difference.sampling**2)
    assert difference.mean == pytest.approx((difference.overall[0] + difference.overall[1]) / 2)
    low, high = (f"{value:+.1f}" for value in difference.overall)
    where = f" over 3 seeds on the same 200 test images, over other test images too {low} to {high}: a difference"
    assert str(difference).endswith(where)
    # other labels of images of the same name: a bound is all that is known
    moved = [
        replace(each, image_results={"labels": labels[::-1], "predicted": labels}, half_widths={"balanced_accuracy": 3})
        for each in on_images("la", ours, labels)
    ]
    theirs_bound = [replace(each, half_widths={"balanced_accuracy": 4}) for each in on_images("ce", theirs, labels)]
    (bound,) = differences([*theirs_bound, *moved])
    assert bound.sampling_is_bound
    assert bound.overall is None
    assert "(other images: up to ±5.0 more)" in str(bound)


def test_a_difference_on_these_images_alone() -> None:
    labels = np.zeros(40, dtype=np.int64)
    theirs = np.tile(np.arange(40) < 24, (3, 1))
    ours = np.tile((np.arange(40) > 2) & (np.arange(40) < 30), (3, 1))
    ours[0, 30] = True
    ce, la = on_images("ce", theirs, labels), on_images("la", ours, labels)
    (difference,) = differences([*ce, *la])
    assert difference.low is not None
    assert difference.low > 0
    assert not difference.shown
    assert str(difference).endswith(": a difference on these images, not shown for others")
    # what knows less claims no more: without the predictions of one run, and after JSON
    (unknown,) = differences([*ce, replace(la[0], image_results=None), *la[1:]])
    (read,) = differences([Record.from_dict(each.to_dict()) for each in (*ce, *la)])
    for other in (unknown, read):
        assert not other.shown
        assert str(other).endswith(": a difference on these images")
    # what costs less is then not shown to be worse
    cheaper = [replace(each, seconds=0.5) for each in ce]
    assert recommendation([*cheaper, *la]) == (
        "take ce: balanced accuracy 60.0, not shown to be worse than la (68.3), and cheaper"
    )


def test_one_seed_has_an_interval_over_test_images() -> None:
    labels = np.zeros(100, dtype=np.int64)
    theirs, ours = (np.arange(100)[None] < share for share in (60, 75))
    (difference,) = differences([*on_images("ce", theirs, labels), *on_images("la", ours, labels)])
    half = 196 * (0.15 * 0.85 / 99 + 1 / 100**2) ** 0.5
    assert difference.sampling == pytest.approx(half)
    assert str(difference) == (
        "la − ce: +15.0 points (one seed says nothing about its spread; over test images alone 95 % interval "
        f"+{15 - half:.1f} to +{15 + half:.1f})"
    )
    assert not difference.shown


def test_equal_gaps_of_several_seeds_have_no_interval_over_test_images() -> None:
    labels = np.zeros(40, dtype=np.int64)
    theirs = np.stack([np.arange(40) < 20, np.arange(40) >= 20])
    ours = np.stack([np.arange(40) < 26, np.arange(40) >= 14])  # other images with each seed
    (difference,) = differences([*on_images("ce", theirs, labels), *on_images("la", ours, labels)])
    assert "the same with all 2 seeds" in str(difference)
    assert "over test images" not in str(difference)


def runs(
    method: str,
    accuracies: list[float],
    seconds: float,
    teacher: float = 0.0,
    passes: int = 100,
    side_by_side: bool = False,
) -> list[Record]:
    """Return a record for each accuracy, of the seeds 0, 1, …"""
    return [
        replace(
            record(method, seed, accuracy),
            seconds=seconds,
            teacher_seconds=teacher,
            student_passes=passes,
            side_by_side=side_by_side,
        )
        for seed, accuracy in enumerate(accuracies)
    ]


def test_the_recommendation_is_the_cheapest_that_is_not_shown_to_be_worse() -> None:
    ce, la = runs("ce", [45.0, 45.6, 45.2], 10), runs("la", [55.0, 55.5, 55.2], 11)
    gml = runs("gml", [55.9, 55.0, 55.6], 30, teacher=11)  # ahead by chance
    assert recommendation([*ce, *la]) == "take la: best balanced accuracy, 55.2"
    assert recommendation([*ce, *la, *gml]) == (
        "take la: balanced accuracy 55.2, not shown to be worse than gml (55.5), and cheaper"
    )
    # a little less time is no reason to take the worse one
    assert recommendation([*la, *runs("gml", [55.9, 55.0, 55.6], 11.5)]) == (
        "take gml: best balanced accuracy, 55.5, but not shown to be better than la"
    )
    # nor is the chance of one slow run
    slow = [
        replace(run, seconds=seconds)
        for run, seconds in zip(runs("gml", [55.9, 55.0, 55.6], 0), (9, 9, 30), strict=True)
    ]
    assert recommendation([*la, *slow]).startswith("take gml: ")
    clear = runs("gml", [57.0, 57.6, 57.3], 30)
    assert recommendation([*ce, *la, *clear]) == "take gml: best balanced accuracy, 57.3"
    assert "one seed" in recommendation([ce[0], la[0]])
    assert recommendation([la[0], replace(la[0], method="ce")]) == (
        "equal: la and ce (balanced accuracy 55.0); one seed, so this may be chance: --seeds 3"
    )
    assert recommendation([ce[0], la[0]], "train further seeds").endswith("may be chance: train further seeds")
    assert recommendation(la) == ""
    # without pairs nothing is known of a difference
    doubt = "fewer than two seeds and sets of test images in common with ce, so differences may be chance"
    assert doubt in recommendation([ce[0], la[1]])
    assert doubt in recommendation([ce[0], *la])
    other = [replace(each, test_images="b") for each in ce]
    assert doubt in recommendation([*other, *(replace(each, test_images="a") for each in la)])
    assert not differences([*other, *(replace(each, test_images="a") for each in la)])
    assert recommendation([*other, *la]) == "take la: best balanced accuracy, 55.2"  # of an earlier version


def test_the_time_of_runs_that_were_trained_side_by_side_recommends_none() -> None:
    la = runs("la", [55.0, 55.5, 55.2], 10, side_by_side=True)
    best = runs("gml", [55.9, 55.0, 55.6], 30, side_by_side=True)
    assert recommendation([*la, *best]) == (
        "take gml: best balanced accuracy, 55.5, but not shown to be better than la"
    )
    assert recommendation([*la, *(replace(run, side_by_side=False) for run in best)]).startswith("take gml: ")
    fewer = runs("la", [55.0, 55.5, 55.2], 40, passes=50, side_by_side=True)
    assert recommendation([*fewer, *best]).startswith("take la: balanced accuracy 55.2, not shown to be worse than gml")
    # passes say nothing of the cost of a teacher
    taught = runs("la", [55.0, 55.5, 55.2], 40, passes=50, side_by_side=True, teacher=5)
    assert recommendation([*taught, *best]).startswith("take gml: ")


def test_a_metric_that_an_earlier_version_did_not_compute_is_left_out() -> None:
    metrics = {"balanced_accuracy": 80.0, "many": 90.0, "medium": 80.0, "few": None}
    old = replace(record("la", 0, 80.0), metrics=metrics)
    new = replace(old, seed=1, metrics={**metrics, "worst_tenth": 20.0, "worst_class": 10.0, "harmonic_mean": 50.0})
    assert [title for _, title in columns([new])][-4:] == ["few", "worst tenth", "worst class", "harmonic mean"]
    assert [title for _, title in columns([old, new])][-1] == "few"
    assert table([new])[1][0][1:8] == ["80.0", "90.0", "80.0", "n/a", "20.0", "10.0", "50.0"]
    header, rows = table([old, new])
    assert len(header) == len(rows[0])
    assert summarize([old, new], "la", "worst_class") is None

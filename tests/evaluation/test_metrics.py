from __future__ import annotations

import math
from functools import partial

import pytest
import scipy.stats
import torch
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from longtail.config import Shots
from longtail.evaluation.metrics import (
    classification_metrics,
    confused_pairs,
    count_correct,
    low_end,
    most_confident_errors,
)
from longtail.losses import compute_log_prior


def test_against_scikit_learn() -> None:
    g = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(500, 8, generator=g), torch.randint(0, 8, (500,), generator=g)
    scores[torch.arange(500), labels] += 1
    result = classification_metrics(count_correct(scores, labels), [200, 150, 100, 60, 20, 19, 5, 2], Shots())
    predicted = scores.argmax(1)
    assert result["balanced_accuracy"] == pytest.approx(100 * balanced_accuracy_score(labels, predicted))
    assert result["top1"] == pytest.approx(100 * (predicted == labels).float().mean().item())
    assert result["top5"] == pytest.approx(100 * top_k_accuracy_score(labels, scores, k=5))
    per_class = result["per_class"]
    assert result["many"] == pytest.approx(sum(per_class[:2]) / 2)
    assert result["medium"] == pytest.approx(sum(per_class[2:5]) / 3)
    assert result["few"] == pytest.approx(sum(per_class[5:]) / 3)


def test_thresholds() -> None:
    assert Shots().groups([101, 100, 20, 19]) == ["many", "medium", "medium", "few"]
    assert Shots(many_above=99, few_below=5).groups([101, 100, 20, 19]) == ["many", "many", "medium", "medium"]


def test_absent_classes_are_left_out() -> None:
    result = classification_metrics(count_correct(torch.eye(3)[[0, 1]], torch.tensor([0, 1])), [50, 40, 30], Shots())
    assert result["per_class"] == [100, 100, None]
    assert result["balanced_accuracy"] == 100
    assert result["many"] is None
    assert result["few"] is None


def test_a_prior_moves_predictions_to_the_head() -> None:
    scores, labels, counts = torch.tensor([[0.0, 1.0], [0.0, 5.0]]), torch.tensor([1, 1]), [90, 10]
    assert classification_metrics(count_correct(scores, labels), counts, Shots())["top1"] == 100
    under_prior = count_correct(scores, labels, compute_log_prior(counts))
    assert classification_metrics(under_prior, counts, Shots())["top1"] == 50


def test_confused_pairs() -> None:
    labels = torch.tensor([0] * 10 + [1] * 4 + [2] * 2)
    predicted = torch.tensor([0] * 8 + [1] * 2 + [0, 0, 0, 1] + [2, 0])
    pairs = confused_pairs(labels, predicted, [100, 10, 1])
    assert [(entry["class"], entry["predicted"], entry["images"]) for entry in pairs] == [(1, 0, 3), (0, 1, 2)]
    assert pairs[0]["share"] == pytest.approx(75)
    assert [entry["to_larger"] for entry in pairs] == [True, False]
    assert confused_pairs(labels, labels, [100, 10, 1]) == []


def test_most_confident_errors_of_each_kind() -> None:
    #                        0    1    2    3    4    5
    labels = torch.tensor([2, 2, 0, 1, 1, 0])
    predicted = torch.tensor([0, 0, 2, 0, 1, 1])
    confidence = torch.tensor([0.5, 0.9, 0.8, 0.7, 0.99, 0.6])
    errors = most_confident_errors(labels, predicted, confidence, [100, 90, 5])
    # one error of each class, and no correct prediction
    assert [(entry["image"], entry["predicted"]) for entry in errors["to_larger"]] == [(1, 0)]
    assert [(entry["image"], entry["predicted"]) for entry in errors["to_smaller"]] == [(2, 2)]
    assert [(entry["image"], entry["class"]) for entry in errors["alike"]] == [(3, 1), (5, 0)]
    assert errors["alike"][0]["confidence"] == pytest.approx(70)
    assert most_confident_errors(labels, labels, confidence, [100, 90, 5]) == {
        "to_larger": [],
        "to_smaller": [],
        "alike": [],
    }
    many = most_confident_errors(
        torch.arange(50), torch.zeros(50, dtype=torch.int64), torch.rand(50), [1] * 50, max_errors=8
    )
    assert len(many["alike"]) == 8


def test_what_a_mean_hides() -> None:
    assert low_end([90.0, 30.0, 60.0]) == {
        "worst_tenth": 30,
        "worst_class": 30,
        "harmonic_mean": pytest.approx(3 / (1 / 90 + 1 / 30 + 1 / 60)),
    }
    # 21 classes with test images: the worst tenth is 3 of them
    accuracies = [float(value) for value in range(100, 79, -1)]
    low = low_end([*accuracies, None, None])
    assert (low["worst_tenth"], low["worst_class"]) == (81, 80)
    assert low["harmonic_mean"] == pytest.approx(scipy.stats.hmean(accuracies))
    assert low_end([50.0, 0.0])["harmonic_mean"] == 0
    assert low_end([None, None]) == {"worst_tenth": None, "worst_class": None, "harmonic_mean": None}
    # two sets with one mean
    even, uneven = (
        classification_metrics(torch.tensor([[10] * 10, hits, [10] * 10]), [50] * 10, Shots())
        for hits in ([9] * 10, [10] * 9 + [0])
    )
    assert even["balanced_accuracy"] == uneven["balanced_accuracy"] == 90
    assert (even["worst_tenth"], even["harmonic_mean"]) == (90, pytest.approx(90))
    assert (uneven["worst_tenth"], uneven["worst_class"], uneven["harmonic_mean"]) == (0, 0, 0)


@pytest.mark.parametrize("wrong", [3, 255, -2])
def test_a_label_out_of_range_is_named(wrong: int) -> None:
    scores, labels, counts = torch.eye(3)[[0, 1, 2]], torch.tensor([0, wrong, 2]), [5, 3, 2]
    message = rf"expected values in \[0, 3\), or −1 to ignore it, got .*{wrong}"
    with pytest.raises(ValueError, match=f"^labels: {message}"):
        count_correct(scores, labels)
    for function in (confused_pairs, partial(most_confident_errors, confidence=torch.ones(3))):
        with pytest.raises(ValueError, match=f"^labels: {message}"):
            function(labels, labels.clamp(0, 2), class_counts=counts)
        with pytest.raises(ValueError, match=f"^predicted: {message}"):
            function(labels.clamp(0, 2), labels, class_counts=counts)


def test_an_ignored_image_counts_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, labels, counts = torch.eye(3)[[0, 1, 1, 2]], torch.tensor([0, 1, 0, 2]), [5, 3, 2]
    expected = count_correct(scores, labels)
    wide = torch.cat([scores, scores])
    assert torch.equal(count_correct(wide, torch.cat([labels, torch.full((4,), -1)])), expected)
    predicted, ignored = torch.tensor([0, 2, 2, 1, 1, 2]), torch.tensor([0, 1, 1, -1, -1, 2])
    (pair,) = confused_pairs(ignored, predicted, counts)
    assert (pair["class"], pair["predicted"], pair["images"], pair["share"]) == (1, 2, 2, 100)
    errors = most_confident_errors(ignored, predicted, torch.linspace(0, 1, 6), counts)
    assert [entry["image"] for entries in errors.values() for entry in entries] == [2]
    # on an accelerator, where labels are not read, those out of range are ignored
    monkeypatch.setattr("longtail.losses.checks.values_are_known", lambda _: False)
    assert torch.equal(count_correct(wide, torch.cat([labels, torch.tensor([3, 255, -7, 2**40])])), expected)


def test_errors_between_classes_without_training_images_are_shown() -> None:
    errors = most_confident_errors(torch.tensor([1, 1, 0]), torch.tensor([2, 0, 1]), torch.ones(3), [5, 0, 0])
    assert {kind: [entry["image"] for entry in entries] for kind, entries in errors.items()} == {
        "to_larger": [1],
        "to_smaller": [2],
        "alike": [0],
    }


def test_probabilities_of_many_classes_are_told_apart() -> None:
    classes = 8142
    probabilities = torch.softmax(0.1 * torch.randn(300, classes), dim=1)
    present, hits, _ = count_correct(probabilities, probabilities.argmax(dim=1)).sum(dim=1).tolist()
    assert hits == present == 300


def test_infinite_scores_rank_and_a_row_with_nan_is_wrong() -> None:
    scores = torch.tensor([[0.0, math.inf], [math.inf, 0.0], [math.nan, math.nan], [math.nan, 1.0], [2.0, -math.inf]])
    labels = torch.tensor([1, 0, 0, 1, 0])
    assert count_correct(scores, labels)[1].tolist() == [2, 1]
    assert count_correct(scores, labels, torch.tensor([-1.0, -2.0]))[1].tolist() == [2, 1]


@pytest.mark.parametrize("classes", [3, 8, 100])
def test_of_equal_scores_the_first_class_is_predicted(classes: int) -> None:
    g = torch.Generator().manual_seed(0)
    scores, labels = torch.randint(0, 3, (600, classes), generator=g).float(), torch.arange(600) % classes
    result = classification_metrics(count_correct(scores, labels), [50] * classes, Shots())
    assert result["balanced_accuracy"] == pytest.approx(100 * balanced_accuracy_score(labels, scores.argmax(dim=1)))
    best = scores.sort(dim=1, descending=True, stable=True).indices[:, :5]
    assert result["top5"] == pytest.approx(100 * float((best == labels[:, None]).any(dim=1).double().mean()))

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from longtail.config import Shots
from longtail.evaluation.metrics import (
    classification_metrics,
    confused_pairs,
    count_correct,
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

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from longtail.config import Shots
from longtail.evaluation.metrics import confusions, metrics, mistakes, tally
from longtail.objectives import log_prior


def test_against_scikit_learn() -> None:
    g = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(500, 8, generator=g), torch.randint(0, 8, (500,), generator=g)
    scores[torch.arange(500), labels] += 1
    result = metrics(tally(scores, labels), [200, 150, 100, 60, 20, 19, 5, 2], Shots())
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


def test_what_is_absent_is_not_zero() -> None:
    result = metrics(tally(torch.eye(3)[[0, 1]], torch.tensor([0, 1])), [50, 40, 30], Shots())
    assert result["per_class"] == [100, 100, None]
    assert result["balanced_accuracy"] == 100
    assert result["many"] is None
    assert result["few"] is None


def test_a_prior_moves_predictions_to_the_head() -> None:
    scores, labels, counts = torch.tensor([[0.0, 1.0], [0.0, 5.0]]), torch.tensor([1, 1]), [90, 10]
    assert metrics(tally(scores, labels), counts, Shots())["top1"] == 100
    assert metrics(tally(scores, labels, log_prior(counts)), counts, Shots())["top1"] == 50


def test_which_class_is_taken_for_which() -> None:
    labels = torch.tensor([0] * 10 + [1] * 4 + [2] * 2)
    predicted = torch.tensor([0] * 8 + [1] * 2 + [0, 0, 0, 1] + [2, 0])
    found = confusions(labels, predicted, [100, 10, 1])
    assert [(entry["class"], entry["taken_for"], entry["images"]) for entry in found] == [(1, 0, 3), (0, 1, 2)]
    assert found[0]["share"] == pytest.approx(75)
    assert [entry["to_larger"] for entry in found] == [True, False]
    assert confusions(labels, labels, [100, 10, 1]) == []


def test_the_surest_mistakes_of_each_kind() -> None:
    #                        0    1    2    3    4    5
    labels = torch.tensor([2, 2, 0, 1, 1, 0])
    predicted = torch.tensor([0, 0, 2, 0, 1, 1])
    confidence = torch.tensor([0.5, 0.9, 0.8, 0.7, 0.99, 0.6])
    found = mistakes(labels, predicted, confidence, [100, 90, 5])
    # a class's surest alone, and nothing that is right
    assert [(entry["image"], entry["taken_for"]) for entry in found["to_larger"]] == [(1, 0)]
    assert [(entry["image"], entry["taken_for"]) for entry in found["to_smaller"]] == [(2, 2)]
    assert [(entry["image"], entry["class"]) for entry in found["alike"]] == [(3, 1), (5, 0)]
    assert found["alike"][0]["confidence"] == pytest.approx(70)
    assert mistakes(labels, labels, confidence, [100, 90, 5]) == {"to_larger": [], "to_smaller": [], "alike": []}
    many = mistakes(torch.arange(50), torch.zeros(50, dtype=torch.int64), torch.rand(50), [1] * 50, most=8)
    assert len(many["alike"]) == 8

"""Classifiers on unit vectors."""

from __future__ import annotations

import copy

import pytest
import torch

from longtail.nn import CosineClassifier
from longtail.nn.heads import ExpertClassifier


def test_scores_of_maps_are_those_of_their_vectors_in_half_precision_too() -> None:
    torch.manual_seed(0)
    classifier, maps = CosineClassifier(8, 5), torch.randn(2, 8, 3, 4)
    expected = classifier(maps.permute(0, 2, 3, 1).flatten(0, 2)).view(2, 3, 4, 5).permute(0, 3, 1, 2)
    torch.testing.assert_close(classifier(maps), expected, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        scores = classifier(maps)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_has_full_precision_scores(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for classifier in (CosineClassifier(8, 5), ExpertClassifier(8, 5, num_experts=2)):
        features, half = torch.randn(3, 8).to(dtype), copy.deepcopy(classifier).to(dtype)
        scores = half(features)
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores, classifier(features.float()), rtol=0, atol=0.3)


def test_features_of_sequences_raise() -> None:
    with pytest.raises(ValueError, match=r"features: expected shape \(B, F\).*got \(2, 5, 8\)"):
        CosineClassifier(8, 3)(torch.randn(2, 5, 8))

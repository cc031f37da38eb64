"""Classifiers on unit vectors."""

from __future__ import annotations

import torch

from longtail.nn import CosineClassifier


def test_scores_of_maps_are_those_of_their_vectors_in_half_precision_too() -> None:
    torch.manual_seed(0)
    classifier, maps = CosineClassifier(8, 5), torch.randn(2, 8, 3, 4)
    expected = classifier(maps.permute(0, 2, 3, 1).flatten(0, 2)).view(2, 3, 4, 5).permute(0, 3, 1, 2)
    torch.testing.assert_close(classifier(maps), expected, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        scores = classifier(maps)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)

"""Several encoders and classifiers as one: their features one after the other, their probabilities averaged."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from torch import nn

from longtail.losses import distillation
from longtail.nn import ClassifierEnsemble, CosineClassifier, Encoder, EncoderEnsemble, FrozenEncoder, freeze

WIDTHS = (3, 5)
TEMPERATURE = 4.0


@pytest.fixture
def members() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Linear(width, 4).double() for width in WIDTHS]


def test_scores_are_those_of_the_mean_of_the_probabilities(members: list[nn.Module]) -> None:
    features = torch.randn(6, sum(WIDTHS), dtype=torch.float64)
    scores = ClassifierEnsemble(members, WIDTHS, TEMPERATURE)(features)
    for row in range(6):
        expected = [0.0] * 4
        start = 0
        for member, width in zip(members, WIDTHS, strict=True):
            own = member(features[row, start : start + width]).tolist()
            start += width
            exponentials = [math.exp(score / TEMPERATURE) for score in own]
            for c in range(4):
                expected[c] += exponentials[c] / sum(exponentials) / 2
        for c in range(4):
            assert scores[row, c].item() == pytest.approx(TEMPERATURE * math.log(expected[c]), rel=1e-10)


def test_its_distillation_has_the_gradient_of_the_mean_of_its_members(members: list[nn.Module]) -> None:
    features = torch.randn(6, sum(WIDTHS), dtype=torch.float64)
    student = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    together = distillation(student, ClassifierEnsemble(members, WIDTHS, TEMPERATURE)(features), TEMPERATURE)
    parts = features.split(list(WIDTHS), dim=1)
    each = [distillation(student, member(part), TEMPERATURE) for member, part in zip(members, parts, strict=True)]
    mean = torch.stack(each).mean()
    assert mean.item() > together.item()  # by the entropies, which do not depend on the student
    ours, theirs = (torch.autograd.grad(loss, student)[0] for loss in (together, mean))
    assert torch.allclose(ours, theirs, atol=1e-12)
    # which the mean of the scores does not have
    scores = torch.stack([member(part) for member, part in zip(members, parts, strict=True)]).mean(dim=0)
    assert not torch.allclose(torch.autograd.grad(distillation(student, scores, TEMPERATURE), student)[0], ours)


def test_maps_have_the_scores_of_their_pixels() -> None:
    torch.manual_seed(0)
    members = [CosineClassifier(width, 4) for width in WIDTHS]
    ensemble = ClassifierEnsemble(members, WIDTHS, TEMPERATURE)
    maps = torch.randn(2, sum(WIDTHS), 3, 3)
    rows = ensemble(maps.permute(0, 2, 3, 1).reshape(-1, sum(WIDTHS)))
    assert torch.allclose(ensemble(maps), rows.view(2, 3, 3, 4).permute(0, 3, 1, 2), atol=1e-5)


def test_encoders_with_statistics_of_their_own_are_frozen_together() -> None:
    torch.manual_seed(0)
    encoders = [Encoder("conv8-tiny", [0.3], [0.4]), Encoder("conv8-tiny", [0.5], [0.2])]
    together = freeze(EncoderEnsemble(encoders)).train()
    assert isinstance(together, EncoderEnsemble)
    assert all(isinstance(member, FrozenEncoder) and not member.training for member in together.members)
    assert not any(parameter.requires_grad for parameter in together.parameters())
    images = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        expected = torch.cat([encoder.eval()(images) for encoder in encoders], dim=1)
    assert together.num_features == expected.shape[1]
    assert torch.allclose(together(images), expected, atol=1e-5)


def test_a_network_is_folded_while_another_thread_uses_its_own() -> None:
    """Tracing replaces the call of all modules of the process; trainings run side by side in threads."""
    other, images = Encoder("resnet8", [0.5] * 3, [0.5] * 3).eval(), torch.rand(2, 3, 32, 32)
    expected, errors, stop = other(images), [], threading.Event()

    def use() -> None:
        while not stop.is_set():
            try:
                assert other(images).equal(expected)
            except BaseException as error:  # of any kind: it is reported below
                errors.append(error)
                return

    threads = [threading.Thread(target=use) for _ in range(2)]
    for thread in threads:
        thread.start()
    encoder = Encoder("resnet56", [0.5] * 3, [0.5] * 3).eval()
    for _ in range(4):
        frozen = FrozenEncoder(encoder)
        assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in frozen.backbone.modules())
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors

"""Contrastive methods, one step at a time."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from longtail.config import Config
from longtail.data.batch import Batch
from longtail.data.dataset import LongTailedData
from longtail.data.sources import load_data
from longtail.errors import LongtailError
from longtail.methods.paco import PaCo
from longtail.methods.proco import ProCo
from longtail.registry import METHODS
from tests.methods.steps import batches, build_method

CONTRASTIVE = ("supcon", "paco", "gpaco", "bcl", "proco")


@pytest.fixture
def data(tiny: Config) -> LongTailedData:
    return load_data(tiny.data, 0)


@pytest.mark.parametrize("name", ["paco", "gpaco"])
def test_a_view_without_a_loss_is_refused(tiny: Config, name: str) -> None:
    with pytest.raises(LongtailError, match=rf"{name}\.share_view false: method {name} has no loss for a view"):
        METHODS[name].check(tiny.replace(method=name, **{name: {"share_view": False}}), [9, 3])


@pytest.mark.parametrize(
    ("name", "views", "share", "passes"),
    [
        (name, *rest)
        for name in CONTRASTIVE
        for rest in ((1, True, 1), (2, True, 2), (2, False, 3))
        if rest[1] or "paco" not in name
    ],
)
def test_views(tiny: Config, data: LongTailedData, name: str, views: int, share: bool, passes: int) -> None:
    config = tiny.replace(method=name, **{name: {"views": views, "share_view": share}})
    method = build_method(config, data)
    assert method.view_plan(config).num_student == passes
    assert len(method.view_plan(config).uses) == passes + (name == "paco")
    images = 0

    def count(_module: object, inputs: tuple[torch.Tensor], _output: object) -> None:
        nonlocal images
        images += len(inputs[0])

    method.encoder.register_forward_hook(count)
    for batch in batches(method, data)[:2]:
        images = 0
        terms = method(batch)
        assert images == passes * len(batch)
        assert terms.keys() == ({"contrast"} if "paco" in name else {"classifier", "contrast"})
        torch.stack(list(terms.values())).sum().backward()
    for parameter_name, parameter in method.named_parameters():
        assert parameter.grad is not None or not parameter.requires_grad, parameter_name


def test_the_keys_of_paco_are_those_of_a_moving_average(tiny: Config, data: LongTailedData) -> None:
    method = build_method(tiny.replace(method="paco", paco={"momentum": 0.9}), data)
    assert isinstance(method, PaCo)
    before = [p.clone() for p in method.ema.average.parameters()]
    with torch.no_grad():
        for p in (*method.encoder.parameters(), *method.embed.parameters()):
            p.add_(1.0)
    first, second = batches(method, data)[:2]
    method(first)
    after = list(method.ema.average.parameters())
    assert all(torch.allclose(new, old + 0.1, atol=1e-5) for new, old in zip(after, before, strict=True))
    assert not any(p.requires_grad for p in after)
    slots = method.queue.slots()
    assert len(method.queue) == len(first)
    assert slots.ids[: len(first)].tolist() == first.ids.tolist()
    assert torch.allclose(slots.features[: len(first)].norm(dim=1), torch.ones(len(first)))
    method(second)["contrast"].backward()
    assert len(method.queue) == len(first) + len(second)


def test_the_means_of_proco_are_over_the_last_epoch_and_this_one(tiny: Config, data: LongTailedData) -> None:
    method = build_method(tiny.replace(method="proco"), data)
    assert isinstance(method, ProCo)
    batch = batches(method, data)[0]
    labels = torch.tensor([0, 0, 1])
    embeddings = [F.normalize(torch.randn(3, 32), dim=1) for _ in range(4)]
    for fraction, z in zip([0.0, 0.0, 0.5, 0.75], embeddings, strict=True):
        method.contrastive_loss(z, labels, torch.zeros(3, 10), dataclasses.replace(batch, epoch_fraction=fraction))
    # the epochs that begin at 0.5 and 0.75 are the last two; both batches of the first epoch are forgotten
    expected = embeddings[2][:2].sum(0) + embeddings[3][:2].sum(0)
    assert torch.allclose(method.sums.sum(0)[0], expected, atol=1e-6)
    assert method.counts.sum(0)[:3].tolist() == [4, 2, 0]


def test_proco_leaves_out_labels_out_of_range(
    tiny: Config, data: LongTailedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = build_method(tiny.replace(method="proco"), data)
    assert isinstance(method, ProCo)
    batch = batches(method, data)[0]
    z, scores = F.normalize(torch.randn(4, 32), dim=1), torch.zeros(4, 10)
    for wrong in (10, -2):
        with pytest.raises(ValueError, match=r"^labels: expected values in \[0, 10\), or −1 to ignore it, got"):
            method.contrastive_loss(z, torch.tensor([0, wrong, 1, 1]), scores, batch)
        assert not bool(method.counts.any())
    z[1] = torch.nan
    method.contrastive_loss(z, torch.tensor([0, -1, 1, 1]), scores, batch)
    assert torch.equal(method.sums[1, :2], torch.stack([z[0], z[2] + z[3]]))
    assert method.counts[1].tolist() == [1, 2] + [0] * 8
    # as on an accelerator, whose labels are not read
    monkeypatch.setattr("longtail.losses.checks.values_are_known", lambda _: False)
    method.contrastive_loss(z, torch.tensor([0, 10, 1, -7]), scores, batch)
    assert method.counts[1].tolist() == [2, 3] + [0] * 8
    assert torch.allclose(method.sums[1, :2], torch.stack([2 * z[0], 2 * z[2] + z[3]]))


def test_a_batch_without_positives_adds_nothing(tiny: Config, data: LongTailedData) -> None:
    method = build_method(tiny.replace(method="supcon"), data)
    whole = batches(method, data)[0]
    first = torch.stack([(whole.labels == c).nonzero()[0, 0] for c in whole.labels.unique()])
    alone = Batch(tuple(view[first] for view in whole.views), whole.labels[first], whole.ids[first])
    terms = method(alone)
    assert terms["contrast"].item() == 0
    assert method.metrics_to_log()["with_positives"].item() == 0
    torch.stack(list(terms.values())).sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in method.parameters() if p.grad is not None)


@pytest.mark.parametrize("parts", [1, 4])
def test_the_moving_average_moves_as_far_in_a_step_of_several_parts(
    tiny: Config, data: LongTailedData, parts: int
) -> None:
    config = tiny.replace(method="paco", paco={"momentum": 0.9}, optimizer={"grad_accumulation_steps": parts})
    method = build_method(config, data)
    assert isinstance(method, PaCo)
    average = next(parameter for name, parameter in method.ema.named_parameters() if "weight" in name)
    name = next(name for name, parameter in method.encoder.named_parameters() if parameter.shape == average.shape)
    before, student = average.detach().clone(), method.encoder.get_parameter(name)
    with torch.no_grad():
        student.add_(1.0)
    for _ in range(parts):
        method.ema.update([method.encoder, method.embed])
    torch.testing.assert_close(average, before + 0.1, rtol=1e-4, atol=1e-4)

"""The terms of GML that the bridges share."""

from __future__ import annotations

from collections import UserDict

import pytest
import torch

from longtail import GMLLoss
from longtail.errors import LongtailError
from longtail.integrations.mixture import MixtureTerms, WithIds


def test_the_terms_are_those_of_the_loss() -> None:
    torch.manual_seed(0)
    terms = MixtureTerms([6, 3], 5, 7, queue_size=8)
    features, keys, labels = torch.randn(6, 5), torch.randn(6, 7), torch.tensor([0, 0, 0, 1, 1, 0])
    ids = torch.arange(6)
    result = terms.eval()(features, keys, labels, ids)
    queues = terms.queues
    loss = GMLLoss([6, 3])
    expected = loss.terms(
        terms.query_mlp(features), labels, terms.key_mlp(queues.features), queues.labels, ids, queues.ids
    )
    assert torch.allclose(result.mixture, expected.mixture)
    assert torch.allclose(result.temperature, expected.temperature)
    assert terms.queues.size == 8
    assert MixtureTerms([6, 3], 5, 7).queues.size == 9
    assert MixtureTerms(torch.tensor([1, 1, 1]), 5, 7, queue_minimum=4).queues.size == 12


def test_slots_that_were_never_filled_do_not_count_in_the_statistics_of_the_keys() -> None:
    torch.manual_seed(0)
    terms = MixtureTerms([6, 3], 5, 7, queue_size=24)  # of which a quarter is filled: each key is there four times
    features, keys, labels = torch.randn(6, 5), torch.randn(6, 7), torch.tensor([0, 0, 0, 1, 1, 0])
    ids = torch.arange(6)
    result = terms(features, keys, labels, ids)
    queues = terms.queues
    expected = GMLLoss([6, 3]).terms(
        terms.query_mlp(features), labels, terms.key_mlp(queues.features), queues.labels, ids, queues.ids
    )
    assert len(queues) == 6
    assert torch.allclose(result.mixture, expected.mixture, rtol=1e-4)
    assert torch.allclose(result.temperature, expected.temperature, rtol=1e-4)
    gradients = [torch.autograd.grad(each.mixture, [*terms.key_mlp.parameters()]) for each in (result, expected)]
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_losses_of_several_batches_have_one_backward_pass() -> None:
    torch.manual_seed(0)
    terms = MixtureTerms([6, 3], 5, 7)
    batches = [(torch.randn(4, 5), torch.randn(4, 7), torch.tensor([0, 0, 1, 1]), torch.arange(4)) for _ in range(2)]
    losses = [each.mixture + each.temperature for each in (terms(*batch) for batch in batches)]
    torch.stack(losses).sum().backward()
    assert terms.criterion.temperature_logit.grad is not None


def test_without_ids_the_temperature_is_constant() -> None:
    labels = torch.tensor([0, 1, 1])
    with pytest.raises(ValueError, match="ids: expected the id of each image"):
        MixtureTerms([2, 3], 5, 7)(torch.randn(3, 5), torch.randn(3, 7), labels)
    terms = MixtureTerms([2, 3], 5, 7, learn_temperature=False)
    result = terms(torch.randn(3, 5), torch.randn(3, 7), labels)
    result.mixture.backward()
    assert result.temperature.item() == 0
    assert terms.criterion.temperature_logit.grad is None


def test_a_batch_of_one_image() -> None:
    terms = MixtureTerms([2, 3], 5, 7)
    features, teacher_features, labels, ids = torch.randn(4, 5), torch.randn(4, 7), torch.arange(4) % 2, torch.arange(4)
    terms(features, teacher_features, labels, ids)
    before = {name: buffer.clone() for name, buffer in terms.named_buffers()}
    one = terms(features[:1], teacher_features[:1], labels[:1], torch.tensor([7]))
    (one.mixture + one.temperature).backward()
    assert all(bool(p.grad.isfinite().all()) for p in terms.parameters() if p.grad is not None)
    assert all(torch.equal(buffer, before[name]) for name, buffer in terms.named_buffers())
    terms(features, teacher_features, labels, ids)
    assert terms.query_mlp.training
    assert terms.key_mlp.training


def test_an_evaluation_does_not_change_the_queues() -> None:
    terms = MixtureTerms([2, 3], 5, 7)
    batch = torch.randn(4, 5), torch.randn(4, 7), torch.arange(4) % 2, torch.arange(4)
    terms(*batch)
    before = terms.queues.slots().features.clone()
    terms.eval()(batch[0], -batch[1], *batch[2:])
    assert torch.equal(terms.queues.slots().features, before)


def test_the_queues_move_with_the_module() -> None:
    terms = MixtureTerms([2, 3], 5, 7).to("meta")
    assert terms.queues.slots().features.is_meta


def test_a_data_set_with_ids() -> None:
    dataset = WithIds([["a", 1], ["b", 0]])
    assert len(dataset) == 2
    assert [dataset[index] for index in range(2)] == [("a", 1, 0), ("b", 0, 1)]
    mappings = WithIds([{"pixel_values": "a", "labels": 1}, UserDict(pixel_values="b", labels=0)])
    assert mappings[0] == {"pixel_values": "a", "labels": 1, "ids": 0}
    assert mappings[1] == {"pixel_values": "b", "labels": 0, "ids": 1}
    with pytest.raises(LongtailError, match=r"^dataset: expected samples without the key ids"):
        WithIds([{"ids": 3}])[0]

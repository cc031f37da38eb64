"""The mixture against loops in float64, written from the equations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longtail.objectives import GMLLoss, gml_loss, log_prior, posterior_cross_entropy
from longtail.objectives.mixture import TEMPERATURE_BOUNDS


def oracle(
    queries: Tensor,
    labels: Tensor,
    keys: Tensor,
    key_labels: Tensor,
    prior: Tensor,
    temperature: float,
    ids: Tensor | None = None,
    key_ids: Tensor | None = None,
) -> list[float | None]:
    """−log p(y) p(z|y) / Σ p(c) p(z|c), class by class; None for a query that does not count."""
    losses: list[float | None] = []
    for i in range(len(queries)):
        joint = {}
        for c in range(len(prior)):
            kept = [
                math.exp(float(queries[i] @ keys[j]) / temperature)
                for j in range(len(keys))
                if key_labels[j] == c and (ids is None or key_ids is None or ids[i] != key_ids[j])
            ]
            if kept:
                joint[c] = math.exp(float(prior[c])) * sum(kept) / len(kept)
        y = int(labels[i])
        losses.append(None if y not in joint else -math.log(joint[y] / sum(joint.values())))
    return losses


def problem(seed: int, batch: int, keys: int, classes: int, dim: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, 100, (classes,), generator=g)
    key_labels = torch.randint(-1, classes, (keys,), generator=g)
    labels = torch.randint(0, classes, (batch,), generator=g)
    # an id names one image, so keys and queries that share it share the label
    key_ids = torch.arange(keys) % max(1, keys - 2)
    ids = torch.full((batch,), 10_000) + torch.arange(batch)
    for i in range(batch):
        same = torch.nonzero(key_labels == labels[i]).flatten()
        if len(same) and i % 2:
            ids[i] = key_ids[same[0]]
    for j in range(keys):
        key_labels[j] = key_labels[int(key_ids[j])]
    return {
        "queries": F.normalize(torch.randn(batch, dim, generator=g, dtype=torch.float64), dim=1),
        "labels": labels,
        "keys": F.normalize(torch.randn(keys, dim, generator=g, dtype=torch.float64), dim=1),
        "key_labels": key_labels,
        "prior": log_prior(counts).double(),
        "ids": ids,
        "key_ids": key_ids,
    }


shapes = st.tuples(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 12), st.integers(1, 6), st.integers(1, 5))


@settings(max_examples=60, deadline=None)
@given(shapes, st.sampled_from([0.05, 0.1, 1.0]), st.booleans())
def test_equals_the_oracle(shape: tuple[int, int, int, int, int], temperature: float, own: bool) -> None:
    p = problem(*shape)
    names: dict[str, Any] = {"ids": p["ids"], "key_ids": p["key_ids"]} if own else {}
    filled = p["key_labels"] >= 0
    arguments = (p["queries"], p["labels"], p["keys"], p["key_labels"], p["prior"], temperature)
    expected = oracle(
        p["queries"],
        p["labels"],
        p["keys"][filled],
        p["key_labels"][filled],
        p["prior"],
        temperature,
        p["ids"] if own else None,
        p["key_ids"][filled] if own else None,
    )
    each = gml_loss(*arguments, **names, reduction="none")
    for got, want in zip(each.tolist(), expected, strict=True):
        assert got == pytest.approx(0.0 if want is None else want, abs=1e-10)
    counted = [want for want in expected if want is not None]
    mean = sum(counted) / len(counted) if counted else 0.0
    assert gml_loss(*arguments, **names).item() == pytest.approx(mean, abs=1e-10)
    assert gml_loss(*arguments, **names, reduction="sum").item() == pytest.approx(sum(counted), abs=1e-9)


def test_order_of_keys_does_not_matter() -> None:
    p = problem(1, 5, 11, 4, 3)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    a = gml_loss(p["queries"], p["labels"], p["keys"], p["key_labels"], p["prior"], 0.1)
    b = gml_loss(p["queries"], p["labels"], p["keys"][order], p["key_labels"][order], p["prior"], 0.1)
    assert a.item() == pytest.approx(b.item(), abs=1e-12)


def test_one_key_a_class_is_logit_adjusted_cross_entropy() -> None:
    p = problem(2, 6, 5, 5, 4)
    labels = torch.arange(5).repeat(2)[:6]
    scores = p["queries"] @ p["keys"].T / 0.2
    expected = posterior_cross_entropy(scores, labels, p["prior"])
    got = gml_loss(p["queries"], labels, p["keys"], torch.arange(5), p["prior"], 0.2)
    assert got.item() == pytest.approx(expected.item(), abs=1e-10)


def test_gradients_are_right() -> None:
    p = problem(3, 4, 9, 3, 3)
    queries, keys = p["queries"].requires_grad_(), p["keys"].requires_grad_()
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def loss(q: Tensor, k: Tensor, t: Tensor) -> Tensor:
        return gml_loss(
            q, p["labels"], k, p["key_labels"], p["prior"], t, ids=p["ids"], key_ids=p["key_ids"], validate=False
        )

    assert torch.autograd.gradcheck(loss, (queries, keys, temperature))


def test_each_term_trains_its_own_part() -> None:
    p = problem(4, 6, 12, 3, 4)
    criterion = GMLLoss([5, 3, 2]).double()
    queries, keys = p["queries"].requires_grad_(), p["keys"].requires_grad_()
    arguments = (queries, p["labels"], keys, p["key_labels"], p["ids"], p["key_ids"])
    terms = criterion.terms(*arguments)
    inputs = (queries, keys, criterion.temperature_logit)
    first = torch.autograd.grad(terms.mixture, inputs, allow_unused=True, retain_graph=True)
    second = torch.autograd.grad(terms.temperature, inputs, allow_unused=True, retain_graph=True)
    assert [gradient is not None for gradient in first] == [True, True, False]
    assert [gradient is not None for gradient in second] == [False, False, True]
    assert criterion(*arguments).item() == pytest.approx((terms.mixture + terms.temperature).item())


def test_learning_the_temperature_raises_the_leave_one_out_likelihood() -> None:
    p = problem(5, 64, 200, 4, 3)
    criterion = GMLLoss([1, 1, 1, 1], temperature=0.02).double()
    arguments = (p["queries"], p["labels"], p["keys"], p["key_labels"], p["ids"], p["key_ids"])
    optimizer = torch.optim.SGD(criterion.parameters(), lr=0.5)
    values = []
    for _ in range(100):
        loss = criterion.terms(*arguments).temperature
        values.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert values[-1] < values[0]
    # features without any structure are described best by a flat likelihood
    assert criterion.temperature > 0.05


def test_a_fixed_temperature_has_no_second_term() -> None:
    p = problem(6, 3, 6, 2, 3)
    criterion = GMLLoss([3, 2], learn_temperature=False).double()
    terms = criterion.terms(p["queries"], p["labels"], p["keys"], p["key_labels"])
    assert terms.temperature.item() == 0
    assert not [parameter for parameter in criterion.parameters() if parameter.requires_grad]


@pytest.mark.parametrize(
    ("labels", "key_labels", "key_ids"),
    [
        ([0, 1], [0, 0, 0], [7, 8, 9]),  # class 1 has no key
        ([0, 0], [0, 1, 1], [0, 8, 9]),  # the first query's class has only its own image
        ([0, 1], [-1, -1, -1], [7, 8, 9]),  # nothing filled yet
        ([1, 1], [1, 1, 1], [7, 8, 9]),  # one class in all
        ([0, 1], [0], [0]),  # one key in all, a query's own
    ],
)
def test_never_nan(labels: list[int], key_labels: list[int], key_ids: list[int]) -> None:
    queries = F.normalize(torch.randn(len(labels), 4), dim=1).requires_grad_()
    keys = F.normalize(torch.randn(len(key_labels), 4), dim=1).requires_grad_()
    criterion = GMLLoss([9, 1])
    loss = criterion(
        queries,
        torch.tensor(labels),
        keys,
        torch.tensor(key_labels),
        torch.arange(len(labels)),
        torch.tensor(key_ids),
    )
    loss.backward()
    for tensor in (loss, queries.grad, keys.grad, criterion.temperature_logit.grad):
        assert tensor is not None
        assert torch.isfinite(tensor).all()


def test_temperature_stays_inside_its_bounds() -> None:
    criterion = GMLLoss([1, 1])
    for value in (-1e6, 1e6):
        with torch.no_grad():
            criterion.temperature_logit.fill_(value)
        assert TEMPERATURE_BOUNDS[0] * 0.999 <= criterion.temperature.item() <= TEMPERATURE_BOUNDS[1] * 1.001
    assert GMLLoss([1, 1], temperature=0.07).temperature.item() == pytest.approx(0.07)


def valid() -> dict[str, Any]:
    unit = F.normalize(torch.ones(2, 3), dim=1)
    return {
        "queries": unit,
        "labels": torch.tensor([0, 1]),
        "keys": unit,
        "key_labels": torch.tensor([0, 1]),
        "log_prior": log_prior([1, 1]),
    }


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("queries", torch.ones(2, 3, 1), "queries: expected shape"),
        ("queries", torch.ones(2, 3), "queries: expected rows of norm 1"),
        ("keys", torch.ones(2, 4), "keys: expected shape"),
        ("keys", torch.full((2, 3), math.nan), "keys: expected rows of norm 1"),
        ("labels", torch.tensor([0, 2]), "labels: expected values in"),
        ("labels", torch.tensor([0.0, 1.0]), "labels: expected shape"),
        ("key_labels", torch.tensor([0, -2]), "key_labels: expected values in"),
        ("key_labels", torch.tensor([0]), "key_labels: expected shape"),
        ("log_prior", torch.zeros(2, 2), "log_prior: expected shape"),
    ],
)
def test_wrong_arguments_are_named(name: str, value: Tensor, message: str) -> None:
    arguments = {**valid(), name: value}
    with pytest.raises(ValueError, match=message):
        gml_loss(**arguments, temperature=0.1)


def test_ids_come_in_pairs_and_reductions_have_names() -> None:
    with pytest.raises(ValueError, match="expected both or neither"):
        gml_loss(**valid(), temperature=0.1, ids=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="expected mean, sum or none"):
        gml_loss(**valid(), temperature=0.1, reduction="max")
    with pytest.raises(ValueError, match="temperature: expected a value between"):
        GMLLoss([1, 1], temperature=5.0)

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
from torch._subclasses.fake_tensor import FakeTensorMode

from longtail.losses import (
    GMLLoss,
    class_log_likelihood,
    compute_log_prior,
    gml_loss,
    mixture_autograd,
    posterior,
    posterior_cross_entropy,
)
from longtail.losses.checks import MIN_TEMPERATURE
from longtail.losses.mixture import TEMPERATURE_BOUNDS


def oracle(
    queries: Tensor,
    labels: Tensor,
    keys: Tensor,
    key_labels: Tensor,
    log_prior: Tensor,
    temperature: float,
    ids: Tensor | None = None,
    key_ids: Tensor | None = None,
) -> list[float | None]:
    """−log p(y) p(z|y) / Σ p(c) p(z|c), class by class; None for a query that does not count."""
    losses: list[float | None] = []
    for i in range(len(queries)):
        joint = {}
        for c in range(len(log_prior)):
            exponentials = [
                math.exp(float(queries[i] @ keys[j]) / temperature)
                for j in range(len(keys))
                if key_labels[j] == c and (ids is None or key_ids is None or ids[i] != key_ids[j])
            ]
            if exponentials:
                joint[c] = math.exp(float(log_prior[c])) * sum(exponentials) / len(exponentials)
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
        "log_prior": compute_log_prior(counts).double(),
        "ids": ids,
        "key_ids": key_ids,
    }


shapes = st.tuples(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 12), st.integers(1, 6), st.integers(1, 5))


@settings(max_examples=60, deadline=None)
@given(shapes, st.sampled_from([0.05, 0.1, 1.0]), st.booleans())
def test_equals_the_oracle(shape: tuple[int, int, int, int, int], temperature: float, with_ids: bool) -> None:
    p = problem(*shape)
    names: dict[str, Any] = {"ids": p["ids"], "key_ids": p["key_ids"]} if with_ids else {}
    filled = p["key_labels"] >= 0
    arguments = (p["queries"], p["labels"], p["keys"], p["key_labels"], p["log_prior"], temperature)
    expected = oracle(
        p["queries"],
        p["labels"],
        p["keys"][filled],
        p["key_labels"][filled],
        p["log_prior"],
        temperature,
        p["ids"] if with_ids else None,
        p["key_ids"][filled] if with_ids else None,
    )
    each = gml_loss(*arguments, **names, reduction="none")
    for got, want in zip(each.tolist(), expected, strict=True):
        assert got == pytest.approx(0.0 if want is None else want, abs=1e-10)
    values = [want for want in expected if want is not None]
    mean = sum(values) / len(values) if values else 0.0
    assert gml_loss(*arguments, **names).item() == pytest.approx(mean, abs=1e-10)
    assert gml_loss(*arguments, **names, reduction="sum").item() == pytest.approx(sum(values), abs=1e-9)


@pytest.fixture(params=["indices", "mask", "blocks of indices", "blocks", "blocks computed again"])
def code_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positives by indices or by a mask, in one block or in many, saved for backward or computed again."""
    monkeypatch.setattr(mixture_autograd, "SPARSE_FACTOR", 0 if "indices" in request.param else 10**9)
    if request.param.startswith("blocks"):
        monkeypatch.setattr(mixture_autograd, "MIN_BLOCK_KEYS", 3)
        monkeypatch.setattr(mixture_autograd, "CPU_BLOCK_ENTRIES", 1)
    if request.param == "blocks computed again":
        monkeypatch.setattr(mixture_autograd, "MAX_SAVED_ENTRIES", 0)


@pytest.mark.usefixtures("code_path")
@pytest.mark.parametrize("seed", range(6))
def test_every_code_path_has_the_oracles_values_and_gradients(seed: int) -> None:
    p = problem(seed, 5, 14, 4, 3)
    queries, keys = p["queries"].requires_grad_(), p["keys"].requires_grad_()
    filled = p["key_labels"] >= 0
    with torch.no_grad():
        expected = oracle(
            queries,
            p["labels"],
            keys[filled],
            p["key_labels"][filled],
            p["log_prior"],
            0.3,
            p["ids"],
            p["key_ids"][filled],
        )
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    names: dict[str, Any] = {"ids": p["ids"], "key_ids": p["key_ids"]}
    each = gml_loss(queries, p["labels"], keys, p["key_labels"], p["log_prior"], temperature, **names, reduction="none")
    assert each.tolist() == pytest.approx([0.0 if want is None else want for want in expected], abs=1e-10)

    def loss(q: Tensor, k: Tensor, t: Tensor) -> Tensor:
        return gml_loss(
            q, p["labels"], k, p["key_labels"], p["log_prior"], t, **names, reduction="none", validate=False
        )

    assert torch.autograd.gradcheck(loss, (queries, keys, temperature))

    def terms(q: Tensor, k: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        # the two terms by their equations, each with the other's variables held constant
        loo = gml_loss(q.detach(), p["labels"], k.detach(), p["key_labels"], p["log_prior"], t, **names, validate=False)
        mixture = gml_loss(q, p["labels"], k, p["key_labels"], p["log_prior"], t.detach(), validate=False)
        return mixture, loo

    criterion = GMLLoss(p["log_prior"].exp().mul(1e6).round().long(), temperature=0.3).double()
    criterion.class_prior.finite_log_prior = p["log_prior"]
    got = criterion.terms(queries, p["labels"], keys, p["key_labels"], p["ids"], p["key_ids"])
    want = terms(queries, keys, criterion.temperature)
    assert got.mixture.item() == pytest.approx(want[0].item(), abs=1e-10)
    assert got.temperature.item() == pytest.approx(want[1].item(), abs=1e-10)
    inputs = (queries, keys, criterion.temperature_logit)
    fused = torch.autograd.grad(got.mixture + 3 * got.temperature, inputs)
    apart = torch.autograd.grad(want[0] + 3 * want[1], inputs)
    for a, b in zip(fused, apart, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("temperature", [MIN_TEMPERATURE, 0.1, 4.0])
def test_float32_keeps_five_digits(temperature: float) -> None:
    """Also for a query so close to its class that the loss is tiny, and at the bounds of τ."""
    for seed in range(5):
        p = problem(seed, 40, 300, 7, 16)
        with torch.no_grad():
            # half of the queries lie next to a key of their class, or of another
            p["queries"][::2] = F.normalize(p["keys"][:20] + 0.05 * p["queries"][::2], dim=1)
        exact = gml_loss(
            p["queries"], p["labels"], p["keys"], p["key_labels"], p["log_prior"], temperature, reduction="none"
        )
        rounded = gml_loss(
            p["queries"].float(),
            p["labels"],
            p["keys"].float(),
            p["key_labels"],
            p["log_prior"].float(),
            temperature,
            reduction="none",
        )
        # rounding the inputs changes the score by a few units in the last place of 1/τ
        slack = 4e-7 / temperature
        assert torch.allclose(rounded.double(), exact, rtol=1e-5 + slack, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_in_float32(dtype: torch.dtype) -> None:
    p = problem(7, 30, 200, 5, 16)
    queries, keys = p["queries"].to(dtype).requires_grad_(), p["keys"].to(dtype).requires_grad_()
    got = gml_loss(queries, p["labels"], keys, p["key_labels"], p["log_prior"].float(), 0.05)
    exact = gml_loss(
        queries.double(), p["labels"], keys.double(), p["key_labels"], p["log_prior"], 0.05, validate=False
    )
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(exact.item(), rel=1e-5)
    got.backward()
    assert queries.grad is not None
    assert keys.grad is not None
    assert queries.grad.dtype == keys.grad.dtype == dtype
    assert bool(torch.isfinite(queries.grad).all())


@pytest.mark.parametrize("seed", range(4))
def test_second_derivatives(seed: int) -> None:
    p = problem(seed, 5, 14, 4, 3)
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    inputs = (p["queries"].requires_grad_(), p["keys"].requires_grad_(), temperature)

    def loss(q: Tensor, k: Tensor, t: Tensor) -> Tensor:
        names: dict[str, Any] = {"ids": p["ids"], "key_ids": p["key_ids"], "reduction": "none", "validate": False}
        return gml_loss(q, p["labels"], k, p["key_labels"], p["log_prior"], t, **names)

    assert torch.autograd.gradgradcheck(loss, inputs)
    first = torch.autograd.grad(loss(*inputs).sum(), inputs)
    with_graph = torch.autograd.grad(loss(*inputs).sum(), inputs, create_graph=True)
    for a, b in zip(with_graph, first, strict=True):
        assert a.requires_grad
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_second_derivatives_of_the_module_and_of_one_tensor_twice() -> None:
    p = problem(3, 6, 14, 4, 3)
    criterion = GMLLoss(p["log_prior"].exp().mul(1e6).round().long(), temperature=0.3).double()
    inputs = (p["queries"].requires_grad_(), p["keys"].requires_grad_(), criterion.temperature_logit)
    for used in (inputs, inputs[:2], inputs[2:]):  # the terms hold each other's variables constant
        terms = criterion(inputs[0], p["labels"], inputs[1], p["key_labels"], p["ids"], p["key_ids"])
        plain = torch.autograd.grad(terms, used, retain_graph=True)
        for a, b in zip(torch.autograd.grad(terms, used, create_graph=True), plain, strict=True):
            assert a.requires_grad
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)
    rows, labels = p["queries"], p["labels"]

    def alike(z: Tensor) -> Tensor:
        return gml_loss(z, labels, z, labels, p["log_prior"], 0.3, validate=False)

    assert torch.autograd.gradgradcheck(alike, (rows,))


def test_autocast_changes_nothing() -> None:
    p = problem(8, 30, 200, 5, 16)
    arguments = (p["queries"].float(), p["labels"], p["keys"].float(), p["key_labels"])
    criterion = GMLLoss([5, 4, 3, 2, 1])
    plain = criterion(*arguments, p["ids"], p["key_ids"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = criterion(*arguments, p["ids"], p["key_ids"])
    assert torch.equal(plain, cast)


def test_compiles_as_one_graph() -> None:
    p = problem(9, 12, 40, 4, 8)
    criterion = GMLLoss([4, 3, 2, 1])
    queries, keys = p["queries"].float().requires_grad_(), p["keys"].float().requires_grad_()
    inputs = (queries, keys, criterion.temperature_logit)
    arguments = (queries, p["labels"], keys, p["key_labels"], p["ids"], p["key_ids"])
    eager = torch.autograd.grad(criterion(*arguments), inputs)
    # aot_eager tests the tracing without the need for a C++ compiler
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    assert compiled(*arguments).item() == pytest.approx(criterion(*arguments).item(), rel=1e-6)
    for a, b in zip(torch.autograd.grad(compiled(*arguments), inputs), eager, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-7)


def test_what_torch_2_6_cannot_trace_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    def break_graph(_device: str) -> bool:
        raise AssertionError("Graph break due to unsupported builtin torch._C._is_autocast_available")

    monkeypatch.setattr(torch.amp, "is_autocast_available", break_graph)
    p = problem(9, 12, 40, 4, 8)
    queries = p["queries"].float().requires_grad_()
    GMLLoss([4, 3, 2, 1])(queries, p["labels"], p["keys"].float(), p["key_labels"]).backward()
    assert queries.grad is not None


def test_no_host_reads_a_value() -> None:
    """Under FakeTensorMode there are no values: reading one, or a shape that depends on one, raises."""
    with FakeTensorMode():
        queries = torch.empty(8, 4, requires_grad=True)
        keys = torch.empty(20, 4, requires_grad=True)
        temperature = torch.empty((), requires_grad=True)
        labels = (torch.empty(8, dtype=torch.int64), torch.empty(20, dtype=torch.int64))
        loss = gml_loss(
            queries,
            labels[0],
            keys,
            labels[1],
            torch.empty(5),
            temperature,
            ids=torch.empty(8, dtype=torch.int64),
            key_ids=torch.empty(20, dtype=torch.int64),
            validate=False,
        )
        loss.backward()
        assert queries.grad is not None
        assert queries.grad.shape == (8, 4)


def test_the_graph_saves_no_mask_and_of_large_problems_no_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(10, 16, 4096, 9, 4)
    queries, keys = p["queries"].float().requires_grad_(), p["keys"].float().requires_grad_()
    for max_saved, largest in ((2**22, 16 * 4096), (0, max(keys.numel(), 4096))):
        monkeypatch.setattr(mixture_autograd, "MAX_SAVED_ENTRIES", max_saved)
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            assert tensor.dtype != torch.bool or tensor.numel() <= 4096
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            gml_loss(queries, p["labels"], keys, p["key_labels"], p["log_prior"].float(), 0.1).backward()
        assert max(sizes) <= largest


def test_log_likelihoods_are_the_oracles_and_a_classifier() -> None:
    p = problem(11, 6, 15, 5, 3)
    got = class_log_likelihood(p["queries"], p["keys"], p["key_labels"], 5, 0.2)
    for i in range(6):
        for c in range(5):
            exps = [math.exp(float(p["queries"][i] @ p["keys"][j]) / 0.2) for j in range(15) if p["key_labels"][j] == c]
            expected = math.log(sum(exps) / len(exps)) if exps else -math.inf
            assert got[i, c].item() == pytest.approx(expected, abs=1e-10)
    # the loss is the cross-entropy of its posterior
    losses = gml_loss(p["queries"], p["labels"], p["keys"], p["key_labels"], p["log_prior"], 0.2, reduction="none")
    negative_log_posterior = -posterior(got, p["log_prior"])[torch.arange(6), p["labels"]]
    has_keys = torch.isfinite(got[torch.arange(6), p["labels"]])
    assert bool(has_keys.any())
    assert torch.allclose(losses[has_keys], negative_log_posterior[has_keys], atol=1e-10)
    criterion = GMLLoss([5, 4, 3, 2, 1], temperature=0.2).double()
    assert torch.allclose(criterion.log_likelihood(p["queries"], p["keys"], p["key_labels"]), got, atol=1e-6)


def test_one_key_a_class_and_large_temperature_leave_the_prior() -> None:
    p = problem(12, 6, 5, 5, 4)
    labels = torch.arange(5).repeat(2)[:6]
    losses = gml_loss(p["queries"], labels, p["keys"], torch.arange(5), p["log_prior"], 1e9, reduction="none")
    assert torch.allclose(losses, -p["log_prior"][labels], atol=1e-8)


def test_order_of_keys_does_not_matter() -> None:
    p = problem(1, 5, 11, 4, 3)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    a = gml_loss(p["queries"], p["labels"], p["keys"], p["key_labels"], p["log_prior"], 0.1)
    b = gml_loss(p["queries"], p["labels"], p["keys"][order], p["key_labels"][order], p["log_prior"], 0.1)
    assert a.item() == pytest.approx(b.item(), abs=1e-12)


def test_one_key_a_class_is_logit_adjusted_cross_entropy() -> None:
    p = problem(2, 6, 5, 5, 4)
    labels = torch.arange(5).repeat(2)[:6]
    scores = p["queries"] @ p["keys"].T / 0.2
    expected = posterior_cross_entropy(scores, labels, p["log_prior"])
    got = gml_loss(p["queries"], labels, p["keys"], torch.arange(5), p["log_prior"], 0.2)
    assert got.item() == pytest.approx(expected.item(), abs=1e-10)


def test_each_term_trains_its_own_part() -> None:
    p = problem(4, 6, 12, 3, 4)
    criterion = GMLLoss([5, 3, 2]).double()
    queries, keys = p["queries"].requires_grad_(), p["keys"].requires_grad_()
    arguments = (queries, p["labels"], keys, p["key_labels"], p["ids"], p["key_ids"])
    terms = criterion.terms(*arguments)
    inputs = (queries, keys, criterion.temperature_logit)
    first = torch.autograd.grad(terms.mixture, inputs, allow_unused=True, retain_graph=True)
    second = torch.autograd.grad(terms.temperature, inputs, allow_unused=True, retain_graph=True)
    assert [bool(gradient.abs().sum() > 0) for gradient in first] == [True, True, False]
    assert [bool(gradient.abs().sum() > 0) for gradient in second] == [False, False, True]
    assert criterion(*arguments).item() == pytest.approx((terms.mixture + terms.temperature).item())


def test_learning_the_temperature_raises_the_leave_one_out_likelihood() -> None:
    p = problem(5, 64, 200, 4, 3)
    criterion = GMLLoss([1, 1, 1, 1], temperature=0.03).double()
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
    # features without structure are fitted best by a flat likelihood
    assert criterion.temperature > 0.05


@pytest.mark.parametrize("split", [True, False])
def test_a_query_without_a_label_does_not_count(split: bool) -> None:
    p = problem(0, 8, 9, 3, 4)
    labels, blank = p["labels"].clone(), torch.tensor([1, 4, 7])
    labels[blank] = -1
    queries = p["queries"].requires_grad_()
    rest = [index for index in range(8) if index not in {1, 4, 7}]
    criterion = GMLLoss([4, 3, 2], learn_temperature=split).double()
    ids = (p["ids"], p["key_ids"])
    got = criterion(queries, labels, p["keys"], p["key_labels"], *ids)
    expected = criterion(queries[rest], labels[rest], p["keys"], p["key_labels"], p["ids"][rest], p["key_ids"])
    assert got.item() == pytest.approx(expected.item(), abs=1e-12)
    (gradient,) = torch.autograd.grad(got, queries)
    assert not bool(gradient[blank].any())
    assert bool(gradient[rest].any())


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
        ([0, 1], [-1, -1, -1], [7, 8, 9]),  # no slot filled
        ([1, 1], [1, 1, 1], [7, 8, 9]),  # a single class
        ([0, 1], [0], [0]),  # a single key, the query's own image
        ([0, 0], [0, 0, 1], [0, 0, 1]),  # an image in several slots, and no other key of its class
        ([1, 1], [0, 2, 2], [0, 0, 1]),  # only keys of classes outside the batch
        ([1, 2], [0, 2, 1], [0, 0, 1]),  # one id for two images
        ([], [0, 1], [0, 1]),  # no query
        ([0, 1], [], []),  # no key
    ],
)
@pytest.mark.parametrize("temperature", [0.0201, 0.1, 0.99])
def test_never_nan(labels: list[int], key_labels: list[int], key_ids: list[int], temperature: float) -> None:
    queries = F.normalize(torch.randn(len(labels), 4), dim=1).requires_grad_()
    keys = F.normalize(torch.randn(len(key_labels), 4), dim=1).requires_grad_()
    criterion = GMLLoss([90_000, 1, 0], temperature)
    loss = criterion(
        queries,
        torch.tensor(labels, dtype=torch.int64),
        keys,
        torch.tensor(key_labels, dtype=torch.int64),
        torch.arange(len(labels)),
        torch.tensor(key_ids, dtype=torch.int64),
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
        "log_prior": compute_log_prior([1, 1]),
        "temperature": 0.1,
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
        ("log_prior", torch.tensor([0.0, math.nan]), "log_prior: expected logarithms"),
        ("queries", torch.ones(2, 3, dtype=torch.int64), "queries: expected floats, got torch.int64"),
        (
            "keys",
            F.normalize(torch.ones(2, 3), dim=1).to("meta"),
            "keys: expected device cpu, as queries have, got meta",
        ),
        ("temperature", 0.0, "temperature: expected at least 0.02, got 0"),
        ("temperature", torch.full((1, 1), 0.1), r"temperature: expected a scalar, got shape \(1, 1\)"),
        ("temperature", torch.full((2, 1), 0.1), r"temperature: expected a scalar, got shape \(2, 1\)"),
        ("temperature", torch.tensor(math.nan), "temperature: expected at least 0.02, got nan"),
    ],
)
def test_wrong_arguments_are_named(name: str, value: Tensor, message: str) -> None:
    arguments = {**valid(), name: value}
    with pytest.raises(ValueError, match=message):
        gml_loss(**arguments)


def test_ids_come_in_pairs_and_reductions_have_names() -> None:
    with pytest.raises(ValueError, match="expected both or neither"):
        gml_loss(**valid(), ids=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="expected mean, sum or none"):
        gml_loss(**valid(), reduction="max")
    with pytest.raises(ValueError, match="temperature: expected a value between"):
        GMLLoss([1, 1], temperature=5.0)

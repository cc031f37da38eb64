from __future__ import annotations

import copy
import itertools
import json
import math
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, log_loss
from torch import Tensor, nn

from longtail.config import Shots
from longtail.errors import LongtailError
from longtail.evaluation.calibration import calibration_metrics, group_numbers, reliability
from longtail.evaluation.metrics import classification_metrics, count_correct
from longtail.evaluation.streaming_metrics import (
    BalancedAccuracy,
    ShotAccuracy,
    ShotCalibrationError,
    SummedMetric,
    balanced_accuracy,
    shot_accuracy,
    shot_calibration_error,
)
from tests.processes import start_longtail

COUNTS = [500, 200, 60, 30, 8, 3]


def draw(count: int = 300, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return scores of six classes, and labels of which some are to be left out."""
    g = torch.Generator().manual_seed(seed)
    scores, labels = torch.randn(count, 6, generator=g), torch.randint(-1, 6, (count,), generator=g)
    scores[torch.arange(count), labels.clamp(min=0)] += 1.5
    return scores, labels


def metrics() -> list[SummedMetric]:
    return [BalancedAccuracy(6), ShotAccuracy(COUNTS), ShotCalibrationError(COUNTS)]


def numbers(values: dict[str, Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in values.items()}


@given(cuts=st.lists(st.integers(0, 300), max_size=6), seed=st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_batches_do_not_matter(cuts: list[int], seed: int) -> None:
    scores, labels = draw(seed=seed)
    edges = [0, *sorted(cuts), 300]
    for metric, other in zip(metrics(), metrics(), strict=True):
        for first, last in itertools.pairwise(edges):
            metric.update(scores[first:last], labels[first:last])
        other.update(scores, labels)
        assert numbers(metric.compute()) == pytest.approx(numbers(other.compute()), nan_ok=True)


def test_the_formulas_are_those_of_the_reports() -> None:
    scores, labels = draw()
    report = classification_metrics(count_correct(scores, labels), COUNTS, Shots())
    values = shot_accuracy(scores, labels, COUNTS)
    for name in ("many", "medium", "few", "balanced_accuracy"):
        assert 100 * values[name] == pytest.approx(report[name])
        assert [100 * values[f"{name}_low"], 100 * values[f"{name}_high"]] == pytest.approx(report["intervals"][name])
    for name in ("top1", "worst_class", "harmonic_mean"):
        assert 100 * values[name] == pytest.approx(report[name])
    alone = balanced_accuracy(scores, labels)
    assert set(alone) == {"balanced_accuracy", "balanced_accuracy_low", "balanced_accuracy_high"}
    assert alone == {name: values[name] for name in alone}
    kept = labels >= 0
    sums = reliability(scores[kept].double().log_softmax(1), labels[kept], group_numbers(Shots().groups(COUNTS)))
    report = calibration_metrics(sums)
    errors = shot_calibration_error(scores, labels, COUNTS, probabilities=False)
    assert 100 * errors["ece"] == pytest.approx(report["ece"])
    assert 100 * errors["class_ece"] == pytest.approx(report["class_ece"])
    for name in ("many", "medium", "few"):
        assert 100 * errors[f"{name}_ece"] == pytest.approx(report["groups"][name]["ece"])
    assert (errors["nll"], errors["brier"]) == pytest.approx((report["nll"], report["brier"]))


def test_against_scikit_learn() -> None:
    scores, labels = draw()
    kept = labels >= 0
    predicted, probabilities = scores.argmax(1), scores.double().softmax(1)
    expected = balanced_accuracy_score(labels[kept], predicted[kept])
    for predictions in (scores, predicted, probabilities.numpy(), predicted.numpy(), predicted.tolist()):
        assert balanced_accuracy(predictions, labels)["balanced_accuracy"] == pytest.approx(expected)
        assert shot_accuracy(predictions, labels, COUNTS)["balanced_accuracy"] == pytest.approx(expected)
    for given_ in (probabilities, probabilities.numpy(), probabilities.numpy().tolist()):
        errors = shot_calibration_error(given_, labels.numpy(), COUNTS)
        assert errors["nll"] == pytest.approx(log_loss(labels[kept], probabilities[kept]))


def test_a_group_is_as_wrong_as_it_is_overconfident() -> None:
    """A loop in float64: the error of the group few, whose 15 bins are equally wide."""
    scores, of = draw(2000)
    p, labels = scores.double().softmax(1).numpy(), of.tolist()
    error, count = 0.0, 0
    of_few = [i for i in range(2000) if labels[i] in {4, 5}]
    for bin_ in range(15):
        inside = [i for i in of_few if min(int(p[i].max() * 15), 14) == bin_]
        error += abs(sum(p[i].max() for i in inside) - sum(int(p[i].argmax() == labels[i]) for i in inside))
        count += len(inside)
    assert count == len(of_few)
    assert shot_calibration_error(p, labels, COUNTS)["few_ece"] == pytest.approx(error / count)


def test_the_value_of_a_batch_and_of_all() -> None:
    scores, labels = draw()
    for metric in metrics():
        first, second = metric(scores[:100], labels[:100]), metric(scores[100:], labels[100:])
        alone = copy.deepcopy(metric)
        alone.reset()
        alone.update(scores[:100], labels[:100])
        assert numbers(first) == pytest.approx(numbers(alone.compute()), nan_ok=True)
        other = copy.deepcopy(metric)
        other.reset()
        other.update(scores[100:], labels[100:])
        assert numbers(second) == pytest.approx(numbers(other.compute()), nan_ok=True)
        alone.merge_state(other)
        assert numbers(alone.compute()) == pytest.approx(numbers(metric.compute()), nan_ok=True)
        assert numbers(pickle.loads(pickle.dumps(metric)).compute()) == pytest.approx(
            numbers(metric.compute()), nan_ok=True
        )
        metric.reset()
        assert all(math.isnan(value) for value in numbers(metric.compute()).values())


def test_nothing_is_learned_from_a_metric() -> None:
    scores, labels = draw()
    scores.requires_grad_()
    for metric in metrics():
        assert not any(value.requires_grad for value in metric(scores, labels).values())
        assert not any(total.requires_grad for total in metric.sums)


def test_a_model_with_metrics_inside() -> None:
    """Half precision does not round the sums, and DistributedDataParallel finds no buffers to overwrite."""
    head, accuracy, ece = nn.Linear(2, 2), ShotAccuracy(COUNTS), ShotCalibrationError(COUNTS)
    model = nn.ModuleList([head, accuracy, ece])
    assert set(model.state_dict()) == {"0.weight", "0.bias"}
    assert list(model.buffers()) == []
    scores, labels = draw()
    before = numbers(ece(scores, labels))
    model.half()
    assert head.weight.dtype == torch.float16
    assert numbers(ece.compute()) == before
    assert {total.dtype for total in ece.sums} == {torch.float64}
    model.to("meta")
    assert {total.device.type for total in ece.sums} == {"meta"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_of_any_precision(dtype: torch.dtype) -> None:
    scores, labels = draw()
    scores = scores.to(dtype)
    assert shot_accuracy(scores, labels, COUNTS) == shot_accuracy(scores.argmax(1), labels, COUNTS)
    exact = shot_calibration_error(scores.double(), labels, COUNTS, probabilities=False)
    assert shot_calibration_error(scores, labels, COUNTS, probabilities=False) == exact


def test_certain_and_wrong() -> None:
    errors = shot_calibration_error([[1.0, 0.0], [1.0, 0.0]], [0, 1], [500, 5])
    assert (errors["ece"], errors["many_ece"], errors["few_ece"], errors["brier"]) == (0.5, 0.0, 1.0, 1.0)
    assert errors["nll"] == math.inf
    assert math.isnan(errors["medium_ece"])


def test_many_classes_need_no_table_of_predictions() -> None:
    labels = torch.arange(50_000)
    values = shot_accuracy(labels.roll(1), labels, torch.ones(50_000))
    assert values["balanced_accuracy"] == 0


@pytest.mark.parametrize(
    ("metric", "predictions", "labels", "message"),
    [
        (BalancedAccuracy(2), torch.zeros(3, 3), torch.zeros(3), "predictions: expected 2 columns, got 3"),
        (BalancedAccuracy(2), torch.zeros(3), torch.zeros(3), "predictions: expected int64, got torch.float32"),
        (BalancedAccuracy(2), torch.zeros(3, 2), torch.zeros(2), "labels: expected shape (3,), got (2,)"),
        (BalancedAccuracy(2), torch.zeros(3, 2, 1), torch.zeros(3), "predictions: expected shape (N,) or (N, 2)"),
        (BalancedAccuracy(2), torch.zeros(1, 2), torch.tensor([2]), "labels: expected values in [0, 2), or −1"),
        (BalancedAccuracy(2), torch.tensor([2]), torch.tensor([1]), "predictions: expected values in [0, 2)"),
        (ShotCalibrationError([9, 9]), torch.tensor([1]), torch.tensor([1]), "predictions: expected shape (N, 2) of"),
        (
            ShotCalibrationError([9, 9], probabilities=True),
            torch.tensor([[2.0, -1.0]]),
            torch.tensor([1]),
            "predictions: expected probabilities, rows of at least 0 that sum to 1; for logits, probabilities=False",
        ),
        (
            ShotCalibrationError([9, 9], probabilities=True),
            torch.tensor([[0.2, 0.2]]),
            torch.tensor([1]),
            "predictions: expected probabilities",
        ),
    ],
)
def test_what_a_metric_refuses(metric: SummedMetric, predictions: Tensor, labels: Tensor, message: str) -> None:
    labels = labels.long()
    before = [total.clone() for total in metric.sums]
    with pytest.raises(ValueError, match=re.escape(message)):
        metric.update(predictions, labels)
    assert all(torch.equal(a, b) for a, b in zip(before, metric.sums, strict=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BalancedAccuracy(0), "num_classes: expected at least 1, got 0"),
        (lambda: ShotAccuracy([3, -1]), "class_counts: expected counts of at least 0, got -1 for class 1"),
        (lambda: ShotAccuracy([3, 1], many_above=5, few_below=9), "few_below: expected at least 1 and at most many"),
        (lambda: balanced_accuracy([0, 1], [0.0, 1.0]), "labels: expected whole numbers, got torch.float64"),
    ],
)
def test_arguments_that_make_no_metric(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def sum_up(rank: int, world: int, folder: str) -> None:
    """Write the metrics of all processes; the last one has no samples."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world)
    scores, labels = draw()
    results: dict[str, Any] = {}
    for metric in metrics():
        name = type(metric).__name__
        parts = torch.arange(300).tensor_split(world - 1)
        local = {}
        if rank < world - 1:
            local = numbers(metric(scores[parts[rank]], labels[parts[rank]]))
        results[name] = {"all": numbers(metric.compute()), "again": numbers(metric.compute()), "batch": local}
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_in_several_processes(tmp_path: Path) -> None:
    world = 3
    code = "from tests.evaluation.test_streaming_metrics import sum_up; sum_up({}, {}, {!r})"
    processes = [start_longtail("--version", prelude=code.format(rank, world, str(tmp_path))) for rank in range(world)]
    for process in processes:
        assert process.wait(timeout=120) == 0, process.stderr
    scores, labels = draw()
    for metric in metrics():
        metric.update(scores, labels)
        for rank in range(world):
            result = json.loads((tmp_path / f"{rank}.json").read_text())[type(metric).__name__]
            assert result["all"] == pytest.approx(numbers(metric.compute()), nan_ok=True)
            assert result["again"] == pytest.approx(result["all"], nan_ok=True)  # own sums are unchanged
            if rank == 0:
                half = copy.deepcopy(metric)
                half.reset()
                half.update(scores[:150], labels[:150])
                assert result["batch"] == pytest.approx(numbers(half.compute()), nan_ok=True)


@pytest.mark.slow  # to import it takes seconds
def test_as_torchmetrics_computes_it() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    scores, labels = draw()
    kept = labels >= 0
    recall = torchmetrics.classification.MulticlassAccuracy(6, average="macro")
    recall.update(scores[kept], labels[kept])
    assert balanced_accuracy(scores, labels)["balanced_accuracy"] == pytest.approx(recall.compute().item())
    error = torchmetrics.classification.MulticlassCalibrationError(6, n_bins=15, norm="l1")
    error.update(scores[kept].softmax(1), labels[kept])
    assert shot_calibration_error(scores.softmax(1), labels, COUNTS)["ece"] == pytest.approx(
        error.compute().item(), abs=1e-5
    )


def test_labels_as_arrays_of_any_integers() -> None:
    scores, labels = draw()
    for kind in (np.int8, np.int32, np.int64):
        assert balanced_accuracy(scores.numpy(), labels.numpy().astype(kind)) == balanced_accuracy(scores, labels)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_number_of_classes_of_scores_is_that_of_their_columns(value: float) -> None:
    assert balanced_accuracy([[0.0, value], [1.0, 0.0]], [0, 0])["balanced_accuracy"] == 0.5


def test_series_are_copied_without_a_warning() -> None:
    pandas = pytest.importorskip("pandas")
    series = pandas.Series([0, 1, 1])
    assert balanced_accuracy(series, series)["balanced_accuracy"] == 1


@pytest.mark.parametrize("metric", [BalancedAccuracy(6), ShotAccuracy(COUNTS), ShotCalibrationError(COUNTS)])
def test_arrays_are_refused_by_name(metric: Any) -> None:
    scores, labels = draw()
    for arguments, name in (
        ((scores.numpy(), labels), "predictions"),
        ((scores, labels.numpy()), "labels"),
    ):
        with pytest.raises(LongtailError, match=f"^{name}: expected a tensor, got ndarray; use torch.as_tensor"):
            metric.update(*arguments)


def test_names_in_place_of_numbers_are_refused() -> None:
    with pytest.raises(LongtailError, match=r"^predictions: expected numbers, got 'a'; "):
        balanced_accuracy(["a", "b"], [0, 1])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (BalancedAccuracy(6), "expected another ShotAccuracy, got BalancedAccuracy"),
        (ShotAccuracy([5]), "of the same classes"),
        (ShotAccuracy(COUNTS[::-1]), "of the same classes"),
        (ShotAccuracy(COUNTS, few_below=5), "of the same classes"),
    ],
)
def test_metrics_of_other_classes_are_not_added(other: Any, message: str) -> None:
    metric = ShotAccuracy(COUNTS)
    with pytest.raises(LongtailError, match=f"merge_state: .*{message}"):
        metric.merge_state(other)

"""Validation of the arguments of losses. Legend: B samples or queries, K keys, C classes, D embedding width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longtail.class_counts import in_class_order

MIN_TEMPERATURE = 0.02
"""exp(±1/τ) is exp(±50) here; far below it the sums of the mixture loss would leave float32's range."""

Counts = Tensor | Sequence[float] | Any
"""(C,) counts as a sequence, tensor or array, or as a pandas series with the class numbers as its index."""


def as_counts(class_counts: Counts, name: str = "class_counts", noun: str = "count") -> Tensor:
    """Return (C,) class counts as a float64 tensor, on the device of a tensor; on the CPU if that is MPS.

    Other counts are on the default device; on the CPU if that is ``meta``, where a network is built without memory.

    Args:
        class_counts: (C,) training images of each class; 0 for a class without any.
        name: of the argument, for the message.
        noun: what an entry is, for the message.

    Raises:
        ValueError: counts that are negative, not finite, not one-dimensional, or all zero.
    """
    if not isinstance(class_counts, Tensor):
        values = in_class_order(class_counts, name, noun)
        try:
            device = "cpu" if torch.get_default_device().type == "meta" else None
            class_counts = torch.tensor(values, dtype=torch.float64, device=device)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"{name}: expected one {noun} for each class, numbers, got {values!r:.80}") from None
    # MPS has no float64
    counts = (class_counts.cpu() if class_counts.device.type == "mps" else class_counts).double()
    if counts.ndim != 1 or counts.numel() == 0:
        raise ValueError(f"{name}: expected shape (C,), one {noun} for each class, got {tuple(counts.shape)}")
    wrong = ~((counts >= 0) & (counts < math.inf))
    if bool(wrong.any()):
        index = int(wrong.nonzero()[0])
        raise ValueError(f"{name}: expected {noun}s of at least 0, got {float(counts[index]):g} for class {index}")
    if not bool((counts > 0).any()):
        raise ValueError(f"{name}: expected {noun}s of at least 0, one of them positive; all are 0")
    return counts


def beside_counts(values: Tensor, class_counts: Counts) -> Tensor:
    """Return what was computed from :func:`as_counts` on the device of the class counts that were given."""
    return values.to(class_counts.device) if isinstance(class_counts, Tensor) else values


def valid_labels(
    labels: Tensor, num_classes: int, name: str = "labels", *, ignore_index: int = -1, validate: bool = False
) -> Tensor:
    """Return the labels, −1 in place of ``ignore_index`` and of those that are not in [0, C).

    On a CPU the latter raise. An accelerator's values would have to be waited for, so there and in a traced graph
    their samples are ignored instead.

    Args:
        labels: int64, any shape.
        num_classes: C.
        name: of the argument, for the message.
        ignore_index: label of the samples to ignore; one in [0, C) is ignored too.
        validate: raise on an accelerator too.

    Raises:
        ValueError: labels that are not int64 or, where they are checked, not in [0, C) and not ``ignore_index``.
    """
    if labels.dtype != torch.int64:
        raise ValueError(f"{name}: expected int64, got {labels.dtype}; use labels.long()")
    checked = values_are_known(labels) and (labels.device.type == "cpu" or validate)
    if checked:
        check_range(labels, num_classes, name, ignore_index)
    if ignore_index != -1:
        labels = labels.masked_fill(labels == ignore_index, -1)
    return labels if checked else torch.where((labels >= 0) & (labels < num_classes), labels, -1)


def valid_targets(scores: Tensor, labels: Tensor, *, ignore_index: int = -1, validate: bool = False) -> Tensor:
    """Return labels of scores: class indices as :func:`valid_labels`, or probabilities in the type of the scores.

    Shapes and types are checked everywhere, values on a CPU or where ``validate``.

    Args:
        scores: (B, C, …), in full precision.
        labels: (B, …) int64, or (B, C, …) floats of at least 0 that sum to 1 over the classes; all are 0 where a sample
            is ignored.
        ignore_index: see :func:`valid_labels`.
        validate: see :func:`valid_labels`.

    Raises:
        ValueError: shapes, types or values are not as above.
    """
    soft = labels.is_floating_point()
    expected = tuple(scores.shape) if soft else (scores.shape[0], *scores.shape[2:])
    if tuple(labels.shape) != expected:
        raise ValueError(
            f"labels: expected {'probabilities' if soft else 'class indices'} of shape {expected} for scores of shape "
            f"{tuple(scores.shape)}, got {tuple(labels.shape)} of {labels.dtype}"
        )
    if not soft:
        return valid_labels(labels, scores.shape[1], ignore_index=ignore_index, validate=validate)
    probabilities = labels.to(scores.dtype)
    if values_are_known(labels) and (labels.device.type == "cpu" or validate):
        tolerance = 1e-3 if labels.dtype in {torch.float32, torch.float64} else 2e-2
        sums = probabilities.sum(dim=1)
        if not bool((((sums - 1).abs() < tolerance) | (sums == 0)).all() and (probabilities >= 0).all()):
            raise ValueError(
                "labels: expected probabilities of at least 0 that sum to 1 over the classes (all 0: sample ignored), "
                f"got values from {float(probabilities.min()):.3g} and sums from {float(sums.min()):.3g} to "
                f"{float(sums.max()):.3g}"
            )
    return probabilities


def values_are_known(tensor: Tensor) -> bool:
    """Return whether the tensor has values that can be checked, which one of a traced graph does not have.

    Nor has one within ``torch.func.vmap``, which stands for the tensors of all samples.
    """
    if torch.compiler.is_compiling() or type(tensor) is not Tensor or tensor.is_meta:
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def check_range(labels: Tensor, num_classes: int, name: str, ignore_index: int = -1) -> None:
    """Raise ValueError where a label is neither in [0, C) nor ``ignore_index``."""
    if labels.numel() == 0:
        return
    if ignore_index != -1:
        labels = labels.masked_fill(labels == ignore_index, 0)
    low, high = (int(bound) for bound in torch.aminmax(labels))
    if low < (-1 if ignore_index == -1 else 0) or high >= num_classes:
        ignored = str(ignore_index).replace("-", "−")
        raise ValueError(
            f"{name}: expected values in [0, {num_classes}), or {ignored} to ignore it, got {low} to {high}"
        )


def ignore_classes(labels: Tensor, classes: Tensor) -> Tensor:
    """Return the labels, −1 in place of those of some classes.

    Args:
        labels: int64 in [0, C), or −1; any shape.
        classes: (C,) bool, the classes to ignore.
    """
    # on a CPU it is cheaper to ask first
    if classes.device.type == "cpu" and values_are_known(classes) and not bool(classes.any()):
        return labels
    return labels.masked_fill(classes[labels.clamp(min=0)], -1)


def check_mixture(
    queries: Tensor,
    labels: Tensor,
    keys: Tensor,
    key_labels: Tensor,
    log_prior: Tensor,
    temperature: Tensor | float | None,
    ids: Tensor | None,
    key_ids: Tensor | None,
) -> None:
    """Check the arguments of :func:`longtail.losses.gml_loss`.

    Raises:
        ValueError: names the first argument whose shape, type or values are not as expected.
    """
    if torch.compiler.is_compiling():
        return  # a traced graph has no values to check
    check_pairs(queries, labels, keys, key_labels, ids, key_ids)
    if not log_prior.is_floating_point():
        raise ValueError(f"log_prior: expected floats, got {log_prior.dtype}")
    if log_prior.ndim != 1:
        raise ValueError(f"log_prior: expected shape (C,), got {tuple(log_prior.shape)}")
    if log_prior.device != queries.device:
        raise ValueError(f"log_prior: expected device {queries.device}, as queries have, got {log_prior.device}")
    for name, tensor in (("labels", labels), ("key_labels", key_labels)):
        check_range(tensor, len(log_prior), name)
    if bool(log_prior.isnan().any()) or bool((log_prior == math.inf).any()):
        raise ValueError("log_prior: expected logarithms of frequencies, got NaN or inf")
    if temperature is not None:
        if isinstance(temperature, Tensor) and temperature.shape not in {(), (1,)}:
            raise ValueError(f"temperature: expected a scalar, got shape {tuple(temperature.shape)}")
        value = temperature.item() if isinstance(temperature, Tensor) else temperature
        if not value >= MIN_TEMPERATURE:
            raise ValueError(f"temperature: expected at least {MIN_TEMPERATURE}, got {value:.3g}")
    check_norms(queries, keys, key_labels)


def check_pairs(
    queries: Tensor, labels: Tensor, keys: Tensor, key_labels: Tensor, ids: Tensor | None, key_ids: Tensor | None
) -> None:
    """Check shapes, types and devices of queries and keys, which is possible without waiting for an accelerator.

    Raises:
        ValueError: names the first argument that is not as expected.
    """
    if queries.ndim != 2:
        raise ValueError(f"queries: expected shape (B, D), got {tuple(queries.shape)}")
    for name, tensor in {"queries": queries, "keys": keys}.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: expected floats, got {tensor.dtype}")
    if keys.ndim != 2 or keys.shape[1] != queries.shape[1]:
        raise ValueError(f"keys: expected shape (K, {queries.shape[1]}), got {tuple(keys.shape)}")
    rows = {"labels": (labels, queries.shape[0]), "key_labels": (key_labels, keys.shape[0])}
    if (ids is None) != (key_ids is None):
        raise ValueError("ids and key_ids: expected both or neither")
    if ids is not None and key_ids is not None:
        rows |= {"ids": (ids, queries.shape[0]), "key_ids": (key_ids, keys.shape[0])}
    for name, (tensor, length) in rows.items():
        if tensor.shape != (length,) or tensor.dtype != torch.int64:
            soft = name in {"labels", "key_labels"} and tensor.is_floating_point()
            reason = "; probabilities do not tell which keys are of a query's class" if soft else ""
            raise ValueError(
                f"{name}: expected shape ({length},) of int64, got {tuple(tensor.shape)} of {tensor.dtype}{reason}"
            )
    for name, tensor in {"keys": keys, "labels": labels, "key_labels": key_labels}.items():
        if tensor.device != queries.device:
            raise ValueError(f"{name}: expected device {queries.device}, as queries have, got {tensor.device}")


def check_norms(queries: Tensor, keys: Tensor, key_labels: Tensor) -> None:
    """Raise ValueError where a query, or a key with a label of at least 0, does not have norm 1."""
    filled_keys = keys[key_labels >= 0] if bool((key_labels < 0).any()) else keys
    for name, tensor in (("queries", queries), ("keys", filled_keys)):
        tolerance = 1e-3 if tensor.dtype in {torch.float32, torch.float64} else 2e-2
        norms = tensor.detach().to(torch.float32).norm(dim=1)
        if norms.numel() and not bool(((norms - 1).abs() < tolerance).all()):
            raise ValueError(
                f"{name}: expected rows of norm 1, got norms from {float(norms.min()):.3g} to "
                f"{float(norms.max()):.3g}; use torch.nn.functional.normalize"
            )

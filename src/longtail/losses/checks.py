"""Validation of the arguments of losses. Legend: B samples or queries, K keys, C classes, D embedding width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

MIN_TEMPERATURE = 0.02
"""exp(±1/τ) is exp(±50) here; far below it the sums of the mixture loss would leave float32's range."""

Counts = Tensor | Sequence[float] | Any
"""(C,) counts as a sequence, a tensor, or an array or series with a ``tolist`` method."""


def as_counts(class_counts: Counts) -> Tensor:
    """Return (C,) class counts as a float64 tensor, on the device of a tensor.

    Args:
        class_counts: (C,) training images of each class; 0 for a class without any.

    Raises:
        ValueError: counts that are negative, not finite, not one-dimensional, or all zero.
    """
    if not isinstance(class_counts, Tensor):
        class_counts = torch.tensor(
            class_counts.tolist() if hasattr(class_counts, "tolist") else list(class_counts), dtype=torch.float64
        )
    counts = class_counts.double()
    if counts.ndim != 1 or counts.numel() == 0:
        raise ValueError(f"class_counts: expected shape (C,), one count for each class, got {tuple(counts.shape)}")
    wrong = ~((counts >= 0) & (counts < math.inf))
    if bool(wrong.any()):
        index = int(wrong.nonzero()[0])
        raise ValueError(f"class_counts: expected counts of at least 0, got {float(counts[index]):g} for class {index}")
    if not bool((counts > 0).any()):
        raise ValueError("class_counts: expected counts of at least 0, one of them positive; all are 0")
    return counts


def valid_labels(labels: Tensor, num_classes: int, name: str = "labels", *, validate: bool = False) -> Tensor:
    """Return the labels, −1 in place of those that are neither in [0, C) nor −1.

    On a CPU such labels raise. An accelerator's values would have to be waited for, so there and in a traced graph
    their samples are ignored instead.

    Args:
        labels: int64, any shape.
        num_classes: C.
        name: of the argument, for the message.
        validate: raise on an accelerator too.

    Raises:
        ValueError: labels that are not int64 or, where they are checked, not in [0, C) and not −1.
    """
    if labels.dtype != torch.int64:
        raise ValueError(f"{name}: expected int64, got {labels.dtype}; use labels.long()")
    if values_are_known(labels) and (labels.device.type == "cpu" or validate):
        check_range(labels, num_classes, name)
        return labels
    return torch.where((labels >= 0) & (labels < num_classes), labels, -1)


def values_are_known(tensor: Tensor) -> bool:
    """Return whether the tensor has values that can be checked, which one of a traced graph does not have."""
    return not torch.compiler.is_compiling() and type(tensor) is Tensor and not tensor.is_meta


def check_range(labels: Tensor, num_classes: int, name: str) -> None:
    """Raise ValueError where a label is neither in [0, C) nor −1."""
    if labels.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(labels))
    if low < -1 or high >= num_classes:
        raise ValueError(f"{name}: expected values in [0, {num_classes}), or −1 to ignore it, got {low} to {high}")


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
    if queries.ndim != 2:
        raise ValueError(f"queries: expected shape (B, D), got {tuple(queries.shape)}")
    for name, tensor in {"queries": queries, "keys": keys, "log_prior": log_prior}.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: expected floats, got {tensor.dtype}")
    if keys.ndim != 2 or keys.shape[1] != queries.shape[1]:
        raise ValueError(f"keys: expected shape (K, {queries.shape[1]}), got {tuple(keys.shape)}")
    if log_prior.ndim != 1:
        raise ValueError(f"log_prior: expected shape (C,), got {tuple(log_prior.shape)}")
    rows = {"labels": (labels, len(queries)), "key_labels": (key_labels, len(keys))}
    if (ids is None) != (key_ids is None):
        raise ValueError("ids and key_ids: expected both or neither")
    if ids is not None and key_ids is not None:
        rows |= {"ids": (ids, len(queries)), "key_ids": (key_ids, len(keys))}
    for name, (tensor, length) in rows.items():
        if tensor.shape != (length,) or tensor.dtype != torch.int64:
            raise ValueError(
                f"{name}: expected shape ({length},) of int64, got {tuple(tensor.shape)} of {tensor.dtype}"
            )
    for name, tensor in {"keys": keys, "labels": labels, "key_labels": key_labels, "log_prior": log_prior}.items():
        if tensor.device != queries.device:
            raise ValueError(f"{name}: expected device {queries.device}, as queries have, got {tensor.device}")
    for name, tensor in (("labels", labels), ("key_labels", key_labels)):
        check_range(tensor, len(log_prior), name)
    if bool(log_prior.isnan().any()) or bool((log_prior == math.inf).any()):
        raise ValueError("log_prior: expected logarithms of frequencies, got NaN or inf")
    if temperature is not None:
        value = temperature.item() if isinstance(temperature, Tensor) else temperature
        if not value >= MIN_TEMPERATURE:
            raise ValueError(f"temperature: expected at least {MIN_TEMPERATURE}, got {value:.3g}")
    filled_keys = keys[key_labels >= 0] if bool((key_labels < 0).any()) else keys
    for name, tensor in (("queries", queries), ("keys", filled_keys)):
        tolerance = 1e-3 if tensor.dtype in {torch.float32, torch.float64} else 2e-2
        norms = tensor.detach().to(torch.float32).norm(dim=1)
        if norms.numel() and not bool(((norms - 1).abs() < tolerance).all()):
            raise ValueError(
                f"{name}: expected rows of norm 1, got norms from {float(norms.min()):.3g} to "
                f"{float(norms.max()):.3g}; use torch.nn.functional.normalize"
            )

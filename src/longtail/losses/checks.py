"""Validation of the arguments of the mixture loss. Legend: B queries, K keys, C classes, D embedding width."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MIN_TEMPERATURE = 0.02
"""exp(±1/τ) is exp(±50) here; far below it the sums of the mixture loss would leave float32's range."""


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
        if tensor.numel() and (int(tensor.min()) < -1 or int(tensor.max()) >= len(log_prior)):
            raise ValueError(
                f"{name}: expected values in [0, {len(log_prior)}), or −1 to ignore it, "
                f"got {int(tensor.min())} to {int(tensor.max())}"
            )
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

"""The von Mises–Fisher likelihood of a class in closed form (ProCo).

Legend: B queries, C classes, D embedding width, ν = D/2 − 1.

    vMF(z | μ, κ) = C_D(κ) exp(κ μ·z),      C_D(κ) ∝ κ^ν / I_ν(κ)

With infinitely many keys of a class, the mean of exp(z·k/τ) over them is an expectation with a closed form:

    log p(z|c) = log E_{k ~ vMF(μ_c, κ_c)} exp(z·k/τ) = log C_D(κ_c) − log C_D(‖κ_c μ_c + z/τ‖)

Source: Du et al., *Probabilistic Contrastive Learning for Long-Tailed Visual Recognition*, TPAMI 2024,
arXiv 2403.06726.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_CONCENTRATION = 1e5
"""Upper bound of κ, which would be infinite for a class whose embeddings are all equal."""

MIN_DIM = 8
"""Smallest embedding width: below, the error of the Bessel function's expansion exceeds 1e-4."""


def log_bessel_ratio(x: Tensor, order: float) -> Tensor:
    """Return log( I_ν(x) / x^ν ), differentiable, for x ≥ 0 and ν ≥ 3; −log C_D(x) up to a constant.

    Uses the uniform expansion of I_ν(νz) for large ν (DLMF 10.41.3), divided by x^ν so that it holds at 0 too. Its
    error is below 1e-4 at ν = 3 and below 1e-7 from ν = 15 on.

    Args:
        x: any shape, float32 or float64.
        order: ν.
    """
    root = torch.sqrt(1 + (x / order) ** 2)
    t = 1 / root
    s = t * t
    # the Debye polynomials U_1 to U_4 (DLMF 10.41.10)
    terms = (
        t * (3 - 5 * s) / 24,
        s * (81 + s * (-462 + 385 * s)) / 1152,
        t * s * (30375 + s * (-369603 + s * (765765 - 425425 * s))) / 414720,
        s * s * (4465125 + s * (-94121676 + s * (349922430 + s * (-446185740 + 185910725 * s)))) / 39813120,
    )
    series = torch.stack([term / order ** (k + 1) for k, term in enumerate(terms)]).sum(dim=0)
    exponent = order * (root - torch.log1p(root) - math.log(order))
    return exponent - 0.5 * math.log(2 * math.pi * order) - 0.5 * root.log() + torch.log1p(series)


def concentration(mean: Tensor) -> Tensor:
    """Return the concentrations κ ≈ r(D − r²)/(1 − r²), r = ‖mean‖, of classes by their mean embeddings, (C,).

    Source: Banerjee et al., *Clustering on the Unit Hypersphere using von Mises–Fisher Distributions*, JMLR 2005.

    Args:
        mean: (C, D) means of unit vectors.
    """
    length = mean.norm(dim=1).clamp(max=1.0)
    kappa: Tensor = length * (mean.shape[1] - length**2) / (1 - length**2).clamp(min=1e-12)
    return kappa.clamp(max=MAX_CONCENTRATION)


def vmf_scores(queries: Tensor, mean: Tensor, temperature: float = 0.1) -> Tensor:
    """Return (B, C) log p(z|c) by the closed form above, up to a constant for each query; float32 or float64.

    A class without samples has mean 0, and so the uniform distribution on the sphere.

    Args:
        queries: (B, D), unit norm.
        mean: (C, D) means of each class's unit-norm embeddings, held constant.
        temperature: τ > 0.

    Raises:
        ValueError: D is below :data:`MIN_DIM`.
    """
    if queries.shape[1] < MIN_DIM:
        raise ValueError(f"queries: expected at least {MIN_DIM} columns, got {queries.shape[1]}")
    order = queries.shape[1] / 2 - 1
    # at large κ both terms are near 1e5 and their difference near 1, which float32 cannot represent
    dtype = torch.float32 if queries.device.type == "mps" else torch.float64
    mean = mean.detach().to(dtype)
    kappa = concentration(mean)
    direction = torch.nn.functional.normalize(mean) * kappa[:, None]
    scaled = queries.to(dtype) / temperature
    # ‖κμ + z/τ‖² without the B × C × D differences
    square = kappa**2 + 2 * (scaled @ direction.t()) + (scaled**2).sum(dim=1, keepdim=True)
    length = square.clamp(min=1e-12).sqrt()
    return (log_bessel_ratio(length, order) - log_bessel_ratio(kappa, order)).to(
        torch.promote_types(queries.dtype, torch.float32)
    )

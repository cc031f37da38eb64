"""Mixed images: every image of a batch is mixed with another one of it, and its label with that one's.

Mixup (Zhang et al., ICLR 2018, arXiv 1710.09412), CutMix (Yun et al., ICCV 2019, arXiv 1905.04899) and Remix (Chou et
al., ECCV workshops 2020, arXiv 2007.03943). Images are mixed where batches are made, before the student and the teacher
see them.

What an image is mixed with and how is a function of (seed, epoch, image, how often the epoch has shown it before) and
of the images of its step, in all processes together. So a resumed run, another number of processes and an accelerator
mix as a single process on a CPU does. All views of an image are mixed alike: what compares them
compares views of one mixed image.

Legend: B images of a batch, R batches, H and W sides in pixels, C classes, λ share of an image in its mixture.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.special import betaincinv
from torch import Tensor

from longtail.config import Mixing
from longtail.data.batch import Batch
from longtail.randomness import Stream, mix, uniform

_ORDER, _SHARE = mix(Stream.MIXING_PARTNERS), mix(Stream.MIXING_SHARES)
_CELLS = 2**12  # of the table of quantiles


class Mixture(NamedTuple):
    """How the images of a batch are mixed with their partners."""

    image_weights: Tensor
    """(B,) λ, the share of an image's own pixels."""
    label_weights: Tensor
    """(B,) the weight of its own label; the partner's label has the rest."""
    inside: Tensor | None
    """(B, 1, H, W) bool, which pixels are the partner's; None where each is a weighted mean."""

    def views(self, own: Tensor, partners: Tensor) -> Tensor:
        """Return mixed views of (B, channels, H, W) views and those of the partners."""
        if self.inside is not None:
            return torch.where(self.inside, partners, own)
        weights = self.image_weights.to(own.dtype).view(-1, 1, 1, 1)
        return weights * own + (1 - weights) * partners

    def scores(self, own: Tensor, partners: Tensor, temperature: float) -> Tensor:
        """Return scores whose probabilities at a temperature are the mean of both images', weighted by λ.

        For a teacher whose scores of mixed images are not known: mixup asks a classifier to be linear between images,
        and these are the scores of one that is.

        Args:
            own: (B, C) scores of the images, or (B, D, C) of several views of each.
            partners: those of their partners.
            temperature: at which they are distilled.
        """
        weights = self.image_weights.to(own.dtype).view(-1, *(1,) * (own.ndim - 1))
        return temperature * torch.logaddexp(
            weights.log() + F.log_softmax(own / temperature, dim=-1),
            torch.log1p(-weights) + F.log_softmax(partners / temperature, dim=-1),
        )


class Mixer:
    """Mixes the images of batches; on the device of what it is given, without waiting for it.

    Args:
        settings: of the mixing; ``kind`` is not none.
        class_counts: (C,) training images per class.
        seed: of the training.
        epochs: of the training.
        views: how many views of a batch, the first, are mixed.
        temperature: of the distillation.
    """

    def __init__(
        self,
        settings: Mixing,
        class_counts: list[int],
        seed: int,
        epochs: int,
        views: int = 1,
        temperature: float = 1.0,
    ) -> None:
        self.settings, self.seed, self.epochs = settings, seed, epochs
        self.num_views, self.temperature = views, temperature
        self._counts = torch.tensor(class_counts)
        self._quantiles = beta_quantiles(settings.alpha)

    def partners(self, ids: Tensor, epoch: int, sizes: Tensor | None = None) -> Tensor:
        """Return the position of every image's partner in its batch, (R, B) int64.

        The images of a batch are put in a random circle, and each is mixed with the next: each is the partner of one
        other image, and none is its own.

        Args:
            ids: (R, B) int64 image ids; those of repeated images differ, see :func:`longtail.randomness.draw_ids`.
            epoch: from 0.
            sizes: (R,) how many of each row are its batch, the first; the others are their own partners. All if None.
        """
        draws = uniform(ids.flatten(), 1, self.seed, _ORDER, epoch).view(ids.shape)
        column = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        last = torch.full_like(ids[:, :1], ids.shape[1]) if sizes is None else sizes[:, None]
        order = torch.where(column < last, draws, 2.0).argsort(dim=1, stable=True)
        following = torch.where(column < last, (column + 1) % last, column)
        return torch.empty_like(order).scatter_(1, order, order.gather(1, following))

    def draw(self, ids: Tensor, labels: Tensor, partner_labels: Tensor, epoch: int, size: tuple[int, int]) -> Mixture:
        """Return how images are mixed in an epoch.

        Args:
            ids: (B,) int64 image ids, as in :meth:`partners`.
            labels: (B,) int64 in [0, C).
            partner_labels: (B,) those of the partners.
            epoch: from 0.
            size: H, W of the views.
        """
        settings = self.settings
        if self._counts.device != ids.device:
            self._counts, self._quantiles = self._counts.to(ids.device), self._quantiles.to(ids.device)
        chosen, share, row, column = uniform(ids, 4, self.seed, _SHARE, epoch).unbind(dim=1)
        probability = settings.probability if epoch / self.epochs < settings.until else 0.0
        weights = torch.where(chosen < probability, lookup_quantile(self._quantiles, share), 1.0)
        if settings.kind == "cutmix":
            inside = boxes(1 - weights, row, column, size)
            weights = 1 - inside.float().mean(dim=(1, 2, 3))  # of the pixels: a box may reach over the border
            return Mixture(weights, weights, inside)
        if settings.kind == "remix":
            label_weights = remix_label_weights(
                weights, self._counts[labels], self._counts[partner_labels], settings.count_ratio, settings.threshold
            )
            return Mixture(weights, label_weights, None)
        return Mixture(weights, weights, None)


def beta_quantiles(alpha: float) -> Tensor:
    """Return quantiles of the distribution Beta(α, α) at equal distances of the probability, float32 from 0 to 1."""
    probability = torch.linspace(0, 1, _CELLS + 1, dtype=torch.float64)
    return torch.from_numpy(betaincinv(alpha, alpha, probability.numpy())).float()


def lookup_quantile(table: Tensor, probability: Tensor) -> Tensor:
    """Return the quantiles of probabilities in [0, 1), linear between those of a table."""
    place = probability * (len(table) - 1)
    cell = place.long()
    low, high = table[cell], table[cell + 1]
    return low + (high - low) * (place - cell)


def boxes(area: Tensor, row: Tensor, column: Tensor, size: tuple[int, int]) -> Tensor:
    """Return rectangles of the shape of the image, (B, 1, H, W) bool, cut off at its border.

    Args:
        area: (B,) of the rectangle, as a part of the image.
        row: (B,) where its centre is, in [0, 1).
        column: (B,) the same.
        size: H, W.
    """
    height, width = size

    def span(place: Tensor, side: int) -> Tensor:
        length = (side * area.sqrt()).long()
        first = (side * place).long() - length // 2
        pixels = torch.arange(side, device=area.device)
        return (pixels >= first[:, None]) & (pixels < (first + length)[:, None])

    return (span(row, height)[:, :, None] & span(column, width)[:, None, :])[:, None]


def remix_label_weights(
    image_weights: Tensor, counts: Tensor, partner_counts: Tensor, count_ratio: float, threshold: float
) -> Tensor:
    """Return the weight of an image's own label, (B,): that of its pixels, unless one of both classes is much rarer.

    It is 0 where the own class has at least κ times the partner's images and λ < τ, and 1 where the partner's class has
    at least κ times the own one's and 1 − λ < τ.

    Args:
        image_weights: (B,) λ.
        counts: (B,) training images of the own class.
        partner_counts: (B,) training images of the partner's class.
        count_ratio: κ ≥ 1.
        threshold: τ in [0, 1].
    """
    partner_takes = (counts >= count_ratio * partner_counts) & (image_weights < threshold)
    own_takes = (partner_counts >= count_ratio * counts) & (1 - image_weights < threshold)
    return image_weights.masked_fill(partner_takes, 0.0).masked_fill(own_takes & ~partner_takes, 1.0)


def mix_batch(batch: Batch, mixer: Mixer, partners: Tensor, ids: Tensor, epoch: int) -> Batch:
    """Return a batch of the first B images, each mixed with its partner.

    Args:
        batch: of these images and, after them, of partners that are not among them; its teacher's scores, if there are
            any, are of views that are not mixed.
        mixer: mixes them.
        partners: (B,) where in the batch the partner of each is.
        ids: of all these images in draws, see :func:`longtail.randomness.draw_ids`.
        epoch: from 0.
    """
    own = batch.map_tensors(lambda tensor: tensor[: len(partners)], batch.max_local_batch)
    height, width = own.views[0].shape[-2:]
    other_labels = batch.labels[partners]
    mixture = mixer.draw(ids[: len(partners)], own.labels, other_labels, epoch, (height, width))
    views = [
        mixture.views(view, batch.views[number][partners]) if number < mixer.num_views else view
        for number, view in enumerate(own.views)
    ]
    scores = own.teacher_scores
    if scores is not None and batch.teacher_scores is not None:
        scores = mixture.scores(scores, batch.teacher_scores[partners], mixer.temperature)
    return dataclasses.replace(
        own,
        views=tuple(views),
        teacher_scores=scores,
        mixed_labels=other_labels,
        label_weights=mixture.label_weights,
    )

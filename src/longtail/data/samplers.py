"""Which images an epoch shows and in which order: a function of (seed, epoch), so that a resumed run repeats it.

A scheme says what share of an epoch each class gets; :func:`epoch_order` draws the images, and
:class:`ClassAwareSampler` gives them to a ``DataLoader``. A scheme is a function of the class counts, the epoch (from
0), the epochs of the training, and the fraction of them after which a deferred scheme changes. It returns (C,) float64
that sum to 1, or None where every image is shown once, without replacement. A scheme for images of several classes is
an :class:`ImageWeights` instead: it says how often an image is shown in proportion to the others.

Legend: N images, C classes, n_c images of class c, R replicas (processes that train together), P image–class pairs.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data.distributed import DistributedSampler

from longtail.data.imbalance import check_labels
from longtail.errors import LongtailError
from longtail.randomness import Stream, generator, mix
from longtail.registry import SAMPLERS

_ORDER = mix(Stream.EPOCH_ORDER)
_CHUNK = 2**16  # indices that are drawn, or are Python integers, at once: ten million would take 400 MB
_LARGEST_LABEL = 2**24  # counts are kept of every class up to the largest

ClassShares = Callable[[Tensor, int, int, float], Tensor | None]
"""(class counts (C,), epoch, epochs, deferred_from) to the share of each class; see the module."""
REPEAT_THRESHOLD = 0.001
"""LVIS's own threshold of :func:`repeat_factors`."""


@dataclass(frozen=True)
class ImageClasses:
    """The classes of images, of which each may have several or none."""

    images: Tensor
    """(P,) int64 positions of images."""
    classes: Tensor
    """(P,) int64 of at least 0, in the image at the same place of :attr:`images`; pairs may be there twice."""
    num_images: int
    """N."""


@dataclass(frozen=True)
class ImageWeights:
    """A scheme by image: of (the images' classes, the threshold) the (N,) float64 weights, above 0.

    An epoch shows N images, and image i on average N w_i / Σ w times: the next lower or higher whole number of times,
    drawn by systematic sampling (Madow, Annals of Mathematical Statistics 1949), which makes exactly this the mean and
    exactly N the sum.
    """

    weights: Callable[[ImageClasses, float], Tensor]


def instance_shares(_class_counts: Tensor, _epoch: int, _epochs: int, _deferred_from: float) -> None:
    """Show every image once, so that class c gets n_c / N."""


def class_shares(class_counts: Tensor, _epoch: int, _epochs: int, _deferred_from: float) -> Tensor:
    """Show the classes that have images equally often: 1 / C."""
    present = (class_counts > 0).double()
    return present / present.sum()


def sqrt_shares(class_counts: Tensor, _epoch: int, _epochs: int, _deferred_from: float) -> Tensor:
    """Show class c in proportion to √n_c (Mahajan et al., ECCV 2018)."""
    roots = class_counts.double().sqrt()
    return roots / roots.sum()


def progressive_shares(class_counts: Tensor, epoch: int, epochs: int, deferred_from: float) -> Tensor:
    """Go linearly from :func:`instance_shares` to :func:`class_shares` along the training (Kang et al., ICLR 2020)."""
    natural = class_counts.double() / class_counts.sum()
    progress = min(epoch, epochs - 1) / max(epochs - 1, 1)
    return (1 - progress) * natural + progress * class_shares(class_counts, epoch, epochs, deferred_from)


def deferred_shares(class_counts: Tensor, epoch: int, epochs: int, deferred_from: float) -> Tensor | None:
    """Use :func:`instance_shares`, and :func:`class_shares` late in the training (Cao et al., NeurIPS 2019)."""
    if epoch / epochs < last_phase_start(deferred_from, epochs):
        return None
    return class_shares(class_counts, epoch, epochs, deferred_from)


def last_phase_start(fraction: float, epochs: int) -> float:
    """Return the fraction of a training from which its last phase is: ``fraction``, if that leaves it an epoch.

    A fraction below 1 asks for such a phase, which a short training would otherwise not reach: 0.8 of 3 epochs.
    """
    return min(fraction, (epochs - 1) / epochs) if fraction < 1 else 1.0


def ends_balanced(sampler: str, deferred_from: float, epochs: int) -> bool:
    """Return whether the last epoch of a training shows all classes equally often, whatever their counts are."""
    scheme, counts = SAMPLERS[sampler], torch.tensor([2, 1])
    if isinstance(scheme, ImageWeights):
        return False
    shares = scheme(counts, epochs - 1, epochs, deferred_from)
    return shares is not None and torch.allclose(shares, shares.mean())


def repeat_factors(image_classes: ImageClasses, threshold: float = REPEAT_THRESHOLD) -> Tensor:
    """Return how often each image is repeated by repeat factor sampling (Gupta et al., CVPR 2019), (N,) float64.

    A class's factor is r_c = max(1, √(t / f_c)), with f_c the fraction of images that it is in; an image's the largest
    of its classes, or 1 if it has none.

    Args:
        image_classes: the classes of the images.
        threshold: t; classes in a smaller fraction of images are repeated.

    Example:
        >>> images = ImageClasses(torch.tensor([0, 1, 2, 3, 3]), torch.tensor([0, 0, 0, 0, 1]), num_images=4)
        >>> repeat_factors(images, threshold=1.0)  # class 1 is in a quarter of the images
        tensor([1., 1., 1., 2.], dtype=torch.float64)
    """
    factors = torch.ones(image_classes.num_images, dtype=torch.float64)
    if not len(image_classes.classes):
        return factors
    of_class = class_repeat_factors(image_classes, threshold)
    return factors.scatter_reduce_(0, image_classes.images, of_class[image_classes.classes], "amax")


def class_repeat_factors(image_classes: ImageClasses, threshold: float = REPEAT_THRESHOLD) -> Tensor:
    """Return r_c of :func:`repeat_factors`, (C,) float64, up to the largest class that is there; 1 of one without."""
    classes = int(image_classes.classes.max()) + 1 if len(image_classes.classes) else 0
    pairs = (image_classes.images * classes + image_classes.classes).unique()
    fractions = torch.bincount(pairs % max(classes, 1), minlength=classes).double() / max(image_classes.num_images, 1)
    factors = (threshold / fractions).sqrt().clamp(min=1)
    return torch.where(fractions > 0, factors, 1.0)


REPEAT_FACTOR = ImageWeights(repeat_factors)


def epoch_order(
    labels: Tensor | ImageClasses,
    sampler: str,
    seed: int,
    epoch: int,
    epochs: int = 1,
    deferred_from: float = 0.8,
    repeat_threshold: float = REPEAT_THRESHOLD,
) -> Tensor:
    """Return the positions of the images that an epoch shows, (N,) int64, in their order.

    Args:
        labels: (N,) int64 of at least 0; or the classes of images that have several, of which a scheme by class takes
            the rarest (and of images without a class the most frequent).
        sampler: a name in :data:`longtail.registry.SAMPLERS`.
        seed: of the training.
        epoch: from 0.
        epochs: of the training.
        deferred_from: fraction of the training after which the deferred sampler shows classes equally often.
        repeat_threshold: t of :func:`repeat_factors`.

    Raises:
        LongtailError: there is no such sampler, or a label is negative.
    """
    scheme = SAMPLERS[sampler]
    if isinstance(scheme, ImageWeights):
        return _draw_images(scheme.weights(_as_image_classes(labels), repeat_threshold), seed, epoch)
    labels = rarest_classes(labels) if isinstance(labels, ImageClasses) else labels
    check_labels(labels)
    by_class = functools.partial(torch.argsort, labels, stable=True)
    return _draw(torch.bincount(labels), by_class, scheme, seed, epoch, epochs, deferred_from)


def occurrence_numbers(order: Tensor) -> Tensor | None:
    """Return how often an epoch has shown the image at each place before, (N,) int64; None if no image is repeated.

    >>> occurrence_numbers(torch.tensor([3, 0, 3, 1, 3, 0])).tolist()
    [0, 0, 1, 0, 2, 1]

    Args:
        order: (N,) int64 positions of images, see :func:`epoch_order`.
    """
    counts = torch.bincount(order)
    if len(order) == 0 or int(counts.max()) == 1:
        return None
    images, places = order.sort(stable=True)
    return torch.empty_like(order).scatter_(0, places, torch.arange(len(order)) - (counts.cumsum(0) - counts)[images])


def rarest_classes(image_classes: ImageClasses) -> Tensor:
    """Return the class of each image that the fewest images have, (N,) int64; the most frequent of all if it has none.

    Of several that are equally rare it is the first.
    """
    images, classes = image_classes.images, image_classes.classes
    width = int(classes.max()) + 1 if len(classes) else 1
    pairs = (images * width + classes).unique()
    counts = torch.bincount(pairs % width, minlength=width)
    # one number by which they are ordered: the count, then the class
    ranks = torch.full((image_classes.num_images,), torch.iinfo(torch.int64).max)
    ranks.scatter_reduce_(0, pairs // width, (counts * width)[pairs % width] + pairs % width, "amin")
    has_one = ranks < torch.iinfo(torch.int64).max
    return torch.where(has_one, ranks % width, counts.argmax())


def _as_image_classes(labels: Tensor | ImageClasses) -> ImageClasses:
    if isinstance(labels, ImageClasses):
        return labels
    check_labels(labels)
    return ImageClasses(torch.arange(len(labels)), labels, len(labels))


def _draw_images(weights: Tensor, seed: int, epoch: int) -> Tensor:
    """Return the images of an epoch, (N,) int64 in random order, by (N,) float64 weights; see :class:`ImageWeights`."""
    draws, size = generator(seed, _ORDER, epoch), len(weights)
    if size == 0:
        return torch.zeros(0, dtype=torch.int64)
    # in random order, so that it depends on chance alone which images are shown more often together
    images = torch.randperm(size, generator=draws)
    ends = weights[images].cumsum(0)
    # the last of them is N, and numbers between its neighbours are drawn apart by 1: rounding could lose one
    ends = ends * (size / ends[-1])
    ends[-1] = size
    marks = torch.arange(size, dtype=torch.float64) + torch.rand((), generator=draws, dtype=torch.float64)
    shown = images[torch.searchsorted(ends, marks, right=True).clamp(max=size - 1)]
    return shown[torch.randperm(size, generator=draws)]


def _draw(
    counts: Tensor,
    by_class: Callable[[], Tensor],
    scheme: ClassShares,
    seed: int,
    epoch: int,
    epochs: int,
    deferred_from: float,
) -> Tensor:
    """Return :func:`epoch_order` of labels with (C,) ``counts``; ``by_class`` returns the images class by class."""
    draws, size = generator(seed, _ORDER, epoch), int(counts.sum())
    shares = scheme(counts, epoch, epochs, deferred_from)
    if shares is None or size == 0:
        return torch.randperm(size, generator=draws)
    # the class first, then one of its images: weights of single images would lose digits where there are millions
    classes = torch.multinomial(shares, size, replacement=True, generator=draws)
    starts, sizes, images = counts.cumsum(0) - counts, counts.double(), by_class()
    order = torch.empty_like(images)
    # in parts that the processor's cache holds, which takes a third of the time
    for part, of_part in zip(order.split(_CHUNK), classes.split(_CHUNK), strict=True):
        within = torch.rand(len(part), generator=draws, dtype=torch.float64).mul_(sizes[of_part]).long()
        torch.index_select(images, 0, within.add_(starts[of_part]), out=part)
    return order


class _Progress:
    """How far an iterator over an epoch has come.

    Args:
        start: images of all replicas together that had been drawn before it began.
    """

    def __init__(self, start: int) -> None:
        self.start = start
        self.fetched = 0
        """Indices of this replica up to the end of the present chunk."""
        self.chunk: Iterator[int] = iter(())

    @property
    def yielded(self) -> int:
        """Indices of this replica that the iterator has given."""
        # what a list's iterator still has, it knows; a count in Python would halve the rate
        return self.fetched - operator.length_hint(self.chunk)


class ClassAwareSampler(DistributedSampler[int]):
    """Which images an epoch shows, for the ``DataLoader`` of any trainer, in one process or in several.

    - The R replicas together show the epoch that one process would show, whatever R is: replica r gets the indices
      r, r + R, … of :func:`epoch_order`, so step s of all replicas together has the same images too.
    - All have ⌊N / R⌋ indices, and each class's share is the same in all of them.
    - Nothing is repeated to make the lengths equal, as ``torch.utils.data.DistributedSampler`` does: the last N mod R
      indices of the epoch, other images in every epoch, are left out. Where a scheme draws without replacement, no
      image is shown twice.

    It is a ``DistributedSampler``, so that Lightning and Fabric use it as it is and set its epoch. Where something else
    divides the batches among the processes (Accelerate, and so the ``Trainer`` of Hugging Face), give
    ``num_replicas=1, rank=0``.

    Resume in the middle of an epoch: :meth:`state_dict` and :meth:`load_state_dict`, which torchdata's
    ``StatefulDataLoader`` calls. Worker processes of a plain ``DataLoader`` fetch ahead, so there the state counts
    images that the training has not had; replace its ``drawn`` by the batches that were trained on × their size in all
    processes together.

    Args:
        labels: (N,) class of each image, whole numbers from 0: a tensor, array or sequence.
        scheme: a name in :data:`longtail.registry.SAMPLERS`: class (all classes equally often), sqrt (in proportion to
            √n_c), instance (every image once), progressive (from instance to class along the training), deferred
            (class late in the training, instance before), repeat_factor (rare classes repeated, as for LVIS).
        num_replicas: R; the size of the process group, asked for whenever an epoch begins, if not given.
        rank: of this process, in [0, R); given exactly if ``num_replicas`` is.
        seed: of the draw; the same in all processes.
        epochs: of the training; needed by the schemes that change along it. Epochs beyond it are like the last one.
        deferred_from: fraction of the training, in [0, 1], after which deferred shows classes equally often.
        repeat_threshold: t of :func:`repeat_factors`, which repeat_factor uses.

    Raises:
        LongtailError: labels that are no classes, or fewer than R of them; an unknown scheme; a rank out of range; or
            ``epochs`` is missing.

    Example:
        >>> labels = [0] * 90 + [1] * 10
        >>> sampler = ClassAwareSampler(labels, "class")
        >>> sampler.set_epoch(3)
        >>> shown = [labels[index] for index in sampler]
        >>> len(shown), 35 < sum(shown) < 65
        (100, True)
        >>> parts = [set(ClassAwareSampler(labels, "instance", num_replicas=3, rank=rank)) for rank in range(3)]
        >>> sum(len(part) for part in parts), len(set.union(*parts))
        (99, 99)
    """

    def __init__(
        self,
        labels: Tensor | Sequence[int] | np.ndarray[Any, Any],
        scheme: str = "class",
        *,
        num_replicas: int | None = None,
        rank: int | None = None,
        seed: int = 0,
        epochs: int | None = None,
        deferred_from: float = 0.8,
        repeat_threshold: float = REPEAT_THRESHOLD,
    ) -> None:
        SAMPLERS.check(scheme, "scheme")
        if (num_replicas is None) != (rank is None):
            raise LongtailError("num_replicas and rank: expected both or neither")
        if epochs is None and scheme in {"progressive", "deferred"}:
            raise LongtailError(f"epochs: is missing; the scheme {scheme} changes along the training")
        if epochs is not None and epochs < 1:
            raise LongtailError(f"epochs: expected at least 1, got {epochs}")
        if not 0 <= deferred_from <= 1:
            raise LongtailError(f"deferred_from: expected a fraction in [0, 1], got {deferred_from:g}")
        if not repeat_threshold > 0:
            raise LongtailError(f"repeat_threshold: expected a fraction above 0, got {repeat_threshold:g}")
        classes = _as_labels(labels)
        self.scheme, self.epochs, self.deferred_from = scheme, epochs, deferred_from
        self.repeat_threshold = repeat_threshold
        self._size, self._counts, self._by_class = len(classes), torch.bincount(classes), _sort_by_class(classes)
        draws = SAMPLERS[scheme]
        self._weights = (
            draws.weights(_as_image_classes(classes), repeat_threshold) if isinstance(draws, ImageWeights) else None
        )
        self._asks = num_replicas is None
        here = _place() if num_replicas is None or rank is None else (num_replicas, rank)
        _check_place(*here, self._size)
        super().__init__(range(self._size), *here, seed=seed, drop_last=True)  # type: ignore[arg-type]
        self._progress, self._begun, self._chosen = _Progress(0), False, False

    def _find_place(self) -> None:
        """Ask the process group again, which may be younger than this sampler."""
        if self._asks:
            self.num_replicas, self.rank = _place()
            _check_place(self.num_replicas, self.rank, self._size)
        self.num_samples = self._size // self.num_replicas
        self.total_size = self.num_samples * self.num_replicas

    def __len__(self) -> int:
        """Return ⌊N / R⌋, the indices of this replica in a whole epoch."""
        self._find_place()
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        """Return the indices of this replica: of a whole epoch, or of its rest after :meth:`load_state_dict`.

        Without :meth:`set_epoch` each iterator after the first is of the next epoch.
        """
        self._find_place()
        if self._begun:
            # loaders make iterators that they do not use, also one of the empty rest of a whole epoch
            whole = self._size - self._progress.start < self.num_replicas
            self.epoch += not self._chosen and (whole or self._progress.yielded > 0)
            self._progress = _Progress(0)
        self._begun, self._chosen = True, False
        return self._indices(self._progress, self.epoch, self.num_replicas, self.rank)

    def _indices(self, progress: _Progress, epoch: int, num_replicas: int, rank: int) -> Iterator[int]:
        order = self._order(epoch)[progress.start :]
        for chunk in order[: len(order) // num_replicas * num_replicas][rank::num_replicas].split(_CHUNK):
            progress.chunk = iter(chunk.tolist())
            progress.fetched += len(chunk)
            yield from progress.chunk

    def _order(self, epoch: int) -> Tensor:
        """Return :func:`epoch_order` of an epoch."""
        if self._weights is not None:
            return _draw_images(self._weights, self.seed, epoch)
        scheme = SAMPLERS[self.scheme]
        assert not isinstance(scheme, ImageWeights)
        epochs = epoch + 1 if self.epochs is None else self.epochs
        return _draw(self._counts, lambda: self._by_class, scheme, self.seed, epoch, epochs, self.deferred_from)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0, before its iterator is made; what was loaded for another epoch is forgotten.

        Raises:
            LongtailError: it is negative.
        """
        epoch = operator.index(epoch)  # of NumPy's numbers too, which a state would not take
        if epoch < 0:
            raise LongtailError(f"epoch: expected at least 0, got {epoch}")
        if epoch != self.epoch:
            self._progress, self._begun = _Progress(0), False
        self.epoch, self._chosen = epoch, True

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, how many of its images all replicas have drawn, and what the draw depends on."""
        drawn = self._progress.start + self._progress.yielded * self.num_replicas
        return {"epoch": self.epoch, "drawn": drawn, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue an epoch: the next iterator begins after the images that were drawn; it is empty if all were.

        The number of replicas may be another one than before.

        Args:
            state: see :meth:`state_dict`; of any of the replicas.

        Raises:
            LongtailError: it is none, or that of a sampler with other labels, another scheme or another seed.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise LongtailError(
                    f"state: its {name} is {state.get(name)!r}, this sampler's {value!r}; make the sampler as before"
                )
        epoch, drawn = state.get("epoch"), state.get("drawn")
        if not isinstance(epoch, int) or epoch < 0 or not isinstance(drawn, int) or not 0 <= drawn <= self._size:
            raise LongtailError(
                f"state: expected an epoch of at least 0 and 0 to {self._size} images drawn, got {epoch!r} and "
                f"{drawn!r}"
            )
        self.epoch, self._progress, self._begun = epoch, _Progress(drawn), False

    def _identity(self) -> dict[str, Any]:
        return {
            "scheme": self.scheme,
            "seed": self.seed,
            "images": self._size,
            "epochs": self.epochs,
            "deferred_from": self.deferred_from,
            **({} if self._weights is None else {"repeat_threshold": self.repeat_threshold}),
        }


def _place() -> tuple[int, int]:
    """Return the number of replicas and the rank of this process."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size(), dist.get_rank()
    return 1, 0


def _check_place(num_replicas: int, rank: int, images: int) -> None:
    if num_replicas < 1 or not 0 <= rank < num_replicas:
        raise LongtailError(
            f"rank: expected a number of replicas of at least 1 and a rank below it, got {num_replicas} and {rank}"
        )
    if images < num_replicas:
        raise LongtailError(f"labels: expected at least one image for each of {num_replicas} replicas, got {images}")


def _as_labels(labels: Tensor | Sequence[int] | np.ndarray[Any, Any]) -> Tensor:
    """Return labels as (N,) int64 on the CPU, checked."""
    try:
        if getattr(labels, "dtype", None) == np.dtype(object):
            labels = list(labels)  # numbers that are stored as objects have a type of their own in a list
        tensor = labels.cpu() if isinstance(labels, Tensor) else torch.tensor(np.asarray(labels))  # pandas' is frozen
    except (TypeError, ValueError, RuntimeError):
        raise LongtailError(
            "labels: expected a class number for every image; numpy.unique(names, return_inverse=True)[1] numbers names"
        ) from None
    if tensor.dtype not in {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool}:
        tensor = tensor.long()
    check_labels(tensor)
    if len(tensor) and int(tensor.max()) >= max(_LARGEST_LABEL, len(tensor)):
        raise LongtailError(
            f"labels: expected classes 0 to C − 1, the largest is {int(tensor.max())}; "
            "numpy.unique(labels, return_inverse=True)[1] numbers them"
        )
    return tensor


def _sort_by_class(labels: Tensor) -> Tensor:
    """Return (N,) int64, the positions of the images class by class, ascending within a class."""
    if len(labels) and int(labels.max()) < 2**16:  # NumPy sorts 16 bits by radix, which is many times as fast
        return torch.from_numpy(np.argsort(labels.numpy().astype(np.uint16), kind="stable"))
    return torch.argsort(labels, stable=True)

"""Classes of annotations and of a detector: how many training images each has, and which output stands for which.

Legend: C classes of the detector, K categories of the annotations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from longtail.data.paths import nfc
from longtail.detector_calibration.heads import ClassHead
from longtail.errors import LongtailError, did_you_mean

ClassOrder = Literal["auto", "name", "id", "index"]
"""How categories and outputs are matched, see :func:`match_classes`."""
CountOf = Literal["images", "objects"]
"""What the count of a class is of."""


@dataclass(frozen=True)
class ClassMap:
    """Which category of some annotations each class of a detector stands for."""

    categories: Tensor
    """(C,) int64 position of the category in the annotations, −1 where there is none."""
    order: ClassOrder
    """How they were matched."""

    def counts(self, of_categories: Tensor) -> Tensor:
        """Return (C,) float64 counts of the detector's classes from (K,) of the categories; 0 where there is none."""
        known = self.categories >= 0
        counts = torch.zeros(len(self.categories), dtype=torch.float64)
        counts[known] = of_categories.double()[self.categories[known]]
        return counts

    def describe(self) -> str:
        """Return a sentence on the match."""
        matched, classes = int((self.categories >= 0).sum()), len(self.categories)
        how = {"name": "by name", "id": "label = category id", "index": "in the order of the category ids"}[self.order]
        rest = "" if matched == classes else f"; {classes - matched} outputs have no category and are not raised"
        return f"{matched} categories matched {how}{rest}"


def match_classes(
    head: ClassHead,
    class_names: Sequence[str],
    class_ids: Sequence[int],
    order: ClassOrder = "auto",
    used: Sequence[bool] | None = None,
) -> ClassMap:
    """Return which category each class of a detector stands for.

    Args:
        head: of the detector.
        class_names: K names of the categories.
        class_ids: K ids of the categories.
        order: ``name``: by the names that the model keeps (transformers, longtail), in any case; ``id``: the label of
            a detection is the id of its category, as in torchvision's models of COCO (91 labels, some without a
            category); ``index``: the categories in the order of their ids are the classes, without gaps; ``auto``:
            name if the model has names, else id if every id is a label of the model, else index.
        used: K, whether a category has objects; one without objects needs no output, such as the group of all classes
            in Roboflow's files. All have if None.

    Raises:
        LongtailError: a category with objects has no output; the message names it.
    """
    if order not in get_args(ClassOrder):
        raise LongtailError(f"class_order '{order}': expected {', '.join(get_args(ClassOrder))}")
    labels = [identity - head.first_label for identity in class_ids]
    needed = [True] * len(class_ids) if used is None else list(used)
    if order == "auto":
        if head.label_names is not None:
            order = "name"
        else:
            are_labels = (0 <= label < head.num_classes or not need for label, need in zip(labels, needed, strict=True))
            order = "id" if all(are_labels) else "index"
    if order == "name":
        positions = _by_name(head, class_names, needed)
    elif order == "index":
        kept = list(range(len(class_ids)))
        if len(kept) != head.num_classes:
            kept = [category for category in kept if needed[category]]
        if len(kept) != head.num_classes:
            raise LongtailError(
                f"classes: the annotations have {len(class_names)} categories (the last is '{class_names[-1]}', id "
                f"{class_ids[-1]}), the detector has {head.num_classes} classes; expected the same number, or "
                "category ids that are the detector's labels"
            )
        ascending = sorted(kept, key=lambda category: class_ids[category])
        positions = [-1] * len(class_ids)
        for position, category in enumerate(ascending):
            positions[category] = position
    else:
        positions = [label if 0 <= label < head.num_classes else -1 for label in labels]
        for name, identity, position, need in zip(class_names, class_ids, positions, needed, strict=True):
            if position < 0 and need:
                raise LongtailError(
                    f"classes: '{name}' has the category id {identity}, but the detector's labels are "
                    f"{head.first_label} to {head.first_label + head.num_classes - 1}; use class_order index or name"
                )
    categories = torch.full((head.num_classes,), -1, dtype=torch.int64)
    outputs = torch.tensor(positions, dtype=torch.int64)
    categories[outputs[outputs >= 0]] = torch.nonzero(outputs >= 0).flatten()
    return ClassMap(categories, order)


def _by_name(head: ClassHead, class_names: Sequence[str], needed: Sequence[bool]) -> list[int]:
    """Return the output of each category, −1 for one that has none and needs none."""
    if head.label_names is None:
        raise LongtailError("class_order name: the detector has no class names; use id or index")

    def key(name: str) -> str:
        return nfc(name).strip().casefold()

    known: dict[str, int] = {}
    for position, name in enumerate(head.label_names):
        known.setdefault(key(name), position)
    exact = {nfc(name): position for position, name in reversed([*enumerate(head.label_names)])}
    positions = []
    for name, need in zip(class_names, needed, strict=True):
        if key(name) not in known and need:
            raise LongtailError(
                f"classes: the detector has no class '{name}' of the annotations{did_you_mean(key(name), known)}"
            )
        positions.append(exact.get(nfc(name), known.get(key(name), -1)))
    return positions


def aligned_counts(head: ClassHead, counts: Any, class_map: ClassMap | None = None) -> Tensor:
    """Return (C,) float64 counts of the detector's classes.

    Args:
        head: of the detector.
        counts: C numbers, or numbers by class name, or K numbers of the categories of ``class_map``.
        class_map: the match of categories and classes.

    Raises:
        LongtailError: another number of counts, or a name that is not a class.
    """
    if class_map is not None:
        return class_map.counts(torch.as_tensor(counts))
    if isinstance(counts, Mapping):
        names = [str(name) for name in counts]
        positions = _by_name(head, names, [True] * len(names))
        values = torch.zeros(head.num_classes, dtype=torch.float64)
        values[positions] = torch.tensor([float(counts[name]) for name in counts], dtype=torch.float64)
        return values
    values = torch.as_tensor(counts, dtype=torch.float64)
    if values.shape != (head.num_classes,):
        raise LongtailError(
            f"counts: {values.numel()} numbers, but the detector has {head.num_classes} classes without the background"
        )
    return values

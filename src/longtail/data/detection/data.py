"""A long-tailed set of images with objects. Legend: N images, M objects, C classes, S side of an image in pixels."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from longtail.config import Data, Shots
from longtail.data.dataset import DataDetails, ImageSet, LongTailedData
from longtail.data.detection.annotations import Annotations
from longtail.data.detection.assemble import AnnotationProblems
from longtail.data.detection.images import DetectionImages
from longtail.data.detection.inspection import annotation_details
from longtail.data.samplers import ImageClasses

GROUPS = ("frequent", "common", "rare")
_FREQUENT_ABOVE, _RARE_UP_TO = 100, 10  # images


@dataclass(frozen=True)
class DetectionData(LongTailedData):
    """Images with objects. The images of every split are :class:`DetectionImages`."""

    task: ClassVar[str] = "detection"
    counted: ClassVar[str] = "training objects"
    group_names: ClassVar[tuple[str, ...]] = GROUPS

    problems: AnnotationProblems | None = None
    """What had to be changed or left out of the annotations."""

    @property
    def annotations(self) -> Annotations:
        """The annotations of the training images."""
        return annotations_of(self.train)

    @property
    def class_counts(self) -> list[int]:
        """Training objects of each class that are not ignored, (C,)."""
        counts: list[int] = self.annotations.object_counts.tolist()
        return counts

    @property
    def image_counts(self) -> list[int]:
        """Training images of each class, (C,)."""
        counts: list[int] = self.annotations.image_counts.tolist()
        return counts

    @property
    def max_objects(self) -> int:
        """The most objects of any training image, ignored ones too; at least 1."""
        return max(1, int(self.annotations.num_objects.max()))

    def groups(self, shots: Shots) -> list[str]:  # noqa: ARG002
        """Return the group of each class, C of :attr:`group_names`, by its training images; see :func:`lvis_groups`."""
        return lvis_groups(self.image_counts)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the training set: what every set has, and the objects."""
        return _with_objects(super().fingerprint, self.annotations)

    def hash_of(self, images: ImageSet) -> str:
        """Return the hash of a split that is not trained on: what every set has, and the objects."""
        return _with_objects(super().hash_of(images), annotations_of(images))

    def details(self, config: Data) -> DataDetails:
        """Return objects and images of each class, repeat factors, and what looks wrong with the annotations."""
        sets = {"train": self.train, "val": self.val, "test": self.test}
        splits = {name: annotations_of(images) for name, images in sets.items() if images is not None}
        groups = lvis_groups(self.image_counts)
        problems = AnnotationProblems() if self.problems is None else self.problems
        return annotation_details(splits, groups, problems, config.repeat_threshold, self.image_size)


def _with_objects(fingerprint: str, annotations: Annotations) -> str:
    digest = hashlib.blake2b(fingerprint.encode(), digest_size=8)
    for tensor in (annotations.image_index, annotations.boxes, annotations.labels, annotations.ignored):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def images_of(images: ImageSet) -> DetectionImages:
    """Return the image files of a split."""
    assert isinstance(images.images, DetectionImages)
    return images.images


def annotations_of(images: ImageSet) -> Annotations:
    """Return the annotations of a split."""
    return images_of(images).annotations


def lvis_groups(image_counts: Sequence[int]) -> list[str]:
    """Return frequent, common or rare for each of the C classes: more than 100, 11 to 100, and up to 10 images (LVIS).

    >>> lvis_groups([101, 100, 11, 10])
    ['frequent', 'common', 'common', 'rare']
    """
    return [
        "frequent" if count > _FREQUENT_ABOVE else "rare" if count <= _RARE_UP_TO else "common"
        for count in image_counts
    ]


def image_classes(annotations: Annotations) -> ImageClasses:
    """Return the classes that each image has objects of that are not ignored."""
    counted = ~annotations.ignored
    return ImageClasses(annotations.image_index[counted], annotations.labels[counted], len(annotations))

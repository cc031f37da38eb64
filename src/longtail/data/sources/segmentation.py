"""Images with a label for every pixel: folders in ADE20K's layout.

    ROOT/images/{training,validation,test}/NAME.jpg         or train, val, … as in longtail.data.listing.types
    ROOT/annotations/{training,validation,test}/NAME.png    a value for each pixel: 0 unlabelled, else a class number
    ROOT/classes.txt                                        names of the classes 1, 2, …, one per line (or ADE20K's own
                                                            objectInfo150.txt); without it classes are named by number

Legend: N images, C classes, H and W height and width in pixels. In the library labels are 0 to C − 1, and −1 is
unlabelled.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from longtail.config import Data, Shots
from longtail.data.class_order import frequency_thirds
from longtail.data.dataset import IMAGENET_MEAN, IMAGENET_STD, ImageSet, LongTailedData
from longtail.data.image_io import (
    StorageError,
    is_image_name,
    open_image,
    orientation,
    oriented_as,
    read_orientation,
    shown_size,
    to_rgb,
)
from longtail.data.images import FileImages
from longtail.data.listing import find_split_folders
from longtail.data.paths import find_path, nfc, visible_files
from longtail.data.sources import Source
from longtail.data.sources.mask_counts import (
    Integers,
    MaskCount,
    class_sums,
    count_mask,
    drawn_as_stored,
    largest_value,
    zero_remarks,
)
from longtail.data.sources.mask_files import Labels, drawn_on, mask_of, without_value
from longtail.data.sources.unreadable import Unreadable
from longtail.errors import LongtailError
from longtail.files import read_lines

CAMVID_CLASSES = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)
"""The eleven classes of CamVid (Brostow et al., 2008; Badrinarayanan et al., 2017)."""


class SegmentationSample(NamedTuple):
    """An image with the labels of its pixels."""

    image: Image.Image
    labels: Labels
    """(H, W) int32, −1 where unlabelled."""


class SegmentationImages(FileImages):
    """Image files, each with a mask.

    Args:
        root: the folder.
        names: N paths of images below it.
        masks: N paths of masks below it.
        ignore_value: of pixels in a mask that are not labelled, besides 0.
        labels: (N,) a class of each image, from which the replacement of an unreadable one is chosen; any if not given.
        max_unreadable_fraction: see :class:`~longtail.data.images.LazyImages`.
        mask_digests: N hashes of what the masks held when the set was loaded.
        masks_as_stored: whether masks are drawn on images as they are stored, before their Exif tags turn them, where
            sizes do not tell.
    """

    def __init__(
        self,
        root: Path,
        names: list[str],
        masks: list[str],
        ignore_value: int | None = None,
        labels: Tensor | None = None,
        max_unreadable_fraction: float = 0.0,
        mask_digests: Sequence[bytes] = (),
        masks_as_stored: bool = False,
    ) -> None:
        labels = torch.zeros(len(names), dtype=torch.int64) if labels is None else labels
        super().__init__(root, names, 0, 3, labels, max_unreadable_fraction)
        self.masks, self.ignore_value, self.mask_digests = masks, ignore_value, mask_digests
        self.masks_as_stored = masks_as_stored

    def open_sample(self, index: int) -> SegmentationSample:
        """Return an image with its labels; the next of the same class where it or its mask cannot be read.

        Raises:
            LongtailError: a larger fraction than ``max_unreadable_fraction`` cannot be read, or the whole class.
        """
        return cast("SegmentationSample", self._with_fallback(index, cast("Any", self._open_pair)))

    def _open_pair(self, index: int) -> SegmentationSample:
        stored = self.open(index)
        path = self.root / self.masks[index]
        mask = mask_of(open_image(path), path)
        drawn = drawn_on(mask, stored.size, orientation(stored))
        if drawn is None:
            raise _size_error(self.root / self.names[index], stored.size, path, mask.size)
        labels = without_value(mask.values, self.ignore_value) - 1
        if drawn == "stored" or (drawn == "either" and self.masks_as_stored):  # by a program that ignores Exif tags
            labels = np.asarray(oriented_as(stored, Image.fromarray(labels)))
        return SegmentationSample(to_rgb(stored), labels)


@dataclass(frozen=True)
class SegmentationData(LongTailedData):
    """Images with a label for every pixel. ``train.labels`` holds the rarest class of each image."""

    task: ClassVar[str] = "segmentation"
    counted: ClassVar[str] = "training pixels"
    group_names: ClassVar[tuple[str, ...]] = ("head", "middle", "tail")

    pixel_counts: tuple[int, ...] = ()
    """(C,) labelled training pixels of every class."""
    draw_counts: tuple[int, ...] = ()
    """(C,) thousandths of training images, each divided evenly among the classes in it: the class frequencies of pixels
    that are drawn evenly from the classes of an image."""
    size: tuple[int, int] = (0, 0)
    """(H, W) of most test images."""

    @property
    def class_counts(self) -> list[int]:
        """Training pixels of each class, (C,)."""
        return list(self.pixel_counts)

    def groups(self, shots: Shots) -> list[str]:  # noqa: ARG002
        """Return the third of each class by training pixels: C of head, middle and tail."""
        return frequency_thirds(self.class_counts)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the training set: what every set has, the names of its images, and what is in their masks."""
        return _with_masks(super().fingerprint, self.train)

    def hash_of(self, images: ImageSet) -> str:
        """Return the hash of a split that is not trained on: what every set has, names, and what is in the masks."""
        return _with_masks(super().hash_of(images), images)


def _with_masks(fingerprint: str, images: ImageSet) -> str:
    assert isinstance(images.images, SegmentationImages)
    digest = hashlib.blake2b(fingerprint.encode(), digest_size=8)
    digest.update("\0".join(images.images.names).encode("utf-8", "surrogateescape"))
    for mask in images.images.mask_digests:
        digest.update(mask)
    return digest.hexdigest()


def load_segmentation(
    config: Data, _seed: int, default_names: Callable[[Path], tuple[str, ...] | None], test: str
) -> SegmentationData:
    """Load a folder in this layout.

    Args:
        config: its root.
        default_names: returns the class names of a root without ``classes.txt``, or None to name them by number.
        test: the split that is tested on; another validation split chooses the epoch.

    Raises:
        LongtailError: a mask or an image is missing, more of them cannot be read than the settings accept, their sizes
            differ, a mask has an unknown value, there are fewer than two classes, or one has no training pixel.
    """
    root = _checked_root(config)
    folders = {kind: _split_folders(root / kind) for kind in ("images", "annotations")}
    evaluated = [split for split in ("val", "test") if split in {"val", test}]
    pairs = {split: _pairs(root, split, folders) for split in ("train", *evaluated)}
    if not pairs["train"]:
        raise LongtailError(
            f"{root / 'images'}: holds no folder train or training with images; expected images/ and annotations/ there"
        )
    if not pairs[test]:
        test = "val"
    if not pairs[test]:
        raise LongtailError(
            f"{root / 'images'}: holds no images of {' or '.join(evaluated)}; expected some to evaluate on"
        )
    pairs = {split: files for split, files in pairs.items() if files}
    names = _class_names(root, default_names)
    unreadable = Unreadable(config, sum(map(len, pairs.values())))
    pairs, counted = _count_readable(root, pairs, names, config.ignore_value, test, unreadable)
    has_names = names is not None
    if names is None:
        names = _numbered_names(root, max(map(largest_value, counted.values())))
    remarks = [remark for split in pairs for remark in _unlabelled_remarks(root, pairs[split], counted[split])]
    if config.val_fraction > 0:
        remarks.append("data.val_fraction is not used: masks have the splits of their folders")
    unreadable.check(remarks)
    if not has_names and config.ignore_value != 0:
        remarks += zero_remarks(counted["train"])
    as_stored = drawn_as_stored([mask for masks in counted.values() for mask in masks], remarks)
    pairs["train"], counted["train"] = _without_unlabelled(pairs["train"], counted["train"])
    if test != "val" and "val" in counted and not largest_value(counted["val"]):
        remarks.append("the validation masks have no labelled pixel, and are left out; the last epoch is kept")
        del pairs["val"], counted["val"]
    if not largest_value(counted[test]):
        raise LongtailError(f"{test}: the masks have no labelled pixel; expected some to evaluate on")
    totals, shares = class_sums(counted["train"], len(names))
    zeros = 0 if config.ignore_value == 0 else sum(mask.zeros for mask in counted["train"])
    _check_every_class(totals, zeros, names, root / "annotations" / folders["annotations"]["train"])
    rarest = torch.tensor([int(mask.labels[totals[mask.labels].argmin()]) for mask in counted["train"]])
    accepted = 0.0 if unreadable.refuses else config.max_unreadable_fraction
    sets = {}
    for split, files in pairs.items():
        labels = rarest if split == "train" else torch.zeros(len(files), dtype=torch.int64)
        images, masks = [name for name, _ in files], [mask for _, mask in files]
        digests = [mask.digest for mask in counted[split]]
        samples = SegmentationImages(root, images, masks, config.ignore_value, labels, accepted, digests, as_stored)
        sets[split] = ImageSet(samples, labels, torch.arange(len(files)))
    size = Counter(mask.size for mask in counted[test]).most_common(1)[0][0]
    return SegmentationData(
        train=sets["train"],
        val=sets["val"] if test != "val" and "val" in sets else None,
        test=sets[test],
        class_names=names,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        image_size=min(size),
        augment="none",
        remarks=tuple(remarks),
        unreadable=tuple(unreadable.found),
        pixel_counts=tuple(totals.tolist()),
        draw_counts=tuple(int(value) for value in (1000 * shares).round().clip(min=1).tolist()),
        size=size,
    )


def _checked_root(config: Data) -> Path:
    """Return the folder that the settings name; raise LongtailError if they do not, or are not for masks."""
    if config.root is None:
        raise LongtailError(
            f"data.root is missing: which folder holds images/ and annotations/ of {config.source}? "
            "(--data.root FOLDER)"
        )
    if config.profile not in {"auto", "natural"}:
        raise LongtailError(
            f"data.profile {config.profile}: is not supported for images with masks, which have several classes; "
            "use natural"
        )
    return find_path(Path(config.root))


def _numbered_names(root: Path, count: int) -> tuple[str, ...]:
    """Return names of the classes 1 to ``count``, the largest value of any mask; raise LongtailError if it is 1."""
    if count < 2:
        raise LongtailError(
            f"{root / 'annotations'}: expected the numbers of at least two classes in the masks, found {count}; 0 "
            "means unlabelled, so classes, the background too, are numbered from 1"
        )
    return tuple(f"class {number}" for number in range(1, count + 1))


def _check_every_class(totals: Integers, zeros: int, names: tuple[str, ...], folder: Path) -> None:
    """Raise LongtailError if a class has no pixel in the training masks.

    Args:
        totals: (C,) their pixels of each class.
        zeros: their pixels of the value 0.
        names: of the classes.
        folder: of the masks.
    """
    unseen = next((index for index, count in enumerate(totals.tolist()) if count == 0), None)
    if unseen is not None:
        from_zero = zeros > 0 and int(totals[-1]) == 0
        raise LongtailError(
            f"{folder}: class '{names[unseen]}' (value {unseen + 1}) has no pixel there; add images of it, or give its "
            "number to another class in classes.txt and the masks; --data.ignore_value leaves out a value, such as "
            "255, of pixels that are not labelled"
            f"{'; 0 means unlabelled: are the classes numbered from 0?' * from_zero}"
        )


def _class_names(root: Path, default_names: Callable[[Path], tuple[str, ...] | None]) -> tuple[str, ...] | None:
    path = root / "classes.txt"
    if not path.is_file():
        return default_names(root)
    names = [line.strip() for line in read_lines(path)]
    while names and not names[-1]:
        del names[-1]
    if "" in names:
        number = names.index("") + 1
        raise LongtailError(f"{path}: line {number} is blank, expected the name of the class whose pixels are {number}")
    repeated = next((name for name, count in Counter(names).items() if count > 1), None)
    if repeated is not None or len(names) < 2:
        what = f"'{repeated}' is listed twice" if repeated is not None else f"found {len(names)}"
        raise LongtailError(f"{path}: expected the names of at least two classes, each on a line of its own; {what}")
    return tuple(names)


def _ade20k_classes(root: Path) -> tuple[str, ...]:
    """Return the 150 names of the file that comes with ADE20K, or their numbers where the file is missing."""
    path = root / "objectInfo150.txt"
    if not path.is_file():
        return tuple(f"class {number}" for number in range(1, 151))
    lines = read_lines(path)[1:]
    return tuple(line.split("\t")[-1].split(",")[0].strip() for line in lines if line.strip())


def _split_folders(folder: Path) -> dict[str, str]:
    """Return the names of the folders of the splits, in any of their spellings."""
    if not folder.is_dir():
        return {}
    errors: list[str] = []
    folders = find_split_folders(folder, errors, nested=False)
    if errors:
        raise LongtailError(errors[0])
    return folders


def _pairs(root: Path, split: str, folders: dict[str, dict[str, str]]) -> list[tuple[str, str]]:
    """Return every image of a split with its mask, as paths below the root.

    Args:
        root: the folder.
        split: one of train, val and test.
        folders: names of the splits' folders below ``images`` and ``annotations``.
    """
    if not any(split in of for of in folders.values()):
        return []
    names = {
        kind: of.get(split) or next(other[split] for other in folders.values() if split in other)
        for kind, of in folders.items()
    }
    images, masks = root / "images" / names["images"], root / "annotations" / names["annotations"]
    image_of, mask_of = _files_by_stem(images), _files_by_stem(masks)
    for stem, name in image_of.items():
        if stem not in mask_of:
            raise LongtailError(f"{images / name}: has no mask {masks / f'{stem}.png'}; add it, or remove the image")
    for stem, name in mask_of.items():
        if stem not in image_of:
            raise LongtailError(f"{masks / name}: has no image {images / f'{stem}.jpg'}; add it, or remove the mask")
    return [
        (f"images/{names['images']}/{image_of[stem]}", f"annotations/{names['annotations']}/{mask_of[stem]}")
        for stem in sorted(image_of)
    ]


def _files_by_stem(folder: Path) -> dict[str, str]:
    """Return the image files below a folder by their path without suffix."""
    if not folder.is_dir():
        return {}
    files: dict[str, str] = {}
    for path in sorted(visible_files(folder)):
        if is_image_name(path.name):
            name = path.relative_to(folder)
            stem = nfc(str(name.with_suffix("")))
            if stem in files:
                raise LongtailError(f"{path}: has the same name as {files[stem]}; rename one")
            files[stem] = str(name)
    return files


def _count_readable(
    root: Path,
    pairs: dict[str, list[tuple[str, str]]],
    names: tuple[str, ...] | None,
    ignore_value: int | None,
    test: str,
    unreadable: Unreadable,
) -> tuple[dict[str, list[tuple[str, str]]], dict[str, list[MaskCount]]]:
    """Return the images of every split that can be read, with the pixels in their masks; see :func:`_count_pixels`.

    Args:
        root: the folder.
        pairs: images and masks by split.
        names: of the classes.
        ignore_value: of pixels that are not labelled.
        test: the split that is tested on.
        unreadable: gathers the others, by the image's path.

    Raises:
        LongtailError: they are more than ``unreadable`` accepts, or all that a split has.
    """
    good: dict[str, list[tuple[str, str]]] = {}
    counted: dict[str, list[MaskCount]] = {}
    reasons: dict[str, str] = {}
    for split, files in pairs.items():
        # what is evaluated is decoded once more now, so that no image has to be replaced then
        counted[split], bad = _count_pixels(root, files, names, ignore_value, decode=split != "train")
        good[split] = [pair for row, pair in enumerate(files) if row not in bad]
        reasons |= {files[row][0]: reason for row, reason in bad.items()}
    unreadable.add(reasons)
    for split in [split for split, files in good.items() if not files]:
        if split in {"train", test}:
            first = reasons[pairs[split][0][0]]
            raise LongtailError(f"{root / 'images'}: no image of {split} can be read; the first: {first}")
        del good[split], counted[split]
    return good, counted


def _count_pixels(
    root: Path, pairs: list[tuple[str, str]], names: tuple[str, ...] | None, ignore_value: int | None, decode: bool
) -> tuple[list[MaskCount], dict[int, str]]:
    """Read every mask: its size, and how many pixels have which value.

    Args:
        root: the folder.
        pairs: paths of images and masks below it.
        names: of the classes; None where values are not limited.
        ignore_value: of pixels that are not labelled.
        decode: decode the images too, instead of reading their sizes only.

    Returns:
        The counts of what can be read, in order, and the reasons for the others by position.
    """

    def count(pair: tuple[str, str]) -> MaskCount | str:
        image, mask = root / pair[0], root / pair[1]
        try:
            opened, (size, turn) = open_image(mask), read_orientation(image)
            if decode or shown_size(opened.size, orientation(opened)) not in {size, shown_size(size, turn)}:
                whole = open_image(image)
                size, turn = whole.size, orientation(whole)
        except StorageError:
            raise
        except LongtailError as error:
            return str(error)
        found = mask_of(opened, mask)
        drawn = drawn_on(found, size, turn)
        if drawn is None:
            raise _size_error(image, size, mask, found.size)
        zeros = int(np.count_nonzero(found.values == 0))
        values = without_value(found.values, ignore_value)
        largest, smallest = int(values.max(initial=0)), int(values.min(initial=0))
        if names is not None and largest > len(names):
            raise LongtailError(
                f"{mask}: holds the value {largest}, expected 0 (unlabelled) to {len(names)} (the number of classes); "
                f"if its pixels are not labelled: --data.ignore_value {largest}"
            )
        if smallest < 0 or largest > 65_535:
            raise LongtailError(f"{mask}: holds values from {smallest} to {largest}, expected 0 to 65,535")
        return count_mask(values)._replace(size=shown_size(size, turn)[::-1], zeros=zeros, drawn=drawn)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = list(pool.map(count, pairs))
    reasons = {row: result for row, result in enumerate(results) if isinstance(result, str)}
    return [result for result in results if not isinstance(result, str)], reasons


def _unlabelled_remarks(root: Path, pairs: list[tuple[str, str]], masks: list[MaskCount]) -> list[str]:
    unlabelled = [row for row, mask in enumerate(masks) if not len(mask.labels)]
    if not unlabelled:
        return []
    first = root / pairs[unlabelled[0]][1]
    return [f"{len(unlabelled)} of {len(pairs)} masks have no labelled pixel, and do not count: {first}"]


def _without_unlabelled(
    pairs: list[tuple[str, str]], masks: list[MaskCount]
) -> tuple[list[tuple[str, str]], list[MaskCount]]:
    rows = [row for row, mask in enumerate(masks) if len(mask.labels)]
    return [pairs[row] for row in rows], [masks[row] for row in rows]


def _size_error(image: Path, size: tuple[int, int], mask: Path, mask_size: tuple[int, int]) -> LongtailError:
    return LongtailError(
        f"{mask}: has {mask_size[0]} × {mask_size[1]} pixels, its image {image} {size[0]} × {size[1]}; "
        "expected the same"
    )


CAMVID = Source(
    load=functools.partial(load_segmentation, default_names=lambda _root: CAMVID_CLASSES, test="test"),
)
ADE20K = Source(load=functools.partial(load_segmentation, default_names=_ade20k_classes, test="val"))
MASKS = Source(load=functools.partial(load_segmentation, default_names=lambda _root: None, test="test"))

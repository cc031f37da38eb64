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
import os
from collections import Counter
from collections.abc import Callable
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
from longtail.data.image_io import is_image_name, open_image, oriented_as, read_size, to_rgb, transposed
from longtail.data.images import FileImages
from longtail.data.listing import SPLITS, find_split_folders
from longtail.data.paths import find_path, visible_files
from longtail.data.sources import Source
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

_PNG_SIGNATURE, _PNG_DEPTH = b"\x89PNG\r\n\x1a\n", 24  # and where the bits of a value are, in the header

Labels = np.ndarray[Any, np.dtype[np.int32]]
Integers = np.ndarray[Any, np.dtype[np.int64]]


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
    """

    def __init__(
        self,
        root: Path,
        names: list[str],
        masks: list[str],
        ignore_value: int | None = None,
        labels: Tensor | None = None,
        max_unreadable_fraction: float = 0.0,
    ) -> None:
        labels = torch.zeros(len(names), dtype=torch.int64) if labels is None else labels
        super().__init__(root, names, 0, 3, labels, max_unreadable_fraction)
        self.masks, self.ignore_value = masks, ignore_value

    def open_sample(self, index: int) -> SegmentationSample:
        """Return an image with its labels; the next of the same class where it or its mask cannot be read.

        Raises:
            LongtailError: a larger fraction than ``max_unreadable_fraction`` cannot be read, or the whole class.
        """
        return cast("SegmentationSample", self._with_fallback(index, cast("Any", self._open_pair)))

    def _open_pair(self, index: int) -> SegmentationSample:
        stored = self.open(index)
        image = to_rgb(stored)
        labels = read_mask(self.root / self.masks[index], self.ignore_value) - 1
        if labels.shape == stored.size[::-1] != image.size[::-1]:
            # drawn on the image as it is stored, by a program that ignores its Exif tag
            labels = np.asarray(oriented_as(stored, Image.fromarray(labels)))
        if labels.shape != image.size[::-1]:
            raise _size_error(self.root / self.names[index], image.size, self.root / self.masks[index], labels.shape)
        return SegmentationSample(image, labels)


@dataclass(frozen=True)
class SegmentationData(LongTailedData):
    """Images with a label for every pixel. ``train.labels`` holds the rarest class of each image."""

    task: ClassVar[str] = "segmentation"
    counted: ClassVar[str] = "training pixels"
    group_names: ClassVar[tuple[str, ...]] = ("head", "middle", "tail")
    files_checked: ClassVar[bool] = True  # every mask is counted

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


def read_mask(path: Path, ignore_value: int | None = None) -> Labels:
    """Return the values of a mask, (H, W) int32; of a palette image its indices.

    Args:
        path: the file.
        ignore_value: a value that is returned as 0, unlabelled.

    Raises:
        LongtailError: the file cannot be read, or has colours instead of one value for each pixel.
    """
    return _mask_values(open_image(path), path, ignore_value)


def _mask_values(image: Image.Image, path: Path, ignore_value: int | None) -> Labels:
    if image.mode not in {"1", "L", "P", "I", "I;16", "I;16B", "I;16L"}:
        raise LongtailError(
            f"{path}: has {len(image.getbands())} channels ({image.mode}), expected one: the number of its class"
        )
    values = np.array(image).astype(np.int32)
    if image.mode == "L":
        values //= _grey_step(path)
    if ignore_value is not None:
        values[values == ignore_value] = 0
    return values


def _grey_step(path: Path) -> int:
    """Return what Pillow multiplies grey values of a PNG file of 2 or 4 bits by, so that they fill 8 bits; else 1."""
    with path.open("rb") as file:
        header = file.read(_PNG_DEPTH + 1)
    depth = header[_PNG_DEPTH] if header.startswith(_PNG_SIGNATURE) and len(header) > _PNG_DEPTH else 8
    return 255 // (2**depth - 1) if depth < 8 else 1


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
    pairs = {split: _pairs(root, split, folders) for split in SPLITS}
    if not pairs["train"]:
        raise LongtailError(
            f"{root / 'images'}: holds no folder train or training with images; expected images/ and annotations/ there"
        )
    if not pairs[test]:
        test = "val"
    if not pairs[test]:
        raise LongtailError(f"{root / 'images'}: holds no images of val or test; expected some to evaluate on")
    pairs = {split: pairs[split] for split in SPLITS if pairs[split] and split in {"train", "val", test}}
    names = _class_names(root, default_names)
    unreadable = Unreadable(config, sum(map(len, pairs.values())))
    pairs, counted = _count_readable(root, pairs, names, config.ignore_value, test, unreadable)
    if names is None:
        names = _numbered_names(root, max(masks.largest_value() for masks in counted.values()))
    remarks = [remark for split in pairs for remark in _unlabelled_remarks(root, pairs[split], counted[split])]
    if config.val_fraction > 0:
        remarks.append("data.val_fraction is not used: masks have the splits of their folders")
    unreadable.check(remarks)
    pairs["train"], counted["train"] = _without_unlabelled(pairs["train"], counted["train"])
    if test != "val" and "val" in counted and not counted["val"].largest_value():
        remarks.append("the validation masks have no labelled pixel, and are left out; the last epoch is kept")
        del pairs["val"], counted["val"]
    if not counted[test].largest_value():
        raise LongtailError(f"{test}: the masks have no labelled pixel; expected some to evaluate on")
    totals, shares = counted["train"].class_sums(len(names))
    _check_every_class(totals, names, root / "annotations" / folders["annotations"]["train"])
    rarest = torch.tensor([int(labels[totals[labels].argmin()]) for labels in counted["train"].labels])
    accepted = 0.0 if unreadable.refuses else config.max_unreadable_fraction
    sets = {}
    for split, files in pairs.items():
        labels = rarest if split == "train" else torch.zeros(len(files), dtype=torch.int64)
        images, masks = [name for name, _ in files], [mask for _, mask in files]
        samples = SegmentationImages(root, images, masks, config.ignore_value, labels, accepted)
        sets[split] = ImageSet(samples, labels, torch.arange(len(files)))
    size = Counter(counted[test].sizes).most_common(1)[0][0]
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


def _check_every_class(totals: Integers, names: tuple[str, ...], folder: Path) -> None:
    """Raise LongtailError if a class has no pixel in the training masks, of which ``totals`` (C,) are counted."""
    unseen = next((index for index, count in enumerate(totals.tolist()) if count == 0), None)
    if unseen is not None:
        raise LongtailError(
            f"{folder}: class '{names[unseen]}' (value {unseen + 1}) has no pixel there; add images of it, or give its "
            "number to another class in classes.txt and the masks; --data.ignore_value leaves out a value, such as "
            "255, of pixels that are not labelled"
        )


def _class_names(root: Path, default_names: Callable[[Path], tuple[str, ...] | None]) -> tuple[str, ...] | None:
    path = root / "classes.txt"
    if not path.is_file():
        return default_names(root)
    names = [line.strip() for line in read_lines(path) if line.strip()]
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
            stem = str(name.with_suffix(""))
            if stem in files:
                raise LongtailError(f"{path}: has the same name as {files[stem]}; rename one")
            files[stem] = str(name)
    return files


class _MaskCounts(NamedTuple):
    """What is in N masks: of thousands of classes each mask has a few, so that only these are kept."""

    labels: list[Integers]
    """N (K,) classes in a mask, ascending; none where no pixel is labelled."""
    pixels: list[Integers]
    """N (K,) their pixels."""
    sizes: list[tuple[int, int]]
    """N (H, W)."""

    def unlabelled(self) -> list[int]:
        """Return the positions of the masks without a labelled pixel."""
        return [row for row, labels in enumerate(self.labels) if len(labels) == 0]

    def largest_value(self) -> int:
        """Return the largest value of any pixel, which is the number of its class; 0 if none is labelled."""
        return max((int(labels[-1]) + 1 for labels in self.labels if len(labels)), default=0)

    def class_sums(self, classes: int) -> tuple[Integers, np.ndarray[Any, np.dtype[np.float64]]]:
        """Return (C,) the pixels of each class, and the sum over its masks of 1 / number of classes in the mask."""
        totals, shares = np.zeros(classes, dtype=np.int64), np.zeros(classes)
        for labels, pixels in zip(self.labels, self.pixels, strict=True):
            totals[labels] += pixels
            shares[labels] += 1 / max(1, len(labels))
        return totals, shares


def _count_readable(
    root: Path,
    pairs: dict[str, list[tuple[str, str]]],
    names: tuple[str, ...] | None,
    ignore_value: int | None,
    test: str,
    unreadable: Unreadable,
) -> tuple[dict[str, list[tuple[str, str]]], dict[str, _MaskCounts]]:
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
    counted: dict[str, _MaskCounts] = {}
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
) -> tuple[_MaskCounts, dict[int, str]]:
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

    def count(pair: tuple[str, str]) -> tuple[Integers, Integers, tuple[int, int]] | str:
        image, mask = root / pair[0], root / pair[1]
        try:
            opened, size = open_image(mask), read_size(image)
            rotated = transposed(open_image(image)).size if decode or opened.size != size else size
        except LongtailError as error:
            return str(error)
        if opened.size not in {size, rotated}:
            raise _size_error(image, size, mask, opened.size[::-1])
        values = _mask_values(opened, mask, ignore_value)
        largest, smallest = int(values.max(initial=0)), int(values.min(initial=0))
        if names is not None and largest > len(names):
            raise LongtailError(
                f"{mask}: holds the value {largest}, expected 0 (unlabelled) to {len(names)} (the number of classes); "
                f"if its pixels are not labelled: --data.ignore_value {largest}"
            )
        if smallest < 0 or largest > 65_535:
            raise LongtailError(f"{mask}: holds values from {smallest} to {largest}, expected 0 to 65,535")
        pixels = np.bincount(values.ravel())[1:]
        labels = np.flatnonzero(pixels)
        return labels, pixels[labels], values.shape

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = list(pool.map(count, pairs))
    reasons = {row: result for row, result in enumerate(results) if isinstance(result, str)}
    found = [result for result in results if not isinstance(result, str)]
    counts = _MaskCounts(
        [labels for labels, _, _ in found], [pixels for _, pixels, _ in found], [size for _, _, size in found]
    )
    return counts, reasons


def _unlabelled_remarks(root: Path, pairs: list[tuple[str, str]], masks: _MaskCounts) -> list[str]:
    unlabelled = masks.unlabelled()
    if not unlabelled:
        return []
    first = root / pairs[unlabelled[0]][1]
    return [f"{len(unlabelled)} of {len(pairs)} masks have no labelled pixel, and do not count: {first}"]


def _without_unlabelled(pairs: list[tuple[str, str]], masks: _MaskCounts) -> tuple[list[tuple[str, str]], _MaskCounts]:
    rows = [row for row, labels in enumerate(masks.labels) if len(labels)]
    kept = _MaskCounts(
        [masks.labels[row] for row in rows], [masks.pixels[row] for row in rows], [masks.sizes[row] for row in rows]
    )
    return [pairs[row] for row in rows], kept


def _size_error(image: Path, size: tuple[int, int], mask: Path, shape: tuple[int, ...]) -> LongtailError:
    return LongtailError(
        f"{mask}: has {shape[1]} × {shape[0]} pixels, its image {image} {size[0]} × {size[1]}; expected the same"
    )


CAMVID = Source(
    load=functools.partial(load_segmentation, default_names=lambda _root: CAMVID_CLASSES, test="test"),
)
ADE20K = Source(load=functools.partial(load_segmentation, default_names=_ade20k_classes, test="val"))
MASKS = Source(load=functools.partial(load_segmentation, default_names=lambda _root: None, test="test"))

"""Images whose every pixel has a label: folders in ADE20K's layout.

    ROOT/images/{training,validation,test}/NAME.jpg
    ROOT/annotations/{training,validation,test}/NAME.png    one value a pixel: 0 unlabelled, else the number of a class
    ROOT/classes.txt                                        names of the classes 1, 2, …, a line each (or ADE20K's own
                                                            objectInfo150.txt); without it they have numbers for names

Legend: C classes, H and W sides in pixels. Inside the library labels are 0 to C − 1, and −1 is unlabelled.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from longtail.config import Data
from longtail.data.dataset import IMAGENET_MEAN, IMAGENET_STD, ImageSet, LongTailedData
from longtail.data.images import FileImages
from longtail.data.pictures import SUFFIXES, open_image, sides, upright
from longtail.errors import LongtailError
from longtail.randomness import generator

CAMVID = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist")
"""CamVid's eleven classes (Brostow et al., 2008; Badrinarayanan et al., 2017)."""

_FOLDERS = {"train": "training", "val": "validation", "test": "test"}
Labels = np.ndarray[Any, np.dtype[np.int32]]


class Scene(NamedTuple):
    """An image with the label of every pixel."""

    image: Image.Image
    labels: Labels
    """(H, W) int32, −1 where unlabelled."""


class SceneImages(FileImages):
    """Images and, beside each, its annotations.

    Args:
        root: the folder.
        names: N paths of images below it.
        masks: N paths of annotations below it.
    """

    def __init__(self, root: Path, names: list[str], masks: list[str]) -> None:
        super().__init__(root, names, 0)
        self.masks = masks

    def scene(self, index: int) -> Scene:
        """Return an image with its labels."""
        image = upright(self.open(index))
        labels = read_mask(self.root / self.masks[index]) - 1
        if labels.shape != image.size[::-1]:
            raise _unlike(self.root / self.names[index], image.size, self.root / self.masks[index], labels.shape)
        return Scene(image, labels)


@dataclass(frozen=True)
class DenseData(LongTailedData):
    """Images with a label for every pixel. ``train.labels`` holds the rarest class of each image."""

    pixel_counts: tuple[int, ...] = ()
    """(C,) labelled training pixels of every class."""
    draw_counts: tuple[int, ...] = ()
    """(C,) what a draw is shared out like that treats the classes of an image alike, in thousandths of an image."""
    size: tuple[int, int] = (0, 0)
    """(H, W) of most test images."""

    @property
    def class_counts(self) -> list[int]:
        """Training pixels a class."""
        return list(self.pixel_counts)


def thirds(pixel_counts: Sequence[int]) -> list[str]:
    """Return head, middle or tail for every class: thirds of the classes by training pixels, ties by number."""
    order = sorted(range(len(pixel_counts)), key=lambda index: -pixel_counts[index])
    third = len(order) / 3
    names = [""] * len(order)
    for place, index in enumerate(order):
        names[index] = "head" if place < round(third) else "middle" if place < round(2 * third) else "tail"
    return names


def read_mask(path: Path) -> Labels:
    """Return an annotation's values, (H, W) int32; of a palette image its indices.

    Raises:
        LongtailError: the file cannot be read, or has colours instead of one value a pixel.
    """
    image = open_image(path)
    if image.mode not in {"1", "L", "P", "I", "I;16", "I;16B", "I;16L"}:
        raise LongtailError(
            f"{path}: has {len(image.getbands())} channels ({image.mode}), expected one: the number of its class"
        )
    return np.array(image).astype(np.int32)


def scenes(published: Callable[[Path], tuple[str, ...] | None], test: str) -> Callable[[Data, int], LongTailedData]:
    """Return what loads a set in this layout.

    Args:
        published: names the classes of a root where ``classes.txt`` does not; None if it cannot.
        test: the split that is tested on; a validation split picks the epoch where it is another one.
    """

    def load(config: Data, _seed: int) -> LongTailedData:
        if config.root is None:
            raise LongtailError(
                f"data.root is missing: which folder holds images/ and annotations/ of {config.source}? "
                "(--data.root FOLDER)"
            )
        return _load(Path(config.root), published, test)

    return load


def ade20k_names(root: Path) -> tuple[str, ...] | None:
    """Return the 150 names of the file that comes with the set, as far as it is there."""
    path = root / "objectInfo150.txt"
    if not path.is_file():
        return tuple(f"class {number}" for number in range(1, 151))
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    return tuple(line.split("\t")[-1].split(",")[0].strip() for line in lines if line.strip())


def camvid_names(_root: Path) -> tuple[str, ...]:
    """Return CamVid's."""
    return CAMVID


def no_names(_root: Path) -> None:
    """Know of none."""


def _names(root: Path, published: Callable[[Path], tuple[str, ...] | None]) -> tuple[str, ...] | None:
    path = root / "classes.txt"
    if not path.is_file():
        return published(root)
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise LongtailError(f"{path}: cannot be read: {error}") from None
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None or len(names) < 2:
        what = f"'{twice}' stands there twice" if twice is not None else f"found {len(names)}"
        raise LongtailError(f"{path}: expected the names of at least two classes, each on a line of its own; {what}")
    return tuple(names)


class _Counted(NamedTuple):
    counts: Tensor
    """(N, 1 + C) pixels of every value in every annotation."""
    sizes: list[tuple[int, int]]
    """(H, W)."""


def _load(root: Path, published: Callable[[Path], tuple[str, ...] | None], test: str) -> DenseData:
    pairs = {split: _pairs(root, folder) for split, folder in _FOLDERS.items()}
    if not pairs["train"]:
        raise LongtailError(f"{root / 'images' / 'training'}: holds no images; expected images/ and annotations/ there")
    if not pairs[test]:
        test = "val"
    if not pairs[test]:
        raise LongtailError(f"{root / 'images' / 'validation'}: holds no images; expected some to be judged by")
    pairs = {split: found for split, found in pairs.items() if found and split in {"train", "val", test}}
    names = _names(root, published)
    counted = {split: _count(root, found, names) for split, found in pairs.items()}
    width = max(found.counts.shape[1] for found in counted.values())
    if names is None:
        names = tuple(f"class {number}" for number in range(1, width))
    remarks = []
    for split, found in counted.items():
        blank = [row for row, empty in enumerate((found.counts[:, 1:].sum(dim=1) == 0).tolist()) if empty]
        if blank:
            first = root / pairs[split][blank[0]][1]
            remarks.append(
                f"{len(blank)} of {len(found.sizes)} masks have no labelled pixel, and do not count: {first}"
            )
        if split == "train" and blank:
            rows = [row for row in range(len(pairs[split])) if row not in set(blank)]
            pairs[split] = [pairs[split][row] for row in rows]
            counted[split] = _Counted(found.counts[rows], [found.sizes[row] for row in rows])
    train = counted["train"].counts[:, 1:]
    train = torch.nn.functional.pad(train, (0, len(names) - train.shape[1]))
    totals = train.sum(dim=0)
    unseen = next((index for index, count in enumerate(totals.tolist()) if count == 0), None)
    if unseen is not None:
        raise LongtailError(
            f"{root / 'annotations' / 'training'}: class '{names[unseen]}' (value {unseen + 1}) has no pixel there; "
            "add images of it, or give its number to another class in classes.txt and the masks"
        )
    there = train > 0
    shares = there.double() / there.sum(dim=1, keepdim=True).clamp(min=1)
    rarest = torch.where(there, totals, torch.iinfo(torch.int64).max).argmin(dim=1)
    sets = {
        split: ImageSet(
            SceneImages(root, [name for name, _ in found], [mask for _, mask in found]),
            rarest if split == "train" else torch.zeros(len(found), dtype=torch.int64),
            torch.arange(len(found)),
        )
        for split, found in pairs.items()
    }
    size = Counter(counted[test].sizes).most_common(1)[0][0]
    return DenseData(
        train=sets["train"],
        val=sets["val"] if test != "val" and "val" in sets else None,
        test=sets[test],
        class_names=names,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        image_size=min(size),
        augment="none",
        remarks=tuple(remarks),
        pixel_counts=tuple(totals.tolist()),
        draw_counts=tuple(int(value) for value in (1000 * shares.sum(dim=0)).round().clamp(min=1).tolist()),
        size=size,
    )


def _pairs(root: Path, folder: str) -> list[tuple[str, str]]:
    """Return every image of a split with its annotation, as paths below the root."""
    images, masks = root / "images" / folder, root / "annotations" / folder
    if not images.is_dir() and not masks.is_dir():
        return []
    of_images = _by_stem(images)
    of_masks = _by_stem(masks)
    for stem, name in of_images.items():
        if stem not in of_masks:
            raise LongtailError(f"{images / name}: has no mask {masks / f'{stem}.png'}; add it, or remove the image")
    for stem, name in of_masks.items():
        if stem not in of_images:
            raise LongtailError(f"{masks / name}: has no image {images / f'{stem}.jpg'}; add it, or remove the mask")
    return [
        (f"images/{folder}/{of_images[stem]}", f"annotations/{folder}/{of_masks[stem]}") for stem in sorted(of_images)
    ]


def _by_stem(folder: Path) -> dict[str, str]:
    if not folder.is_dir():
        return {}
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
            name = path.relative_to(folder)
            stem = str(name.with_suffix(""))
            if stem in found:
                raise LongtailError(f"{path}: has the same name as {found[stem]}; rename one")
            found[stem] = str(name)
    return found


def _count(root: Path, pairs: list[tuple[str, str]], names: tuple[str, ...] | None) -> _Counted:
    """Look at every annotation: its size, and how many pixels have which value."""

    def look(pair: tuple[str, str]) -> tuple[np.ndarray[Any, Any], tuple[int, int]]:
        image, mask = root / pair[0], root / pair[1]
        values = read_mask(mask)
        if values.shape != sides(image)[::-1] and values.shape != ImageOps.exif_transpose(open_image(image)).size[::-1]:
            raise _unlike(image, sides(image), mask, values.shape)
        largest, least = int(values.max(initial=0)), int(values.min(initial=0))
        if names is not None and largest > len(names):
            raise LongtailError(
                f"{mask}: holds the value {largest}, expected 0 (unlabelled) to {len(names)} (the number of classes)"
            )
        if least < 0 or largest > 65_535:
            raise LongtailError(f"{mask}: holds values from {least} to {largest}, expected 0 to 65,535")
        return np.bincount(values.ravel(), minlength=1 + len(names or ())), values.shape

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        looked = list(pool.map(look, pairs))
    width = max(len(counts) for counts, _ in looked)
    counts = torch.stack([torch.from_numpy(np.pad(counts, (0, width - len(counts)))) for counts, _ in looked])
    return _Counted(counts, [(height, width) for _, (height, width) in looked])


def _unlike(image: Path, size: tuple[int, int], mask: Path, shape: tuple[int, ...]) -> LongtailError:
    return LongtailError(
        f"{mask}: has {shape[1]} × {shape[0]} pixels, its image {image} {size[0]} × {size[1]}; expected the same"
    )


@dataclass(frozen=True)
class SceneView:
    """Call with a scene, its id and the keys of the draw; returns (3, h, w) uint8 and (h, w) int64 labels.

    A part of the image of a random scale at a random place, mirrored one time in two, with brightness, contrast and
    saturation changed. What lies beyond the image is unlabelled.

    Args:
        size: (h, w).
        scale: least and largest scale, drawn evenly in its logarithm.
        jitter: largest change of brightness, contrast and saturation, as a share.
    """

    size: tuple[int, int]
    scale: tuple[float, float]
    jitter: float

    def __call__(self, scene: Scene, image_id: int, keys: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return the view that (keys, image id) decide on."""
        draws: list[float] = torch.rand(7, generator=generator(*keys, image_id)).tolist()
        low, high = self.scale
        image, labels = _part(scene, self.size, low * (high / low) ** draws[0], draws[1], draws[2])
        if draws[3] < 0.5:
            image, labels = ImageOps.mirror(image), np.ascontiguousarray(labels[:, ::-1])
        for draw, kind in zip(
            draws[4:7], (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), strict=True
        ):
            if self.jitter:
                image = kind(image).enhance(1 + self.jitter * (2 * draw - 1))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), torch.from_numpy(labels.astype(np.int64))


def _part(scene: Scene, size: tuple[int, int], scale: float, down: float, across: float) -> Scene:
    """Return a part of (h, w) pixels after scaling, at a place of which 0 is one end and 1 the other."""
    spans, boxes = [], []
    for given, wanted, place in zip(scene.image.size, size[::-1], (across, down), strict=True):
        start = place * (given - wanted / scale)
        first, last = max(0.0, start), min(float(given), start + wanted / scale)
        begin = min(round((first - start) * scale), wanted - 1)
        spans.append((begin, max(1, min(wanted - begin, round((last - first) * scale)))))
        boxes.append((first, last))
    (left, width), (top, height) = spans
    box = (boxes[0][0], boxes[1][0], boxes[0][1], boxes[1][1])
    seen = scene.image.resize((width, height), Image.Resampling.BILINEAR, box)
    known = Image.fromarray(scene.labels).resize((width, height), Image.Resampling.NEAREST, box)
    if (height, width) == size:
        return Scene(seen, np.array(known))
    canvas = Image.new("RGB", size[::-1], tuple(round(255 * value) for value in IMAGENET_MEAN))
    canvas.paste(seen, (left, top))
    labels = np.full(size, -1, np.int32)
    labels[top : top + height, left : left + width] = np.array(known)
    return Scene(canvas, labels)

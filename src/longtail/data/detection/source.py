"""Images with boxes as a data source: read, checked, and split where there are no splits.

Legend: N images, C classes, S side of an image in pixels.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from longtail.config import Data
from longtail.data.dataset import IMAGENET_MEAN, IMAGENET_STD, ImageSet
from longtail.data.detection.annotations import Annotations, concatenate
from longtail.data.detection.data import DetectionData, image_classes
from longtail.data.detection.images import DetectionImages
from longtail.data.detection.layouts import AnnotatedImages, read_annotated_images
from longtail.data.detection.split import split_images, write_split
from longtail.data.image_io import StorageError
from longtail.data.listing import SPLITS, validation_is_test
from longtail.data.paths import printable
from longtail.data.samplers import rarest_classes
from longtail.data.sources import Source
from longtail.data.sources.hold_out import held_out_fractions, remark_on_short_classes
from longtail.data.sources.unreadable import Unreadable
from longtail.errors import LongtailError

_LARGEST_SIDE = 640  # pixels, of a size that is chosen automatically
_STRIDE = 32  # of the coarsest feature map of most encoders


def load_boxes(config: Data, seed: int) -> DetectionData:
    """Load images with boxes; see :mod:`longtail.data.detection.layouts` for the layouts.

    Images that are evaluated are decoded once, so that none has to be replaced then; of training images the headers are
    read, and the images are decoded when they are used. Those that cannot be read, or have another size than the
    annotations say, are left out.

    Args:
        config: its root or json files, the fractions of the splits, and the size of the images.
        seed: of the splits.

    Raises:
        LongtailError: the annotations or an image cannot be used, or a class has no training object.
    """
    if config.profile not in {"auto", "natural"}:
        raise LongtailError(
            f"data.profile {config.profile}: is not supported for images with boxes, which have several classes; "
            "use natural"
        )
    annotated = read_annotated_images(config)
    remarks = [annotated.layout, *annotated.problems.remarks(unreadable=False)]
    splits, positions = _split(annotated, config, seed, remarks)
    unreadable = Unreadable(config, sum(map(len, splits.values())) + len(annotated.problems.unreadable))
    unreadable.add(annotated.problems.unreadable)

    def leave_out_unreadable(split: str) -> None:
        images = DetectionImages(annotated.root, splits[split], _STRIDE)
        good = _find_readable(images, images.check_size if split == "train" else images.open, unreadable, split)
        if len(good) < len(images):
            splits[split], positions[split] = splits[split].select(good), positions[split][good]

    if not annotated.sizes_read:
        leave_out_unreadable("train")
    splits = _with_trained_classes(splits, remarks)
    size = config.image_size or _choose_size(splits["train"])
    for split in ("val", "test"):
        if split in splits:
            leave_out_unreadable(split)
            if not splits[split].object_counts.any():
                raise LongtailError(f"{split}: there is no object in any image; expected some to evaluate on")
    unreadable.check(remarks)
    empty = int((splits["train"].num_objects == 0).sum())
    if empty:
        remarks.append(
            f"{empty:,} of {len(splits['train']):,} training images have no objects, and show background alone"
        )
    sets = {}
    for split, part in splits.items():
        classes = image_classes(part)
        labels = rarest_classes(classes)
        accepted = config.max_unreadable_fraction if split == "train" and not unreadable.refuses else 0.0
        images = DetectionImages(annotated.root, part, size, labels, accepted)
        sets[split] = ImageSet(images, labels, positions[split], classes)
    return DetectionData(
        train=sets["train"],
        val=sets.get("val"),
        test=sets["test"],
        class_names=splits["train"].class_names,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        image_size=size,
        augment="none",
        remarks=tuple(remarks),
        unreadable=tuple(unreadable.found),
        problems=annotated.problems,
    )


def load_bccd(config: Data, seed: int) -> DetectionData:
    """Load BCCD, photographs of blood cells of three classes, in Pascal VOC's layout.

    From github.com/Shenggan/BCCD_Dataset (MIT licence).

    Raises:
        LongtailError: it is not below the root, or see :func:`load_boxes`.
    """
    if config.root is None:
        raise LongtailError(
            "data.root is missing: which folder holds Annotations, ImageSets and JPEGImages of bccd "
            "(github.com/Shenggan/BCCD_Dataset)? (--data.root FOLDER)"
        )
    if not (Path(config.root) / "Annotations").is_dir():
        raise LongtailError(
            f"{config.root}: holds no folder Annotations; expected that of bccd, in Pascal VOC's layout"
        )
    return load_boxes(config, seed)


def _split(
    annotated: AnnotatedImages, config: Data, seed: int, remarks: list[str]
) -> tuple[dict[str, Annotations], dict[str, Tensor]]:
    """Return the annotations of every split and the ids of its images, with test and validation images held out where
    there are none; a folder without test images is tested on its validation images.
    """
    splits, ids, start = dict(annotated.splits), dict[str, Tensor](), 0
    for split, part in splits.items():
        ids[split] = torch.arange(start, start + len(part))
        start += len(part)
    if config.train is None and "test" not in splits and "val" in splits:  # of a folder, whose files nobody has named
        splits["test"], ids["test"] = splits.pop("val"), ids.pop("val")
        remarks.append(validation_is_test(f"validation images of {printable(annotated.root)}"))
    test, val = held_out_fractions(splits, config, remarks)
    if "all" not in splits and test == val == 0:
        return splits, ids
    whole = "all" if "all" in splits else "train"
    annotations, whole_ids = splits.pop(whole), ids.pop(whole)
    parts, missing = split_images(annotations, val, test, seed)
    if missing:
        remarks.append(remark_on_short_classes([printable(annotations.class_names[label]) for label in missing]))
    for number, split in enumerate(SPLITS):
        chosen = torch.nonzero(parts == number).flatten()
        if len(chosen):
            splits[split], ids[split] = annotations.select(chosen), whole_ids[chosen]
    held_out = {"testing": int((parts == 2).sum()), "validation": int((parts == 1).sum())}
    counts = " and ".join(f"{count:,} for {purpose}" for purpose, count in held_out.items() if count)
    if counts:
        remarks.append(f"of {len(annotations):,} images, {counts} are held out of the training")
    for split in ("train", "test"):
        if split not in splits:
            raise LongtailError(
                f"{annotated.root}: {len(annotations)} images are too few for a training and a test split; add images"
            )
    return {split: splits[split] for split in SPLITS if split in splits}, ids


def _with_trained_classes(splits: Mapping[str, Annotations], remarks: list[str]) -> dict[str, Annotations]:
    """Return the annotations without classes that no split has an object of.

    Raises:
        LongtailError: there are objects of a class to evaluate, but none to train on; or fewer than one class is left.
    """
    train, whole = splits["train"], concatenate(list(splits.values()))
    counts, everywhere = train.object_counts, whole.object_counts
    untrained = torch.nonzero((counts == 0) & (everywhere > 0)).flatten().tolist()
    names = train.class_names
    if untrained:
        raise LongtailError(
            f"train: class '{printable(names[untrained[0]])}' has no object there, but {int(everywhere[untrained[0]])} "
            "to evaluate; add images of it, or remove the class"
        )
    kept = torch.nonzero(counts > 0).flatten()
    if not len(kept):
        raise LongtailError("train: there is no object in any image; expected some to train on")
    if len(kept) == len(names):
        return dict(splits)
    absent = [printable(names[label]) for label in torch.nonzero(counts == 0).flatten().tolist()]
    shown = ", ".join(absent[:5]) + ("…" if len(absent) > 5 else "")
    remarks.append(f"{len(absent)} of {len(names)} classes have no objects, and are left out ({shown})")
    ignored = {
        split: int((counts[annotations.labels] == 0).sum())
        for split, annotations in splits.items()
        if (counts[annotations.labels] == 0).any()
    }
    if ignored:
        in_splits = ", ".join(f"{split} {count:,}" for split, count in ignored.items())
        remarks.append(
            f"the ignored boxes of these classes ({in_splits}) are neither objects nor background in training, and are "
            "left out of the evaluation, which ignores by class"
        )
    return {split: _with_classes(annotations, kept, split == "train") for split, annotations in splits.items()}


def _with_classes(annotations: Annotations, kept: Tensor, keep_ignored: bool) -> Annotations:
    """Return annotations of some of their classes.

    Args:
        annotations: objects of classes that are not kept are all ignored.
        kept: classes, ascending.
        keep_ignored: give these objects the first class, since training ignores without regard to the class; otherwise
            they are left out.
    """
    numbers = torch.full((len(annotations.class_names),), 0 if keep_ignored else -1, dtype=torch.int64)
    numbers[kept] = torch.arange(len(kept))
    labels, chosen = numbers[annotations.labels], kept.tolist()
    objects = torch.nonzero(labels >= 0).flatten()
    place = dict(zip(chosen, range(len(chosen)), strict=True))

    def of_kept(sets: tuple[frozenset[int], ...] | None) -> tuple[frozenset[int], ...] | None:
        return None if sets is None else tuple(frozenset(place[c] for c in classes if c in place) for classes in sets)

    masks, class_ids = annotations.masks, annotations.class_ids
    return dataclasses.replace(
        annotations,
        class_names=tuple(annotations.class_names[label] for label in chosen),
        class_ids=tuple(class_ids[label] for label in chosen) if class_ids else (),
        image_index=annotations.image_index[objects],
        boxes=annotations.boxes[objects],
        labels=labels[objects],
        ignored=annotations.ignored[objects],
        crowd=annotations.crowds[objects],
        areas=annotations.areas[objects],
        masks=None if masks is None else tuple(masks[index] for index in objects.tolist()),
        negatives=of_kept(annotations.negatives),
        incomplete=of_kept(annotations.incomplete),
    )


def _choose_size(train: Annotations) -> int:
    """Return the longer side of most images, at most 640 and a multiple of the stride."""
    longer = int(train.sizes.max(dim=1).values.median())
    return min(_LARGEST_SIDE, max(1, round(longer / _STRIDE)) * _STRIDE)


def _find_readable(
    images: DetectionImages, read: Callable[[int], object], unreadable: Unreadable, split: str
) -> Tensor:
    """Return the positions of the images that ``read`` can read, and give the others to ``unreadable``.

    Raises:
        LongtailError: they are more than ``unreadable`` accepts, or all.
    """

    def reason(index: int) -> str | None:
        try:
            read(index)
        except StorageError:
            raise
        except LongtailError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        reasons = list(pool.map(reason, range(len(images))))
    bad = {images.names[index]: text for index, text in enumerate(reasons) if text is not None}
    unreadable.add(bad)
    good = [index for index, text in enumerate(reasons) if text is None]
    if not good:
        raise LongtailError(f"{images.root}: no image of {split} can be read; the first: {next(iter(bad.values()))}")
    return torch.tensor(good, dtype=torch.int64)


BOXES = Source(load=load_boxes, write_split=write_split)
BCCD = Source(load=load_bccd, write_split=write_split)

"""Images of coloured rectangles, whose boxes are known, in every layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

NAMES = ("blue", "green", "red")
COLORS = {"blue": (40, 60, 220), "green": (40, 200, 60), "red": (220, 40, 40)}


class Drawn(NamedTuple):
    """An image: its size and its rectangles, (class, x1, y1, x2, y2) in pixels, the right and lower side outside."""

    width: int
    height: int
    objects: Sequence[tuple[str, int, int, int, int]]


def drawn_images(count: int, seed: int = 0) -> list[Drawn]:
    """Return images with one to four rectangles that do not overlap; every image has a red, every fourth a blue one."""
    rng = np.random.default_rng(seed)
    images = []
    for number in range(count):
        classes = ["red"] + ["green"] * (number % 2) + ["blue"] * (number % 4 == 0)
        width, height = int(rng.integers(60, 90)), int(rng.integers(40, 70))
        objects = []
        for place, name in enumerate(classes):
            left, top = place * width // 3 + int(rng.integers(0, 4)), int(rng.integers(0, height - 22))
            objects.append((name, left, top, left + int(rng.integers(8, 16)), top + int(rng.integers(8, 20))))
        images.append(Drawn(width, height, objects))
    return images


def save_drawn(path: Path, image: Drawn) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((image.height, image.width, 3), 128, dtype=np.uint8)
    for name, left, top, right, bottom in image.objects:
        pixels[top:bottom, left:right] = COLORS[name]
    Image.fromarray(pixels).save(path)
    return path


def coco_content(images: Sequence[Drawn], names: Sequence[str]) -> dict[str, Any]:
    """Return what a json file in COCO's format says of images of these names; the ids of the classes have gaps."""
    ids = {"blue": 3, "green": 7, "red": 90}
    entries = [(index + 10, item) for index, image in enumerate(images) for item in image.objects]
    return {
        "images": [
            {"id": index + 10, "file_name": name, "width": image.width, "height": image.height}
            for index, (image, name) in enumerate(zip(images, names, strict=True))
        ],
        "annotations": [
            {
                "id": number,
                "image_id": image_id,
                "category_id": ids[name],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "iscrowd": 0,
                "segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]],
            }
            for number, (image_id, (name, x1, y1, x2, y2)) in enumerate(entries, 1)
        ],
        "categories": [{"id": number, "name": name} for name, number in ids.items()],
    }


def write_coco_layout(root: Path, splits: Mapping[str, Sequence[Drawn]]) -> Path:
    for split, images in splits.items():
        names = [f"{split}{number:03}.png" for number in range(len(images))]
        for name, image in zip(names, images, strict=True):
            save_drawn(root / split / name, image)
        path = root / "annotations" / f"instances_{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(coco_content(images, names)))
    return root


def write_voc_layout(root: Path, splits: Mapping[str, Sequence[Drawn]], lists: bool = True) -> Path:
    for split, images in splits.items():
        stems = [f"{split}{number:03}" for number in range(len(images))]
        for stem, image in zip(stems, images, strict=True):
            save_drawn(root / "JPEGImages" / f"{stem}.png", image)
            objects = "".join(
                f"<object><name>{name}</name><difficult>0</difficult><bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin>"
                f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
                for name, x1, y1, x2, y2 in image.objects
            )
            path = root / "Annotations" / f"{stem}.xml"
            path.parent.mkdir(parents=True, exist_ok=True)
            size = f"<size><width>{image.width}</width><height>{image.height}</height><depth>3</depth></size>"
            path.write_text(f"<annotation>\n{size}\n{objects}\n</annotation>")
        if lists:
            path = root / "ImageSets" / "Main" / f"{split}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(stems) + "\n")
    return root


def write_yolo_layout(root: Path, splits: Mapping[str, Sequence[Drawn]]) -> Path:
    for split, images in splits.items():
        for number, image in enumerate(images):
            save_drawn(root / "images" / split / f"{split}{number:03}.png", image)
            lines = [
                f"{NAMES.index(name)} {(x1 + x2) / 2 / image.width:.9f} {(y1 + y2) / 2 / image.height:.9f} "
                f"{(x2 - x1) / image.width:.9f} {(y2 - y1) / image.height:.9f}"
                for name, x1, y1, x2, y2 in image.objects
            ]
            path = root / "labels" / split / f"{split}{number:03}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(lines))
    (root / "data.yaml").write_text("train: images/train\nnames: [blue, green, red]\n")
    return root


WRITERS: dict[str, Callable[[Path, Mapping[str, Sequence[Drawn]]], Path]] = {
    "COCO": write_coco_layout,
    "Pascal VOC": write_voc_layout,
    "YOLO": write_yolo_layout,
}

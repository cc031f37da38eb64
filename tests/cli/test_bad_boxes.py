"""Annotations of boxes that cannot be used end each command that reads them with one line."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Command
from tests.data.detection.drawn import WRITERS, drawn_images

COCO_FILE, XML, TEXT = "annotations/instances_train.json", "Annotations/train001.xml", "labels/train/train001.txt"


def changed(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def spoil(root: Path) -> None:
        content = json.loads((root / COCO_FILE).read_text())
        change(content)
        (root / COCO_FILE).write_text(json.dumps(content))

    return spoil


def written(file: str, text: str) -> Callable[[Path], object]:
    return lambda root: (root / file).write_text(text)


def removed(file: str) -> Callable[[Path], object]:
    return lambda root: (root / file).unlink()


def xml(box: Sequence[int], name: str = "red") -> str:
    sides = "".join(f"<{n}>{v}</{n}>" for n, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<annotation>\n<object><name>{name}</name><bndbox>{sides}</bndbox></object>\n</annotation>"


BAD: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "COCO outside": (
        "COCO",
        changed(lambda c: c["annotations"][0].update(bbox=[500, 2, 5, 5])),
        f"{COCO_FILE}: annotation 1 of train000.png: its box (x1, y1, x2, y2 = 500, 2, 505, 7) is outside of its image",
    ),
    "COCO class": (
        "COCO",
        changed(lambda c: c["annotations"][0].update(category_id=8)),
        f"{COCO_FILE}: annotation 1: its category_id 8 is not listed in categories",
    ),
    "COCO missing image": ("COCO", removed("train/train004.png"), "train/train004.png: there is no such image"),
    "COCO image twice": (
        "COCO",
        changed(lambda c: c["images"][1].update(file_name="train000.png")),
        f"{COCO_FILE}: the image train000.png occurs twice",
    ),
    "COCO broken": (
        "COCO",
        written(COCO_FILE, '{"images": [\n{"id": 1},\n'),
        f"{COCO_FILE}, line 3: is not valid JSON",
    ),
    "VOC outside": (
        "Pascal VOC",
        written(XML, xml((500, 2, 505, 7))),
        f"{XML}: object 1 (red): its box (x1, y1, x2, y2 = 499, 1, 505, 7) is outside of its image",
    ),
    "VOC class": ("Pascal VOC", written("classes.txt", "blue\ngreen\nrad\n"), "(red): its class is not listed in "),
    "VOC missing image": (
        "Pascal VOC",
        removed("JPEGImages/train001.png"),
        "JPEGImages/train001.jpg: there is no such image",
    ),
    "VOC image twice": (
        "Pascal VOC",
        written("ImageSets/Main/train.txt", "train001\ntrain001\n"),
        "ImageSets/Main/train.txt: the image train001 occurs twice",
    ),
    "VOC broken": ("Pascal VOC", written(XML, "<annotation>\n<object>\n"), f"{XML}, line 3: is not valid XML"),
    "YOLO outside": ("YOLO", written(TEXT, "\n0 1.3 .5 .1 .1"), f"{TEXT}, line 2: its box (x1, y1, x2, y2 = "),
    "YOLO class": ("YOLO", written(TEXT, "0 .5 .5 .1 .1\n3 .5 .5 .1 .1"), f"{TEXT}, line 2: class 3 is not listed"),
    "YOLO missing image": ("YOLO", removed("images/train/train001.png"), f"{TEXT}: has no image in "),
    "YOLO image twice": (
        "YOLO",
        lambda root: (root / "images/train/train001.jpg").write_bytes(b""),
        "images/train: the image train001 occurs twice",
    ),
    "YOLO broken": ("YOLO", written(TEXT, "0 .5 .5 .1 .1\n0 .5 .5 x .1"), f"{TEXT}, line 2: expected a class and x, y"),
}
COMMANDS = {
    "inspect": ("inspect", "ROOT"),
    "split": ("split", "ROOT", "--out", "OUT"),
    "train": (
        *("train", "--data", "ROOT", "--network", "fasterrcnn:test_efficientnet:32", "--pretrained", "none"),
        *("--out", "OUT"),
    ),
    "calibrate-detector": ("calibrate-detector", "MODEL", "--annotations", "ROOT", "--power", "1", "--out", "OUT"),
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("kind", BAD)
def test_bad_annotations_are_one_line(kind: str, name: str, command: Command, tmp_path: Path) -> None:
    layout, spoil, message = BAD[kind]
    images = drawn_images(6)
    root = WRITERS[layout](tmp_path / "set", {"train": images, "test": images[:2]})
    spoil(root)
    out = tmp_path / "out"
    places: dict[str, str | Path] = {"ROOT": root, "OUT": out, "MODEL": tmp_path}
    code, shown, errors = command(*(places.get(word, word) for word in COMMANDS[name]))
    assert (code, shown) == (2, "")
    assert message in errors
    assert len(errors.splitlines()) == 1
    assert not out.exists()

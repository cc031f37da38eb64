"""The parts that a page, a deployed model and the command line use without torch."""

from __future__ import annotations

import base64
import io
import subprocess
import sys
import threading
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from longtail.data.class_order import frequency_thirds, head_first
from longtail.data.data_uri import encode_data_uri, file_data_uri, image_data_uri
from longtail.data.prefetch import prefetch
from longtail.data.source_spec import named_sets, source_of
from longtail.errors import LongtailError
from longtail.registry import SOURCES
from tests.conftest import save_image


def test_no_torch_is_imported() -> None:
    modules = ["class_order", "data_uri", "image_io", "prefetch", "source_spec", "text"]
    code = (
        f"import sys, importlib\nfor name in {modules}: importlib.import_module('longtail.data.' + name)\n"
        "from longtail.data.source_spec import source_of\nsource_of('digits-lt')\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_deployed_model_reads_images_without_the_settings() -> None:
    code = (
        "import sys, longtail.inference.onnx_model\n"
        "assert not {'torch', 'pydantic', 'tyro', 'longtail.config'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_head_first_and_thirds() -> None:
    assert head_first([5, 100, 1, 100]) == [1, 3, 0, 2]
    assert frequency_thirds([5, 100, 1, 50, 7, 2]) == ["middle", "head", "tail", "head", "middle", "tail"]
    assert frequency_thirds([3, 2, 1, 9]) == ["middle", "middle", "tail", "head"]
    assert frequency_thirds(range(11, 0, -1)) == ["head"] * 4 + ["middle"] * 3 + ["tail"] * 4


def decode(uri: str) -> tuple[str, bytes]:
    kind, _, content = uri.partition(";base64,")
    return kind, base64.b64decode(content)


def test_data_uris(tmp_path: Path) -> None:
    path = save_image(tmp_path / "x.png", (40, 20))
    assert decode(file_data_uri(path)) == ("data:image/png", path.read_bytes())
    assert decode(file_data_uri(save_image(tmp_path / "x.jpg")))[0] == "data:image/jpeg"
    assert encode_data_uri(b"ab", "png") == "data:image/png;base64,YWI="
    image = Image.fromarray(np.zeros((100, 300, 4), np.uint8), "RGBA")
    names: tuple[Literal["PNG", "JPEG"], ...] = ("PNG", "JPEG")
    for name in names:
        kind, content = decode(image_data_uri(image, 60, name))
        shown = Image.open(io.BytesIO(content))
        assert (kind, shown.format, shown.size, shown.mode) == (f"data:image/{name.lower()}", name, (60, 20), "RGB")
        assert shown.getpixel((5, 5)) == (255, 255, 255)  # transparent over white
    assert image.size == (300, 100)
    small = Image.new("RGB", (8, 8), "red")
    assert Image.open(io.BytesIO(decode(image_data_uri(small, 60))[1])).size == (8, 8)


def test_prefetch_computes_one_ahead_in_order() -> None:
    started: list[int] = []
    second = threading.Event()

    def square(value: int) -> int:
        started.append(value)
        if value == 1:
            second.set()
        return value * value

    results = prefetch(square, range(4))
    assert next(results) == (0, 0)
    assert second.wait(10)  # without asking for it
    assert list(results) == [(1, 1), (2, 4), (3, 9)]
    assert started == [0, 1, 2, 3]
    assert list(prefetch(square, ())) == []


def test_prefetch_raises_where_the_function_does() -> None:
    def divide(value: int) -> float:
        return 1 / value

    results = prefetch(divide, [1, 0, 2])
    assert next(results) == (1, 1.0)
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_what_an_argument_stands_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert source_of("digits-lt") == {"source": "digits-lt"}
    assert source_of("hub:user/set") == {"source": "hub", "name": "user/set"}
    assert source_of("a.tsv") == {"source": "list", "train": "a.tsv"}
    # a kind of source is not a path unless there is one
    assert source_of("folder") == {"source": "folder"}
    save_image(tmp_path / "folder" / "cat" / "0.png")
    assert source_of("folder") == {"source": "folder", "root": "folder"}
    # a named set is, whatever folders there are
    (tmp_path / "digits-lt").mkdir()
    assert source_of("digits-lt") == {"source": "digits-lt"}
    (tmp_path / "scenes" / "images").mkdir(parents=True)
    (tmp_path / "scenes" / "annotations").mkdir()
    assert source_of("scenes") == {"source": "masks", "root": "scenes"}
    (tmp_path / "cells" / "images").mkdir(parents=True)
    assert source_of("cells") == {"source": "folder", "root": "cells"}
    (tmp_path / "cells" / "train.json").touch()
    assert source_of("cells") == {"source": "boxes", "root": "cells"}
    (tmp_path / "cells" / "images" / "round").mkdir()  # a class
    assert source_of("cells") == {"source": "folder", "root": "cells"}
    with pytest.raises(LongtailError, match="there is no such folder or set; perhaps you meant digits-lt"):
        source_of("digit-lt")


def test_named_sets_are_registered_sources() -> None:
    assert {"digits-lt", "cifar100-lt", "imagenet-lt"} <= set(named_sets()) < set(SOURCES)
    assert not {"folder", "list", "hub", "masks", "boxes"} & set(named_sets())


@pytest.mark.parametrize(
    ("folders", "files"),
    [
        (["Annotations", "JPEGImages"], []),
        (["images", "labels"], []),
        (["train/images", "train/labels"], []),
        (["train2017", "annotations"], ["annotations/instances_train2017.json"]),
        (["images", "annotations"], ["annotations/train.json"]),
        (["train"], ["train/_annotations.coco.json"]),
    ],
)
def test_folders_of_images_with_boxes(folders: list[str], files: list[str], tmp_path: Path) -> None:
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    for file in files:
        (tmp_path / file).write_text("{}")
    assert source_of(str(tmp_path)) == {"source": "boxes", "root": str(tmp_path)}

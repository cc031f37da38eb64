"""Tests of files as users have them: damaged metadata, links, hidden files, long names, devices as outputs."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from longtail import plots
from longtail.config import Data
from longtail.data.image_io import StorageError, find_images, open_image, open_square, read_shown_size, to_rgb
from longtail.data.paths import visible_files
from longtail.data.sources import load_data
from longtail.errors import LongtailError
from longtail.files import atomic_write, read_lines, write_text
from longtail.inference.label_images import label_pictures, write_label_image
from longtail.inference.pictures import OBJECTS, PictureNames, source_of, write_picture, written_pictures
from tests.conftest import Command
from tests.data.detection.drawn import drawn_images, write_yolo_layout


def images(folder: Path, classes: dict[str, int], side: int = 16) -> Path:
    rng = np.random.default_rng(0)
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / name / f"{number}.png")
    return folder


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # pytest puts its own filter before that of the package
@pytest.mark.parametrize("exif", [b"MM\x84*\x00\x00\x00\x08", b"MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12", b"II*\x00"])
@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg"])
def test_damaged_exif_data_are_ignored(tmp_path: Path, suffix: str, exif: bytes) -> None:
    path = tmp_path / f"x{suffix}"
    Image.new("RGB", (20, 10), "red").save(path, exif=b"Exif\x00\x00" + exif)
    assert to_rgb(open_image(path)).size == (20, 10)
    assert open_square(path, 8).size == (8, 8)
    assert read_shown_size(path) == (20, 10)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_the_shown_size_is_that_of_the_decoded_image(tmp_path: Path, suffix: str) -> None:
    path, exif = tmp_path / f"x{suffix}", Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (20, 10), "red").save(path, exif=exif)
    assert to_rgb(open_image(path)).size == read_shown_size(path) == (10, 20)


@pytest.mark.parametrize(
    ("brand", "name"), [(b"heic", "HEIC"), (b"heix", "HEIC"), (b"mif1", "HEIF"), (b"avif", "AVIF")]
)
def test_photographs_of_phones_are_named(tmp_path: Path, brand: bytes, name: str, command: Command) -> None:
    content = b"\0\0\0\x18ftyp" + brand + bytes(8)
    path = images(tmp_path / "set", {"cat": 6, "dog": 6}) / "cat" / "IMG_1.jpg"  # whatever its name says
    path.write_bytes(content)
    message = f"is in the format {name}, which Pillow does not read here; convert it to JPEG"
    for file in (path, io.BytesIO(content)):
        with pytest.raises(LongtailError, match=message):
            open_image(file)
    assert f"IMG_1.jpg: {message}" in command("inspect", tmp_path / "set")[1]


def test_pictures_of_a_run_are_not_among_the_images(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "photos-la-seed0"
    for folder in (tmp_path / "new", run / "errors"):
        folder.mkdir(parents=True)
        Image.new("RGB", (20, 10)).save(folder / "x.png")
    (run / "config.yaml").write_text(
        "{recipe: folder, method: la, network: a, epochs: 1, batch_size: 2, seed: 0, data: {}, "
        "classifier: {}, teacher: {}}"
    )
    (run / "metrics.jsonl").touch()
    assert find_images([tmp_path]) == [tmp_path / "new" / "x.png"]
    assert find_images([run / "errors"]) == [run / "errors" / "x.png"]


def test_what_a_decoder_raises_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.png"
    Image.new("RGB", (20, 10)).save(path)

    def fails(*_: object) -> None:
        raise RuntimeError("Failed to decode image")

    monkeypatch.setattr(Image.Image, "load", fails)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fails)
    with pytest.raises(LongtailError, match=r"x\.png: is damaged \(Failed to decode image\)"):
        open_image(path)


def test_links_are_followed_and_hidden_files_are_not_images(tmp_path: Path) -> None:
    stored, shown = images(tmp_path / "store", {"a": 2}), tmp_path / "shown"
    (shown / ".cache").mkdir(parents=True)
    (shown / "linked").symlink_to(stored)
    (stored / "a" / "up").symlink_to(shown)  # a circle
    (shown / "broken.png").symlink_to(tmp_path / "nothing")
    for hidden in (shown / "._0.png", shown / ".cache" / "thumb.png"):
        hidden.write_bytes(b"no image")
    expected = [shown / "linked" / "a" / "0.png", shown / "linked" / "a" / "1.png"]
    assert find_images([shown]) == expected
    assert list(visible_files(shown)) == expected


def test_a_link_to_an_output_keeps_pointing_at_it(tmp_path: Path) -> None:
    file, link = tmp_path / "file.txt", tmp_path / "link.txt"
    file.write_text("old")
    link.symlink_to("file.txt")
    write_text(link, "new")
    assert link.is_symlink()
    assert file.read_text() == "new"


def test_an_output_may_be_an_open_file(tmp_path: Path) -> None:
    """As /dev/stdout is one where the output of a command goes into a file."""
    with (tmp_path / "out.txt").open("w") as opened:
        link = tmp_path / "stdout"
        link.symlink_to(f"/proc/self/fd/{opened.fileno()}")
        write_text(link, "text")
    assert (tmp_path / "out.txt").read_text() == "text"
    assert link.is_symlink()


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / f"{'ä' * 120}.json"  # 245 bytes
    write_text(path, "text")
    assert path.read_text() == "text"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    with pytest.raises(LongtailError, match="cannot be written: File name too long"):
        write_text(tmp_path / ("x" * 300), "text")


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tail.png"
    figure = plots.class_histogram(["a", "b"], [3, 1], ["many", "few"], "images")
    plots.save_png(figure, path)
    before = path.read_bytes()
    assert before.startswith(b"\x89PNG")

    def full(partial: Path, **_: object) -> None:
        partial.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", full)
    with pytest.raises(LongtailError, match="No space left on device"):
        plots.save_png(figure, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["tail.png"]


def test_overlays_and_label_images_do_not_overwrite_each_other(tmp_path: Path) -> None:
    out = tmp_path / "out"
    written: list[Path] = []
    labels = np.zeros((8, 8), dtype=np.int64)
    for name in ("a-overlay.png", "a.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
        written += write_label_image(label_pictures(out), tmp_path / name, labels, 2)
    assert len(set(written)) == 4
    with Image.open(out / "a-overlay.png") as label_image:
        assert label_image.mode == "P"
    again = write_label_image(label_pictures(out), tmp_path / "a.png", labels, 2)
    assert list(again) == written[2:]  # of the same image
    (out / "b.png").write_bytes(b"no image")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    assert write_label_image(label_pictures(out), tmp_path / "b.png", labels, 2)[0].name == "b-2.png"
    assert (out / "b.png").read_bytes() == b"no image"


def test_a_segmented_image_may_have_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    file, labels = tmp_path / os.fsdecode(b"caf\xe9.png"), np.zeros((8, 8), dtype=np.int64)
    Image.new("RGB", (8, 8)).save(file)
    written = write_label_image(label_pictures(tmp_path / "out"), file, labels, 2)
    assert written[0].name == file.name
    assert write_label_image(label_pictures(tmp_path / "out"), file, labels, 2) == written  # it is known again


@pytest.mark.parametrize("letter", ["x", "ä", "\udce9"])
def test_pictures_of_an_image_with_a_very_long_name(tmp_path: Path, letter: str) -> None:
    stem, labels = letter * (248 // len(os.fsencode(letter))), np.zeros((8, 8), dtype=np.int64)
    written: list[Path] = []
    for name in (f"{stem}.png", f"{stem}.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
        written += write_label_image(label_pictures(tmp_path / "out"), tmp_path / name, labels, 2)
        written += PictureNames(tmp_path / "out", [OBJECTS]).paths(tmp_path / name)
        write_picture(written[-1], Image.new("RGB", (8, 8)), tmp_path / name)
    assert len(set(written)) == len(list((tmp_path / "out").iterdir())) == 6
    assert {path.name.partition("-")[0].removesuffix(".png") for path in written} == {stem[: 200 // (248 // len(stem))]}


def test_images_of_one_name_look_at_each_picture_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / f"class_{number}" / "1.jpg" for number in range(12)]
    looked_at: list[Path] = []

    def watched(path: Path) -> str | None:
        looked_at.append(path)
        return source_of(path)

    monkeypatch.setattr("longtail.inference.pictures.source_of", watched)
    out = tmp_path / "out"

    def write(files: list[Path]) -> list[str]:
        pictures, names = PictureNames(out, [OBJECTS]), []
        for file in files:
            (path,) = pictures.paths(file)
            write_picture(path, Image.new("RGB", (8, 8)), file)
            names.append(path.name)
        return names

    names = ["1-objects.jpg", *(f"1-{number}-objects.jpg" for number in range(2, 13))]
    assert write(files) == names
    assert not looked_at
    # the next command finds the picture of each image, in any order
    for order in (1, -1):
        looked_at.clear()
        assert write(files[::order]) == names[::order]
        assert len(looked_at) == 12
    Image.new("RGB", (8, 8)).save(out / names[3])  # now another program's
    assert write(files[2:5]) == [names[2], "1-13-objects.jpg", names[4]]


def test_pictures_that_predictions_wrote_are_told_from_photos(tmp_path: Path) -> None:
    """Also where a photo has such a name, or a text about its source, as cameras and scanners write them."""
    photo, out = tmp_path / "a.png", tmp_path / "out"
    Image.new("RGB", (8, 8)).save(photo)
    (overlaid, overlay), alone = (
        write_label_image(label_pictures(out / name), photo, np.zeros((8, 8), int), 2) for name in "xy"
    )
    alone[1].unlink()
    (drawing,) = PictureNames(out, [OBJECTS]).paths(photo)
    write_picture(drawing, Image.new("RGB", (8, 8)), photo)
    assert source_of(drawing) == source_of(overlay) == str(photo.resolve())
    Image.new("RGB", (8, 8)).save(out / f"b{OBJECTS}", comment="Source: a camera")
    texts = PngInfo()
    texts.add_text("Source", "Scanner 3000")
    Image.new("RGB", (8, 8)).save(out / "b-overlay.png", pnginfo=texts)
    files = find_images([tmp_path])
    assert len(files) == 7
    assert written_pictures(files, None) == {overlaid, overlay, drawing}
    assert written_pictures(files, out / "y") == {overlaid, overlay, drawing, alone[0]}  # its overlay was deleted


def test_lines_have_no_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbfsky\r\nroad\r\n")
    assert read_lines(tmp_path / "classes.txt") == ["sky", "road"]


def test_a_file_for_a_split_holds_that_split_alone(tmp_path: Path, command: Command) -> None:
    root = images(tmp_path / "set", {"a": 6, "b": 4})
    names = [f"{name}/{number}.png,{name}" for name, count in {"a": 6, "b": 4}.items() for number in range(count)]
    train, test = tmp_path / "train.csv", tmp_path / "test.csv"
    train.write_text("\n".join(["path,label,split", *(f"{row},train" for row in names[:8]), f"{names[8]},test"]))
    test.write_text("\n".join(["path,label,split", f"{names[9]},train"]))
    flags = ("--data.root", str(root))
    for rows, message in (
        ([f"{names[9]},train"], "is given as data.test, but its column of splits has rows of train"),
        ([f"{names[9]},test"], "has rows of test, which data.test gives too; leave one out"),
    ):
        test.write_text("\n".join(["path,label,split", *rows]))
        code, _, err = command("inspect", train, "--data.test", test, *flags)
        assert code == 2
        assert err.count("\n") == 1
        if "train" in message:
            assert message in err
        else:
            assert "test" in err
    train.write_text("\n".join(["path,label,split", *(f"{row},train" for row in names[:8])]))
    code, out, err = command("inspect", train, "--data.test", test, *flags)
    assert code == 0, err
    assert "train 8, test 1" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "SET", "--data.test", "te.csv"], "data.test: is for lists and tables"),
        (["inspect", "SET", "--data.label_column", "zz"], "data.label_column: is for lists and tables"),
        (["split", "SET", "--val", "nan"], "expected fractions"),
        (["inspect", "x" * 300], "File name too long"),
        (["report", "SET", "SET", "--out", "page.html"], "a run is given twice"),
        (["report", "SET", "SET/a", "--out", "precious.jpg"], "expected a name that ends in .html"),
    ],
)
def test_what_would_be_ignored_is_refused(tmp_path: Path, command: Command, arguments: list[str], message: str) -> None:
    images(tmp_path / "set", {"a": 3, "b": 3})
    code, out, err = command(*(argument.replace("SET", str(tmp_path / "set")) for argument in arguments))
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert out == ""


def test_embed_names_what_it_leaves_out(tmp_path: Path, command: Command) -> None:
    root = images(tmp_path / "set", {"a": 60, "b": 60})
    (root / "a" / "7.png").write_bytes((root / "a" / "7.png").read_bytes()[:200])
    code, _, err = command(
        *("embed", root, "--model", "resnet8", "--pretrained", "none", "--out", tmp_path / "e.npz"),
        *("--json", tmp_path / "e.json"),
    )
    assert code == 0, err
    assert "1 image cannot be read, and left out; the first: " in err
    assert json.loads((tmp_path / "e.json").read_text())["unreadable"] == ["a/7.png"]


def test_a_class_may_be_called_nan(tmp_path: Path, command: Command) -> None:
    root, table = images(tmp_path / "my set", {"nan": 6, "b": 6}), tmp_path / "my split.csv"
    code, out, err = command("split", root, "--out", table)
    assert code == 0, err
    assert f"longtail train --data '{table}' --data.root '{root}'" in out
    code, out, err = command("inspect", table, "--data.root", root)
    assert code == 0, err
    assert "nan" in out


def test_a_full_disk_under_the_output_is_one_line(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        code = "import sys; from longtail.cli.app import main; main(sys.argv[1:])"
        done = subprocess.run(
            [sys.executable, "-c", code, "recipes"], stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path
        )
    assert done.returncode == 2
    assert done.stderr == "longtail: error: No space left on device\n"


def test_atomic_write_of_a_folder_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(LongtailError, match="cannot be written"):
        atomic_write(tmp_path / "none" / "x.txt", lambda partial: partial.write_text("x"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("number", "kind", "told"),
    [
        (errno.EIO, StorageError, "cannot be read: Input/output error"),
        (errno.EMFILE, StorageError, "cannot be read: Too many open files"),
        (errno.EACCES, LongtailError, "cannot be read: Permission denied"),
        (errno.ELOOP, LongtailError, "cannot be read: Too many levels of symbolic links"),
        (errno.EINVAL, LongtailError, r"is damaged \(.*\); remove or replace it"),  # a decoder sought a wrong position
    ],
)
def test_what_the_system_raises_is_told_from_a_damaged_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[LongtailError], told: str
) -> None:
    monkeypatch.setattr(Image, "open", failing(number))
    with pytest.raises(LongtailError, match=rf"x\.png: {told}$") as raised:
        open_image(tmp_path / "x.png")
    assert raised.type is kind


def failing(number: int) -> Callable[..., object]:
    def fails(*_: object, **_options: object) -> object:
        raise OSError(number, os.strerror(number))

    return fails


@pytest.mark.parametrize("memory", [4.0, 1e-9])
def test_no_image_is_left_out_because_the_disk_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: float
) -> None:
    root = images(tmp_path / "set", {"a": 6, "b": 6})
    settings = Data(source="folder", root=str(root), image_size=16, memory_gib=memory, max_unreadable_fraction=0.9)
    settings = dataclasses.replace(settings, cache="none")
    data = load_data(settings, 0)
    monkeypatch.setattr(Image, "open", failing(errno.EIO))
    with pytest.raises(StorageError, match=r"cannot be read: Input/output error$"):
        load_data(settings, 0)
    if memory < 1:
        with pytest.raises(StorageError, match=r"cannot be read: Input/output error$"):
            data.train.images.take(torch.tensor([0]))
        assert not data.train.images.unreadable


def test_no_mask_and_no_image_with_boxes_is_left_out_because_the_disk_fails(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boxes = write_yolo_layout(tmp_path, {"train": drawn_images(4), "val": drawn_images(4)})
    monkeypatch.setattr(Image, "open", failing(errno.EIO))
    for source, root in (("masks", scenes), ("boxes", boxes)):
        with pytest.raises(StorageError, match=r"cannot be read: Input/output error$"):
            load_data(Data(source=source, root=str(root), max_unreadable_fraction=0.9), 0)

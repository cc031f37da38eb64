from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from longtail.data.image_io import find_images, open_image, open_square, resize_center_crop, to_rgb
from longtail.errors import LongtailError


def photo(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """An image with detail at every scale: noise at several resolutions."""
    rng, total = np.random.default_rng(seed), np.zeros((size[1], size[0], 3))
    for cells in (4, 16, 64, 256):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += np.asarray(noise.resize(size, Image.Resampling.BICUBIC), dtype=np.float64)
    return Image.fromarray((total / 4).round().astype(np.uint8))


def difference(path: Path, size: int, channels: int = 3) -> float:
    """Return the largest difference between the square and that of the file at its full size."""
    square, full = open_square(path, size, channels), resize_center_crop(open_image(path), size, channels)
    assert (square.mode, square.size) == (full.mode, full.size)
    return float(np.abs(np.asarray(square, dtype=np.float64) - np.asarray(full, dtype=np.float64)).max())


@pytest.mark.parametrize(
    ("size", "side", "decoded"),
    [
        ((1024, 768), 64, (256, 192)),
        ((1024, 768), 192, (512, 384)),
        ((1024, 768), 193, (1024, 768)),  # half of it is less than twice the side
        ((1021, 767), 47, (128, 96)),  # rounded up
        ((767, 1021), 8, (96, 128)),  # libjpeg's smallest scale is 1/8
        ((40, 30), 32, (40, 30)),
    ],
)
def test_a_jpeg_file_is_decoded_at_the_size_that_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], side: int, decoded: tuple[int, int]
) -> None:
    path = tmp_path / "x.jpg"
    sizes: list[tuple[int, int]] = []
    photo(size).save(path, quality=90)

    load = JpegImageFile.load

    def recorded(image: JpegImageFile) -> object:
        if image.tile:  # it is not decoded yet
            sizes.append(image.size)
        return load(image)

    monkeypatch.setattr(JpegImageFile, "load", recorded)
    assert open_square(path, side).size == (side, side)
    assert sizes == [decoded]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_rotated_jpeg_file_gives_the_same_square(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo((401, 299)).save(tmp_path / "x.jpg", exif=exif, quality=95)
    assert difference(tmp_path / "x.jpg", 32) <= 6
    assert difference(tmp_path / "x.jpg", 149) <= 6
    assert difference(tmp_path / "x.jpg", 256) == 0  # larger than the file


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"optimize": True, "quality": 60}])
def test_every_kind_of_jpeg_file_gives_the_same_square(tmp_path: Path, mode: str, options: dict[str, int]) -> None:
    photo((400, 300)).convert(mode).save(tmp_path / "x.jpg", **options)  # type: ignore[arg-type]
    assert difference(tmp_path / "x.jpg", 64) <= 6
    assert difference(tmp_path / "x.jpg", 64, channels=1) <= 6


def test_a_file_of_several_photographs_gives_the_first(tmp_path: Path) -> None:
    photo((400, 300)).save(tmp_path / "x.mpo", save_all=True, append_images=[photo((400, 300), seed=1)])
    (tmp_path / "x.mpo").rename(tmp_path / "x.jpg")
    assert difference(tmp_path / "x.jpg", 64) <= 6


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_other_files_are_decoded_whole(tmp_path: Path, mode: str) -> None:
    photo((200, 150)).convert("L" if mode == "I;16" else mode).convert(mode).save(tmp_path / "x.png")
    assert difference(tmp_path / "x.png", 32) == 0


def test_a_stream_is_read_as_a_file_is(tmp_path: Path) -> None:
    photo((400, 300)).save(tmp_path / "x.jpg")
    stream = io.BytesIO((tmp_path / "x.jpg").read_bytes())
    assert open_square(stream, 64).tobytes() == open_square(tmp_path / "x.jpg", 64).tobytes()


@pytest.mark.parametrize("content", [b"", b"hello", "half"])
def test_a_bad_file_is_refused_as_at_its_full_size(tmp_path: Path, content: bytes | str) -> None:
    path = tmp_path / "x.jpg"
    photo((400, 300)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if isinstance(content, str) else content)
    with pytest.raises(LongtailError, match=r"x\.jpg: is ") as full:
        open_image(path)
    with pytest.raises(LongtailError, match=r"x\.jpg: is ") as square:
        open_square(path, 32)
    assert str(square.value) == str(full.value)
    with pytest.raises(LongtailError, match=r"^row 3: "):
        open_square(io.BytesIO(path.read_bytes()), 32, name="row 3")
    with pytest.raises(LongtailError, match=r"gone\.jpg: cannot be read: No such file"):
        open_square(tmp_path / "gone.jpg", 32)


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        ([0.0, 0.5, 1.0], np.float32, [0, 128, 255]),
        ([0.0, 128.0, 255.0], np.float32, [0, 128, 255]),
        ([0, 128, 255], np.int32, [0, 128, 255]),
        ([0, 257, 65535], np.int32, [0, 1, 255]),
        ([0.0, 25700.0, 65535.0], np.float32, [0, 100, 255]),
        ([0, 1, 257], np.uint16, [0, 0, 1]),
    ],
)
def test_grey_images_of_more_bits_are_scaled_by_their_range(
    tmp_path: Path, values: list[float], dtype: type, expected: list[int]
) -> None:
    Image.fromarray(np.array([values], dtype=dtype)).save(tmp_path / "x.tiff")
    assert np.array(to_rgb(open_image(tmp_path / "x.tiff"), channels=1)).tolist() == [expected]


@pytest.mark.parametrize("value", [np.nan, -1.0, 1e6])
def test_values_of_an_unknown_range_are_refused(tmp_path: Path, value: float) -> None:
    Image.fromarray(np.array([[0.0, value]], dtype=np.float32)).save(tmp_path / "x.tiff")
    for read in (open_image, lambda path: open_square(path, 8)):
        with pytest.raises(LongtailError, match=r"x\.tiff: has values from .*; save it with 8 or 16 bits"):
            read(tmp_path / "x.tiff")


def test_images_are_read_without_changing_filters_of_warnings(tmp_path: Path) -> None:
    """In another process, as pytest has filters of its own."""
    photo((40, 30)).save(tmp_path / "large.png")
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12"  # damaged
    photo((20, 30)).save(tmp_path / "exif.jpg", exif=exif)
    code = """if True:
        import sys, warnings
        from concurrent.futures import ThreadPoolExecutor
        from pathlib import Path
        from PIL import Image
        from longtail.data.image_io import image_errors, open_image, read_or_record
        Image.MAX_IMAGE_PIXELS, reasons, before = 1000, {}, list(warnings.filters)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda path: read_or_record(open_image, Path(path), reasons), 20 * sys.argv[1:]))
        one, other = image_errors("one"), image_errors("other")  # entered and left as two threads may
        for context in (one, other):
            context.__enter__()
        for context in (one, other):
            context.__exit__(None, None, None)
        assert warnings.filters == before
        print(*reasons.values())
    """
    command = [sys.executable, "-c", code, str(tmp_path / "large.png"), str(tmp_path / "exif.jpg")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.stderr
    assert "large.png: is larger than Pillow decodes safely (Image size (1200 pixels) exceeds" in done.stdout
    assert "exif.jpg" not in done.stdout


def test_files_that_are_no_images_by_their_names_are_told(tmp_path: Path) -> None:
    for name in ("a.png", "b.heic", "c.CR2", ".hidden"):
        photo((8, 8)).save(tmp_path / name, format="png")
    (tmp_path / "compared").mkdir()  # without any picture
    (tmp_path / "compared" / "comparison.json").write_text('{"format": 1, "recipe": {}}')
    left_out: list[Path] = []
    assert find_images([tmp_path], left_out) == [tmp_path / "a.png"]
    assert [path.name for path in left_out] == ["b.heic", "c.CR2"]


def test_an_image_in_lab_colours_is_read_as_grey(tmp_path: Path) -> None:
    path = tmp_path / "x.tiff"
    image = Image.frombytes("LAB", (30, 20), np.random.default_rng(0).integers(0, 256, 1800, dtype=np.uint8).tobytes())
    image.save(path)
    grey = to_rgb(open_image(path), channels=1)
    assert grey.mode == "L"
    assert np.array_equal(np.asarray(grey), np.asarray(image.convert("RGB").convert("L")))

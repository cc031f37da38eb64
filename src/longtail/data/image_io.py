"""Reading image files with Pillow. Imports no torch, so that a deployed model need not either."""

from __future__ import annotations

import contextlib
import errno
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError, features

from longtail.data.paths import find_path, printable, visible_files
from longtail.errors import LongtailError
from longtail.run_folder import is_written

Read = TypeVar("Read")

_CLEAN = 2  # times the side that is wanted; what a JPEG file's own scaling loses is then invisible after the reduction
_ROWS = 256  # that are scaled to 8 bits at once
_ORIENTATION, _ROTATED = 0x0112, frozenset({5, 6, 7, 8})  # Exif: those that exchange width and height

# once, not while an image is read: filters are those of all threads. The second is the last of them, as a program that
# uses this package may have its own
warnings.filterwarnings("ignore", "Corrupt EXIF data", UserWarning)  # the pixels are as good without
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning, append=True)  # open_header refuses these

_OPTIONAL = {"AVIF": "avif", "JPEG2000": "jpg_2000", "WEBP": "webp"}
"""Formats that Pillow decodes where it was built with a library."""
_HEIF_BRANDS = dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"), "HEIC") | {
    b"mif1": "HEIF",
    b"msf1": "HEIF",
    b"avif": "AVIF",
    b"avis": "AVIF",
}
"""Formats by the brand in the first bytes of a file: ``ftyp`` and the brand, from the fifth on."""
_NO_IMAGES = frozenset({"EPS", "MPEG"})
"""Formats that Pillow recognises, but does not decode by itself."""


@functools.cache
def image_formats() -> tuple[str, ...]:
    """Return the names of the formats that Pillow decodes here by itself, without running another program."""
    Image.preinit()  # the common formats, which are tried first then
    Image.init()

    def decodes(name: str) -> bool:
        if name in _NO_IMAGES or not features.check(_OPTIONAL.get(name, "pil")):
            return False
        factory = Image.OPEN[name][0]
        return not (isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile))

    return tuple(name for name in Image.OPEN if decodes(name))


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Return the file name suffixes, in lower case, of the formats that Pillow decodes here."""
    formats = set(image_formats())
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def is_image_name(name: str) -> bool:
    """Return whether a file is treated as an image, by its name."""
    return Path(name).suffix.lower() in image_suffixes()


def find_images(paths: Iterable[Path], left_out: list[Path] | None = None) -> list[Path]:
    """Return the given files, and the images below the given folders in order of name, without those of runs.

    Args:
        paths: files and folders.
        left_out: takes the other files of the folders, which are no images by their names.

    Raises:
        LongtailError: a path does not exist, or a folder contains no images.
    """
    files: list[Path] = []
    for given in paths:
        path = find_path(given)
        if path.is_dir():
            visible = sorted(visible_files(path))
            folders = {parent for file in visible for parent in file.parents if path in parent.parents}
            written = {folder for folder in folders if is_written(folder)}  # a run's report has pictures of its own
            visible = [file for file in visible if written.isdisjoint(file.parents)]
            inside = [file for file in visible if is_image_name(file.name)]
            if left_out is not None:
                left_out += [file for file in visible if not is_image_name(file.name)]
            if not inside:
                raise LongtailError(f"{path}: holds no images")
            files += inside
        elif path.exists():
            files.append(path)
        else:
            raise LongtailError(f"{path}: there is no such file or folder")
    return files


def read_or_record(read: Callable[[Path], Read], path: Path, unreadable: dict[Path, str] | None) -> Read | None:
    """Return ``read(path)``, or None where the file cannot be read and there is a mapping that takes the reason.

    Args:
        read: opens and decodes a file, or raises LongtailError.
        path: the file.
        unreadable: takes the path and the reason; if None, the error is raised.
    """
    try:
        return read(path)
    except LongtailError as error:
        if unreadable is None:
            raise
        unreadable[path] = str(error)
        return None


class StorageError(LongtailError):
    """The computer or the storage fails while an image is read: it says nothing of the image, and is no reason to leave
    it out.
    """


_STORAGE_FAILURES = frozenset(
    {
        *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN),
        *(errno.EMFILE, errno.ENFILE, errno.ENOMEM),
    }
)


def read_error(error: OSError) -> LongtailError:
    """Return the error to raise for one of the operating system over an image's file; its message names no file."""
    message = f"cannot be read: {error.strerror or error}"
    return StorageError(message) if error.errno in _STORAGE_FAILURES else LongtailError(message)


class UnsupportedFormatError(UnidentifiedImageError):
    """A file has a known format that Pillow does not decode here; the message says which, and what to do."""


def _raise_if_heif(file: Path | BinaryIO) -> None:
    """Raise UnsupportedFormatError for a file in the container of HEIC and AVIF, as phones write it."""
    try:
        if isinstance(file, Path):
            with file.open("rb") as opened:
                start = opened.read(12)
        else:
            file.seek(0)
            start = file.read(12)
    except OSError:
        return
    if start[4:8] == b"ftyp" and (name := _HEIF_BRANDS.get(start[8:12])) is not None:
        raise UnsupportedFormatError(f"is in the format {name}, which Pillow does not read here; convert it to JPEG")


def open_header(file: Path | BinaryIO) -> ImageFile.ImageFile:
    """Open an image file without decoding it, as ``Image.open`` does, in the formats that Pillow decodes by itself.

    Raises:
        DecompressionBombError: it has more pixels than ``Image.MAX_IMAGE_PIXELS``, above which Pillow warns.
        UnidentifiedImageError: it is in no such format; UnsupportedFormatError where its own is known.
    """
    try:
        image = Image.open(file, formats=image_formats())
    except UnidentifiedImageError:
        _raise_if_heif(file)
        raise
    pixels, most = image.width * image.height, Image.MAX_IMAGE_PIXELS
    if most is not None and pixels > most:
        image.close()
        raise Image.DecompressionBombError(f"Image size ({pixels} pixels) exceeds limit of {most} pixels")
    return image


def open_image(file: Path | BinaryIO, name: str | None = None) -> Image.Image:
    """Open and decode an image file.

    Args:
        file: its path, or its content as a binary stream.
        name: of the image in messages; the path if not given.

    Raises:
        LongtailError: the file is missing, empty, damaged, no image, or larger than Pillow decodes safely, or the range
            of its values is no usual one.
    """
    with image_errors(_name(file, name)), open_header(file) as image:
        image.load()
        scale_to_8_bits(image)
    return image


def open_square(file: Path | BinaryIO, size: int, channels: int = 3, name: str | None = None) -> Image.Image:
    """Open an image file as the square that :func:`resize_center_crop` makes of it; decodes no more than it needs.

    A JPEG file is decoded at 1/2, 1/4 or 1/8 of its size where both sides stay at least twice ``size``: several times
    faster, and pixel values differ from those of the full decoding by less than one on average.

    Args:
        file: its path, or its content as a binary stream.
        size: side of the square in pixels.
        channels: see :func:`to_rgb`.
        name: of the image in messages; the path if not given.

    Raises:
        LongtailError: as :func:`open_image` does.
    """
    with image_errors(_name(file, name)), open_header(file) as image:
        whole = image.size
        draft = image.draft(None, (_CLEAN * size, _CLEAN * size))
        image.load()
        scale_to_8_bits(image)
    if draft is None or image.size == whole:
        return resize_center_crop(image, size, channels)
    # the last row and column may be decoded from fewer pixels than the others: the sides are fractions
    width, height = draft[1][2:]
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    square = image.convert("RGB" if channels == 3 else "L").resize((size, size), Image.Resampling.BICUBIC, box)
    return resize_center_crop(square, size, channels)  # which rotates it by its EXIF tag


def _name(file: Path | BinaryIO, name: str | None) -> Path | str:
    return name or (file if isinstance(file, Path) else "the image")


def read_size(path: Path) -> tuple[int, int]:
    """Return an image file's width and height in pixels from its header; raises as :func:`open_image` does."""
    with image_errors(path), open_header(path) as image:
        return image.size


def read_shown_size(path: Path) -> tuple[int, int]:
    """Return width and height as :func:`read_size` does, of the image as its Exif tag rotates it."""
    with image_errors(path), open_header(path) as image:
        return shown_size(image.size, _header_orientation(image))


def read_orientation(path: Path) -> tuple[tuple[int, int], int]:
    """Return width and height of an image as it is stored, and its :func:`orientation`, from its header."""
    with image_errors(path), open_header(path) as image:
        return image.size, _header_orientation(image)


def _header_orientation(image: Image.Image) -> int:
    # of a PNG file without Exif in its header, asking for it would decode the whole image; of a TIFF file Pillow gives
    # the size of the rotated image
    has_exif = "exif" in image.info or image.format != "PNG"
    return orientation(image) if image.format != "TIFF" and has_exif else 1


def shown_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Return width and height of an image of some :func:`orientation`, as it is shown, from those that are stored."""
    return size[::-1] if orientation in _ROTATED else size


def transposed(image: Image.Image) -> Image.Image:
    """Return a copy of an image as its Exif tag rotates it; as it is stored where the Exif data are damaged."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Pillow's reader raises errors of many kinds
        image = image.copy()
        image.info.pop("exif", None)
        return image


def oriented_as(image: Image.Image, other: Image.Image) -> Image.Image:
    """Return another image turned as the Exif tag of the first turns that one, see :func:`transposed`."""
    copy = other.copy()
    copy.getexif()[_ORIENTATION] = orientation(image)
    return transposed(copy)


def orientation(image: Image.Image) -> int:
    """Return the orientation in the Exif data, 2 to 8; 1, as it is stored, where they have none or are damaged."""
    try:
        value = image.getexif().get(_ORIENTATION)
    except Exception:  # see above
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


@contextlib.contextmanager
def image_errors(path: Path | str) -> Iterator[None]:
    """Turn what Pillow and the operating system raise while an image is read into a LongtailError of one line.

    Args:
        path: the file, or a description of the image; the message begins with it.

    Raises:
        LongtailError: the image cannot be read.
        StorageError: that is not the image's fault.
    """
    name = printable(path)
    try:
        yield
    except _RangeError as error:
        raise LongtailError(f"{name}: {error}") from None
    except UnsupportedFormatError as error:
        raise LongtailError(f"{name}: {error}") from None
    except UnidentifiedImageError:
        empty = isinstance(path, Path) and path.stat().st_size == 0
        what = "is empty" if empty else "is not an image that Pillow can read"
        raise LongtailError(f"{name}: {what}; remove or replace it") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise LongtailError(f"{name}: is larger than Pillow decodes safely ({error}); shrink it") from None
    except Exception as error:  # of a damaged file, Pillow's decoders raise errors of many kinds
        if isinstance(error, LongtailError | MemoryError):
            raise
        # decoders' own errors have no number, and a position of a damaged file that there is not is an invalid argument
        if isinstance(error, OSError) and error.errno not in {None, errno.EINVAL}:
            told = read_error(error)
            raise type(told)(f"{name}: {told}") from None
        raise LongtailError(f"{name}: is damaged ({' '.join(str(error).split())}); remove or replace it") from None


def resize_center_crop(image: Image.Image, size: int, channels: int = 3) -> Image.Image:
    """Return the image as a square: its shorter side resized to ``size`` pixels (bicubic), then the centre cropped.

    Args:
        image: any Pillow image.
        size: side of the square in pixels.
        channels: see :func:`to_rgb`.
    """
    image = to_rgb(image, channels)
    return image if image.size == (size, size) else ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)


def to_rgb(image: Image.Image, channels: int = 3) -> Image.Image:
    """Return a copy of the image as 8-bit RGB or grey: rotated by its EXIF tag, transparency over white.

    Args:
        image: any Pillow image. 16-bit images are scaled to 8 bits; so are float and 32-bit ones, by their largest
            value: up to 1, up to 255, or up to 65,535.
        channels: 3 for RGB, 1 for grey.

    Raises:
        LongtailError: a float or 32-bit image has other values.
    """
    image = transposed(image)
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow's own conversion clips 16-bit values to white
        values, scale = np.asarray(image), scale_to_8_bits(image)
        scaled = np.empty(values.shape, dtype=np.uint8)
        for rows in range(0, len(values), _ROWS):  # as float64 all of a large image would take eight bytes a pixel
            scaled[rows : rows + _ROWS] = (values[rows : rows + _ROWS] * np.float64(scale)).clip(0, 255).round()
        image = Image.fromarray(scaled)
    elif image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    elif image.mode == "LAB":
        image = image.convert("RGB")  # Pillow has no conversion to grey
    mode = "RGB" if channels == 3 else "L"
    return image if image.mode == mode else image.convert(mode)


class _RangeError(LongtailError):
    """An image has values whose range is no usual one; the message does not name it."""


def scale_to_8_bits(image: Image.Image) -> float:
    """Return the factor that brings the values of a grey image of more than 8 bits to 0 … 255; 1 for any other.

    Raises:
        LongtailError: the range of its values is no usual one.
    """
    if image.mode.startswith("I;16"):
        return 1 / 257
    if image.mode not in {"I", "F"}:
        return 1.0
    values = np.asarray(image)
    low, high = float(values.min(initial=0)), float(values.max(initial=0))
    if not (low >= 0 and high <= 65_535):  # also NaN
        raise _RangeError(
            f"has values from {low:.4g} to {high:.4g}, expected 0 to 1, to 255 or to 65,535; save it with 8 or 16 bits"
        )
    if high <= 1 and image.mode == "F":
        return 255.0
    return 1.0 if high <= 255 else 1 / 257

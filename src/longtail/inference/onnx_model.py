"""Prediction with an exported ONNX file, without torch.

Legend: N images, C classes, K objects of an image, H, W sides in pixels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from longtail.data.image_io import open_image, open_square, read_or_record, resize_center_crop, to_rgb
from longtail.data.letterbox import boxes_in_image, letterbox
from longtail.errors import LongtailError
from longtail.evaluation.class_frequencies import ClassFrequencies, resolve_class_frequencies
from longtail.inference.options import check_batch_size

Array = np.ndarray[Any, Any]
ImageInput = Path | str | Image.Image | Array
"""A file, a Pillow image, or an array (H, W) or (H, W, channels) of uint8."""


class Objects(NamedTuple):
    """What a model finds in an image, the highest score first."""

    boxes: Array
    """(K, 4) float32 x1, y1, x2, y2 in pixels of the image."""
    labels: Array
    """(K,) int64 in [0, C)."""
    scores: Array
    """(K,) float32."""


class ONNXModel:
    """A file that ``longtail export`` wrote, run by onnxruntime.

    Args:
        path: of the file.
        providers: execution providers of onnxruntime, the preferred first, such as ``["CUDAExecutionProvider",
            "CPUExecutionProvider"]``; the CPU if not given.
        session_options: an ``onnxruntime.SessionOptions``, such as for the number of threads; messages below errors are
            switched off if not given.

    Raises:
        LongtailError: the extra is missing, the file is not one of longtail's, or onnxruntime lacks a provider.
    """

    def __init__(
        self,
        path: Path | str,
        providers: Sequence[str | tuple[str, dict[str, Any]]] | None = None,
        session_options: Any = None,
    ) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise LongtailError(f"{path}: needs the extra onnx: pip install 'longtail[onnx]'") from None
        if not Path(path).is_file():
            raise LongtailError(f"{path}: there is no such file")
        if isinstance(providers, str):
            providers = [providers]
        available = onnxruntime.get_available_providers()
        for provider in providers or ():
            name = provider if isinstance(provider, str) else provider[0]
            if name not in available:
                raise LongtailError(f"providers: {name} is not available, expected some of {', '.join(available)}")
        if session_options is None:
            session_options = onnxruntime.SessionOptions()
            session_options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), session_options, providers=list(providers or ["CPUExecutionProvider"])
            )
        except Exception as error:  # of several kinds, none of them public
            raise LongtailError(f"{path}: is no ONNX model: {' '.join(str(error).split())[:200]}") from None
        metadata = self._session.get_modelmeta().custom_metadata_map.get("longtail")
        if metadata is None:
            raise LongtailError(f"{path}: is another program's model: expected a file that longtail export wrote")
        info = json.loads(metadata)
        self.label_maps: bool = info["label_maps"]
        self.finds_objects: bool = info.get("finds_objects", False)
        self.class_names: list[str] = info["class_names"]
        self.class_counts: list[int] = info["class_counts"]
        self.channels: int = info["channels"]
        self.shape: tuple[int, int] = tuple(info["shape"])
        self.stored_size: int = info["stored_size"]
        self.prior: str | list[float] = info["prior"]
        self.tta: str = info.get("tta", "none")
        """Test-time augmentation that is part of the file."""
        self.score_threshold: float = info.get("score_threshold", 0.0)
        """Lowest score of an object that the file returns, where it finds objects."""
        self._fill: tuple[int, int, int] = tuple(info.get("fill", (0, 0, 0)))

    def predict(
        self,
        images: ImageInput | Iterable[ImageInput],
        batch_size: int = 256,
        unreadable: dict[Path, str] | None = None,
    ) -> Array:
        """Return probabilities, (N, C); of a model that labels pixels, (N, C, H, W) at its own size.

        Of a model that finds objects use :meth:`find`.

        Args:
            images: files, Pillow images or arrays of uint8, (H, W) or (H, W, channels), of any size; one of them, or
                several. An array of four dimensions is several.
            batch_size: images at a time.
            unreadable: takes the path of every file that cannot be read, with the reason; there is no prediction for
                it then. If not given, such a file is an error.

        Raises:
            LongtailError: the model finds objects, a file cannot be read, an array is no image, or there are no images
                in a batch.
        """
        parts = list(self.predict_batches(images, batch_size, unreadable))
        return np.concatenate(parts) if parts else np.empty((0, len(self.class_names)), dtype=np.float32)

    def predict_batches(
        self,
        images: ImageInput | Iterable[ImageInput],
        batch_size: int = 256,
        unreadable: dict[Path, str] | None = None,
    ) -> Iterator[Array]:
        """Yield what :meth:`predict` returns, a batch of images at a time, for more images than fit into memory.

        Args:
            images: see :meth:`predict`.
            batch_size: images at a time.
            unreadable: see :meth:`predict`; an image of a batch that is to come is not in it yet.

        Raises:
            LongtailError: as :meth:`predict`.
        """
        if self.finds_objects:
            raise LongtailError("predict: this model finds objects; use find")
        check_batch_size(batch_size)
        batch: list[Array] = []
        for image in _several(images):
            opened = _opened(image, self._open, unreadable)
            if opened is None:
                continue
            batch.append(self._preprocess(opened))
            if len(batch) == batch_size:
                yield self._run(batch)
                batch = []
        if batch:
            yield self._run(batch)

    def segment(self, image: ImageInput, prior: ClassFrequencies | None = None) -> Array:
        """Return the most probable class of every pixel, (H, W) int64, of a model that labels pixels.

        The image is resized to the file's size, and the probabilities are resized back (bilinear).

        Args:
            image: a file, Pillow image or array of uint8, of any size.
            prior: class frequencies, see :meth:`change_prior`; those in the file if not given.

        Raises:
            LongtailError: the model does not label pixels, the frequencies do not fit the classes, or the file cannot
                be read.
        """
        if not self.label_maps:
            raise LongtailError("segment: this model does not label pixels; use predict or find")
        opened = _opened(image, open_image, None)
        assert opened is not None
        image = to_rgb(opened)
        (probabilities,) = self._run([self._preprocess(image)])
        if prior is not None:
            rows = probabilities.reshape(len(self.class_names), -1).T
            probabilities = self.change_prior(rows, prior).T.reshape(probabilities.shape)
        labels, best = np.zeros(image.size[::-1], dtype=np.int64), np.zeros(image.size[::-1], dtype=np.float32)
        for index, plane in enumerate(probabilities):  # one class at a time: there may be hundreds
            resized = Image.fromarray(plane.astype(np.float32)).resize(image.size, Image.Resampling.BILINEAR)
            values = np.asarray(resized)
            labels[values > best] = index
            best = np.maximum(best, values)
        return labels

    def find(
        self, images: ImageInput | Iterable[ImageInput], unreadable: dict[Path, str] | None = None
    ) -> Iterator[Objects]:
        """Yield the objects of images, image by image, of a model that finds objects.

        Args:
            images: see :meth:`predict`.
            unreadable: see :meth:`predict`.

        Raises:
            LongtailError: a file cannot be read, or the model finds no objects.
        """
        if not self.finds_objects:
            raise LongtailError("find: this model classifies; use predict")
        for each in _several(images):
            opened = _opened(each, open_image, unreadable)
            if opened is None:
                continue
            image, side = to_rgb(opened), self.shape[0]
            square = np.array(letterbox(image, side, self._fill)[0])
            boxes, labels, scores = self._session.run(None, {"images": square[None]})
            moved, kept = boxes_in_image(boxes, image.size, side)
            yield Objects(moved[kept], labels[kept], scores[kept])

    def change_prior(self, probabilities: Array, prior: ClassFrequencies) -> Array:
        """Return (N, C) probabilities as they would be under other class frequencies than those in the file.

        Probabilities of less than about 1e-45 are 0 in the file's single precision. Where those of all classes that the
        other frequencies allow are 0, nothing is known of the image among these classes: it has their frequencies.

        Args:
            probabilities: (N, C), this file's.
            prior: ``uniform``, ``train``, C frequencies, a mapping from class name to frequency, or a file of them.

        Raises:
            LongtailError: the frequencies do not fit the classes.
        """
        wanted, present = (
            np.asarray(resolve_class_frequencies(each, self.class_names, self.class_counts))
            for each in (prior, self.prior)
        )
        # a class that the file's frequencies exclude has probability 0 in it, and keeps it
        allowed = np.where(present > 0, wanted, 0)
        factors = np.divide(allowed, present, out=np.zeros(len(wanted)), where=present > 0)
        weighted = probabilities.astype(np.float64) * factors
        weighted = np.where(weighted.any(axis=1, keepdims=True), weighted, allowed)
        changed: Array = weighted / weighted.sum(axis=1, keepdims=True)
        return changed

    def has_prior(self, prior: ClassFrequencies) -> bool:
        """Return whether class frequencies are those in the file.

        Args:
            prior: see :meth:`change_prior`.

        Raises:
            LongtailError: they do not fit the classes.
        """
        wanted, present = (
            resolve_class_frequencies(each, self.class_names, self.class_counts) for each in (prior, self.prior)
        )
        # the file's have been through logarithms in single precision
        return all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(wanted, present, strict=True))

    def _run(self, batch: Sequence[Array]) -> Array:
        (probabilities,) = self._session.run(None, {"images": np.stack(batch)})
        array: Array = probabilities
        return array

    def _open(self, path: Path) -> Image.Image:
        return open_image(path) if self.label_maps else open_square(path, self.stored_size, self.channels)

    def _preprocess(self, image: Image.Image) -> Array:
        """Return (H, W, channels) uint8, as a recogniser sees it."""
        if self.label_maps:
            return np.array(to_rgb(image).resize(self.shape[::-1], Image.Resampling.BILINEAR))
        size = self.shape[0]
        pixels = np.array(resize_center_crop(image, self.stored_size, self.channels)).reshape(
            self.stored_size, self.stored_size, -1
        )
        edge = (self.stored_size - size) // 2
        return pixels[edge : edge + size, edge : edge + size]


def _several(images: ImageInput | Iterable[ImageInput]) -> Iterable[ImageInput]:
    """Return one image as a list of it, several as they are."""
    single = isinstance(images, str | Path | Image.Image) or (isinstance(images, np.ndarray) and images.ndim < 4)
    return [images] if single else images  # type: ignore[return-value, list-item]


def _opened(
    image: ImageInput, read: Callable[[Path], Image.Image], unreadable: dict[Path, str] | None
) -> Image.Image | None:
    """Return a Pillow image; None for a file that cannot be read, which is recorded in ``unreadable``."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, str | Path):
        return read_or_record(read, Path(image), unreadable)
    kind = getattr(image, "dtype", type(image).__name__)
    shape = tuple(getattr(image, "shape", ()))
    if kind != np.uint8 or not (len(shape) == 2 or (len(shape) == 3 and 1 <= shape[2] <= 4)):
        raise LongtailError(
            "image: expected a file, a Pillow image or an array of uint8, (H, W) or (H, W, channels) with 1 to 4 "
            f"channels, got {kind} of shape {shape}"
        )
    return Image.fromarray(image[:, :, 0] if shape[2:] == (1,) else image)

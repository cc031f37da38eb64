"""Prediction with an exported ONNX file, without torch.

Legend: N images, C classes, K objects of an image, H, W sides in pixels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from longtail.data.image_io import open_image, open_square, read_or_record, resize_center_crop, to_rgb
from longtail.data.letterbox import boxes_in_image, letterbox
from longtail.errors import LongtailError
from longtail.evaluation.class_frequencies import ClassFrequencies, resolve_class_frequencies

Array = np.ndarray[Any, Any]


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

    Raises:
        LongtailError: the extra is missing, or the file is not one of longtail's.
    """

    def __init__(self, path: Path | str) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise LongtailError(f"{path}: needs the extra onnx: pip install 'longtail[onnx]'") from None
        if not Path(path).is_file():
            raise LongtailError(f"{path}: there is no such file")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
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
        images: Iterable[Path | str | Image.Image],
        batch_size: int = 256,
        unreadable: dict[Path, str] | None = None,
    ) -> Array:
        """Return probabilities, (N, C); of a model that labels pixels, (N, C, H, W) at its own size.

        Of a model that finds objects use :meth:`find`.

        Args:
            images: files or Pillow images, of any size.
            batch_size: images at a time.
            unreadable: takes the path of every file that cannot be read, with the reason; there is no prediction for
                it then. If not given, such a file is an error.

        Raises:
            LongtailError: a file cannot be read.
        """
        probabilities, batch = [], []
        for image in images:
            opened = image if isinstance(image, Image.Image) else read_or_record(self._open, Path(image), unreadable)
            if opened is None:
                continue
            batch.append(self._preprocess(opened))
            if len(batch) == batch_size:
                probabilities.append(self._run(batch))
                batch = []
        if batch:
            probabilities.append(self._run(batch))
        return (
            np.concatenate(probabilities) if probabilities else np.empty((0, len(self.class_names)), dtype=np.float32)
        )

    def segment(self, image: Image.Image, prior: ClassFrequencies | None = None) -> Array:
        """Return the most probable class of every pixel, (H, W) int64, of a model that labels pixels.

        The image is resized to the file's size, and the probabilities are resized back (bilinear).

        Args:
            image: of any size.
            prior: class frequencies, see :meth:`change_prior`; those in the file if not given.

        Raises:
            LongtailError: the model does not label pixels, or the frequencies do not fit the classes.
        """
        if not self.label_maps:
            raise LongtailError("segment: this model does not label pixels; use predict or find")
        image = to_rgb(image)
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
        self, images: Iterable[Path | str | Image.Image], unreadable: dict[Path, str] | None = None
    ) -> Iterator[Objects]:
        """Yield the objects of images, image by image, of a model that finds objects.

        Args:
            images: files or Pillow images, of any size.
            unreadable: see :meth:`predict`.

        Raises:
            LongtailError: a file cannot be read, or the model finds no objects.
        """
        if not self.finds_objects:
            raise LongtailError("find: this model classifies; use predict")
        for each in images:
            opened = each if isinstance(each, Image.Image) else read_or_record(open_image, Path(each), unreadable)
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

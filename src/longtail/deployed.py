"""An exported file at work: ONNX in, predictions out, without torch. Legend: N images, C classes, H, W sides."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from longtail.data.pictures import open_image, squared, upright
from longtail.errors import LongtailError
from longtail.evaluation.priors import read_prior

Array = np.ndarray[Any, Any]


class DeployedModel:
    """What ``longtail export`` wrote.

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
        told = self._session.get_modelmeta().custom_metadata_map.get("longtail")
        if told is None:
            raise LongtailError(f"{path}: is another program's model: expected a file that longtail export wrote")
        about = json.loads(told)
        self.task: str = about["task"]
        self.class_names: list[str] = about["class_names"]
        self.class_counts: list[int] = about["class_counts"]
        self.channels: int = about["channels"]
        self.shape: tuple[int, int] = tuple(about["shape"])
        self.stored_size: int = about["stored_size"]
        self.prior: str | list[float] = about["prior"]

    def predict(self, images: Iterable[Path | str | Image.Image], batch_size: int = 256) -> Array:
        """Return probabilities, (N, C), or (N, C, H, W) of a segmentation.

        Args:
            images: files or Pillow images, of any size.
            batch_size: images at a time.

        Raises:
            LongtailError: a file cannot be read.
        """
        made, batch = [], []
        for image in images:
            batch.append(self._prepared(image if isinstance(image, Image.Image) else open_image(Path(image))))
            if len(batch) == batch_size:
                made.append(self._run(batch))
                batch = []
        if batch:
            made.append(self._run(batch))
        return np.concatenate(made) if made else np.empty((0, len(self.class_names)), dtype=np.float32)

    def under(self, probabilities: Array, prior: Sequence[float]) -> Array:
        """Return (N, C) probabilities as they would be under other class frequencies than those in the file.

        Args:
            probabilities: (N, C), this file's.
            prior: (C,) frequencies.
        """
        weighed = probabilities.astype(np.float64) * (np.asarray(prior) / np.asarray(self.frequencies(self.prior)))
        changed: Array = weighed / weighed.sum(axis=1, keepdims=True)
        return changed

    def frequencies(self, prior: str | Sequence[float]) -> Sequence[float]:
        """Return (C,) class frequencies, not normalised: of ``uniform``, of ``train``, of a file, or as they are given.

        Raises:
            LongtailError: the file cannot be read, or does not fit the classes.
        """
        if not isinstance(prior, str):
            return prior
        if prior == "uniform":
            return [1.0] * len(self.class_names)
        return self.class_counts if prior == "train" else read_prior(Path(prior), self.class_names)

    def _run(self, batch: Sequence[Array]) -> Array:
        (probabilities,) = self._session.run(None, {"images": np.stack(batch)})
        found: Array = probabilities
        return found

    def _prepared(self, image: Image.Image) -> Array:
        """Return (H, W, channels) uint8, as a recogniser sees it."""
        if self.task == "segmentation":
            return np.array(upright(image).resize(self.shape[::-1], Image.Resampling.BILINEAR))
        size = self.shape[0]
        pixels = np.array(squared(image, self.stored_size, self.channels)).reshape(
            self.stored_size, self.stored_size, -1
        )
        edge = (self.stored_size - size) // 2
        return pixels[edge : edge + size, edge : edge + size]

"""A model as one file for other programs: ONNX, with normalisation, prior and labels inside.

Legend: N images, C classes, H and W sides in pixels, S the side that a classifier sees.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import longtail
from longtail.data.image_io import open_image
from longtail.errors import LongtailError
from longtail.files import atomic_write
from longtail.inference.model import Prior, TrainedModel
from longtail.inference.options import TTA, check_tta
from longtail.inference.recognizer import Recognizer
from longtail.losses import posterior

PARITY = 1e-4
"""Largest difference of a probability between the file and PyTorch that an export goes through with."""
_EXAMPLES = 4  # images that both are compared on


@dataclass(frozen=True)
class Exported:
    """An exported file."""

    path: Path
    shape: tuple[int, int, int]
    """(H, W, channels) of an image that it takes."""
    difference: float
    """Largest difference from PyTorch's."""
    images: int
    """Images that were compared."""
    compared: str = "probability"
    """What ``difference`` is of."""
    batch: str = "N"
    """Images that it takes at a time; N for any number."""
    note: str = ""
    """What a user should know about the file."""


class _ExportModule(nn.Module):
    """(N, H, W, channels) uint8 to (N, C) probabilities, or (N, C, H, W)."""

    log_prior: Tensor

    def __init__(self, model: TrainedModel, prior: Prior, tta: TTA) -> None:
        super().__init__()
        self.encoder, self.classifier = model.encoder, model.classifier
        self.model, self.tta = model, tta
        log_prior = model.log_prior(prior)
        zeros = torch.zeros(len(model.config.class_names))
        self.register_buffer("log_prior", zeros if log_prior is None else log_prior)

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.permute(0, 3, 1, 2).float() / 255
        if isinstance(self.model, Recognizer):
            raw_scores = self.model.mean_raw_scores(pixels, self.tta)
        else:
            raw_scores = self.model.raw_scores(pixels)
        return posterior(self.model.remove_prior(raw_scores), self.log_prior).exp()


def export_onnx(
    model: TrainedModel,
    path: Path | str,
    prior: Prior = "uniform",
    images: Sequence[Path | str] = (),
    tta: TTA = "none",
) -> Exported:
    """Write a model as an ONNX file, and compare it with PyTorch.

    The file takes ``images``, (N, H, W, channels) uint8 for any N, and returns ``probabilities``, (N, C), or (N, C, H,
    W) where every pixel has a label. H and W are the model's own, with the test-time augmentation ``crops`` those
    at which it keeps images; others must be resized first. Its metadata, JSON under the key ``longtail``, holds labels,
    preprocessing and test-time augmentation.

    Args:
        model: what to export, on the CPU.
        path: the file to write.
        prior: class frequencies that the probabilities assume: ``uniform``, ``train``, C frequencies, or a file.
        images: files to compare on; random images if not given.
        tta: test-time augmentation that is part of the file, see :meth:`Recognizer.scores`.

    Raises:
        LongtailError: the extra is missing, test-time augmentation is asked for of a model that labels pixels, or the
            probabilities of the file differ from PyTorch's; or the installed torch cannot convert the model.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError:
        raise LongtailError("export: needs the extra onnx: pip install 'longtail[onnx]'") from None
    path = Path(path)
    check_tta(tta, "--tta")
    if tta != "none" and not isinstance(model, Recognizer):
        raise LongtailError(f"export: --tta {tta} is for models that classify whole images")
    config = model.config
    side = model.input_size(tta) if isinstance(model, Recognizer) else config.image_size
    height, width = config.shape or (side, side)
    inputs = _example_inputs(model, (height, width), images)
    module = _ExportModule(model, prior, tta).eval()
    with torch.no_grad(), silent_export():
        expected = module(inputs)
        # two images: a single one would be exported as a fixed size
        proto = to_onnx(module, inputs[:2], ["probabilities"], {"images": {0: torch.export.Dim("N", min=1)}})
    metadata = {
        "longtail": longtail.__version__,
        "task": config.task,
        "label_maps": expected.ndim == 4,
        "class_names": config.class_names,
        "class_counts": config.class_counts,
        "channels": config.channels,
        "shape": (height, width),
        "stored_size": config.stored_size,
        "tta": tta,
        "prior": prior if isinstance(prior, str) and prior in {"uniform", "train"} else module.log_prior.exp().tolist(),
    }
    content = serialize(proto, metadata)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    difference = 0.0
    for part, want in ((inputs, expected), (inputs[:1], expected[:1])):  # batches of several sizes
        (got,) = session.run(None, {"images": part.numpy()})
        difference = max(difference, float(np.abs(got - want.numpy()).max()))
    if not difference < PARITY:
        raise LongtailError(
            f"{path}: the probabilities of the ONNX file differ from PyTorch's by {difference:.2g}, expected less than "
            f"{PARITY:g}; nothing was written"
        )
    write_bytes(path, content)
    window, note = config.sliding_window, ""
    if window is not None and window < max(height, width):
        note = (
            f"the file labels the whole image at once, the run by a sliding window of {window}; longtail evaluate RUN "
            f"--sliding_window {max(height, width)} says how good that is"
        )
    return Exported(path, (height, width, config.channels), difference, len(inputs), note=note)


def _example_inputs(model: TrainedModel, size: tuple[int, int], files: Sequence[Path | str]) -> Tensor:
    """Return (N, H, W, channels) uint8 images to compare on."""
    if not files:
        drawn = torch.rand(_EXAMPLES, *size, model.config.channels, generator=torch.Generator().manual_seed(0))
        return (drawn * 255).to(torch.uint8)
    repeated = (list(files) * 2)[: max(2, min(len(files), _EXAMPLES))]
    return torch.stack([model.export_input(open_image(Path(file)), size) for file in repeated])


def to_onnx(
    module: nn.Module, images: Tensor, output_names: Sequence[str], dynamic_shapes: dict[str, Any] | None = None
) -> Any:
    """Return a module as an ONNX model (``onnx.ModelProto``).

    Args:
        module: what to convert; it has been called with the images before.
        images: the input, uint8, called ``images``.
        output_names: of what it returns.
        dynamic_shapes: see ``torch.onnx.export``.

    Raises:
        LongtailError: the installed torch and onnxscript cannot convert it.
    """
    try:
        program = torch.onnx.export(
            module,
            (images,),
            input_names=["images"],
            output_names=output_names,
            dynamic_shapes=dynamic_shapes,
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        return program.model_proto
    except Exception as error:  # what an exporter raises is not limited
        cause: BaseException = error
        while cause.__cause__ is not None:  # around it the exporter puts advice of many lines
            cause = cause.__cause__
        reason = " ".join(str(cause).split())[:200] or type(cause).__name__
        raise LongtailError(
            f"export: torch {torch.__version__} with onnxscript {version('onnxscript')} cannot convert this model: "
            f"{reason}; use a later torch (tested with 2.14)"
        ) from None


def serialize(proto: Any, metadata: Mapping[str, Any]) -> bytes:
    """Return the bytes of a checked ONNX model, with metadata as JSON under ``longtail``."""
    import onnx

    entry = proto.metadata_props.add()
    entry.key, entry.value = "longtail", json.dumps(metadata)  # in ASCII, as names of classes need not be Unicode
    onnx.checker.check_model(proto)
    content: bytes = proto.SerializeToString()
    return content


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically, and the folders that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda partial: _write(partial, content))


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


@contextlib.contextmanager
def silent_export() -> Iterator[None]:
    """Keep what the exporter says about itself from the user."""
    level, logger = logging.getLogger().level, logging.getLogger()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)

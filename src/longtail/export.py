"""A model as one file for other programs: ONNX, with normalisation, prior and labels inside.

Legend: N images, C classes, H and W sides in pixels, S the side that a classifier sees.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import longtail
from longtail.data.pictures import open_image, upright
from longtail.errors import LongtailError
from longtail.files import write_whole
from longtail.objectives.posterior import along, posterior
from longtail.recognizer import Recognizer
from longtail.segmenter import Segmenter, load_kept

PARITY = 1e-4
"""Largest difference of a probability between the file and PyTorch that an export goes through with."""
_TRIED = 4  # images that both are compared on


@dataclass(frozen=True)
class Exported:
    """An exported file."""

    path: Path
    shape: tuple[int, int, int]
    """(H, W, channels) of an image that it takes."""
    difference: float
    """Largest difference of a probability from PyTorch's."""
    images: int
    """Images that were compared."""


class _Deployed(nn.Module):
    """(N, H, W, channels) uint8 to (N, C) probabilities, or (N, C, H, W)."""

    bias: Tensor

    def __init__(self, recognizer: Recognizer, prior: str | Sequence[float]) -> None:
        super().__init__()
        self.encoder, self.classifier = recognizer.encoder, recognizer.classifier
        self.recognizer = recognizer
        bias = recognizer.log_prior(prior)
        self.register_buffer("bias", torch.zeros(len(recognizer.card.class_names)) if bias is None else bias)

    def forward(self, images: Tensor) -> Tensor:
        scores = self.recognizer.free(self.recognizer.trained_scores(images.permute(0, 3, 1, 2).float() / 255))
        return posterior(scores, along(self.bias, scores)).exp()


def export_onnx(
    folder: Path | str, path: Path, prior: str | Sequence[float] = "uniform", images: Sequence[Path] = ()
) -> Exported:
    """Write a run's recogniser or segmenter as an ONNX file, and compare it with PyTorch.

    The file takes ``images``, (N, H, W, channels) uint8, as many as there are, and gives ``probabilities``, (N, C), or
    (N, C, H, W) of a segmentation. H and W are the run's own; an image of another size is resized first. What is in
    the file besides stands in its metadata: ``longtail``, a text of JSON.

    Args:
        folder: of the run, or of its recogniser.
        path: of the file.
        prior: that the probabilities assume: ``uniform``, ``train``, or C frequencies.
        images: files to compare on; random ones if not given.

    Raises:
        LongtailError: the extra is missing, or the file's probabilities are not PyTorch's.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError:
        raise LongtailError("export: needs the extra onnx: pip install 'longtail[onnx]'") from None
    recognizer = load_kept(folder)
    card = recognizer.card
    height, width = card.shape or (card.image_size, card.image_size)
    tried = _images(recognizer, (height, width), images)
    model = _Deployed(recognizer, prior).eval()
    with torch.no_grad(), _silent():
        expected = model(tried)
        # one image would be taken for a size that is always one
        program = torch.onnx.export(
            model,
            (tried[:2],),
            input_names=["images"],
            output_names=["probabilities"],
            dynamic_shapes={"images": {0: torch.export.Dim("N", min=1)}},
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    about = {
        "longtail": longtail.__version__,
        "task": card.task,
        "class_names": card.class_names,
        "class_counts": card.class_counts,
        "channels": card.channels,
        "shape": (height, width),
        "stored_size": card.stored_size,
        "prior": prior if isinstance(prior, str) else list(prior),
    }
    entry = proto.metadata_props.add()
    entry.key, entry.value = "longtail", json.dumps(about, ensure_ascii=False)
    onnx.checker.check_model(proto)
    whole = proto.SerializeToString()
    session = onnxruntime.InferenceSession(whole, providers=["CPUExecutionProvider"])
    difference = 0.0
    for part, want in ((tried, expected), (tried[:1], expected[:1])):  # as many images as there are
        (got,) = session.run(None, {"images": part.numpy()})
        difference = max(difference, float(np.abs(got - want.numpy()).max()))
    if not difference < PARITY:
        raise LongtailError(
            f"{folder}: the ONNX file's probabilities differ from PyTorch's by {difference:.2g}, expected less than "
            f"{PARITY:g}; nothing was written"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda partial: _write(partial, whole))
    return Exported(path, (height, width, card.channels), difference, len(tried))


def _images(recognizer: Recognizer, size: tuple[int, int], files: Sequence[Path]) -> Tensor:
    """Return (N, H, W, channels) uint8 to compare on."""
    channels = recognizer.card.channels
    if not files:
        drawn = torch.rand(_TRIED, *size, channels, generator=torch.Generator().manual_seed(0))
        return (drawn * 255).to(torch.uint8)
    made = []
    for file in (list(files) * 2)[: max(2, min(len(files), _TRIED))]:
        if isinstance(recognizer, Segmenter):
            image = upright(open_image(file)).resize(size[::-1])
            made.append(torch.from_numpy(np.array(image)))
        else:
            made.append((recognizer.prepared(open_image(file))[0].permute(1, 2, 0) * 255).round().to(torch.uint8))
    return torch.stack(made)


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep what the exporter says about itself from the user."""
    level, logger = logging.getLogger().level, logging.getLogger()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)

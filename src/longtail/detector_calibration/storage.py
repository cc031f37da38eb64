"""Detectors as files: those of transformers and of longtail in folders, torchvision's by name and weights, results."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.models import detection, list_models

from longtail.detector_calibration.heads import find_class_head
from longtail.errors import LongtailError, did_you_mean
from longtail.files import write_json
from longtail.inference.export import silent_export
from longtail.inference.model import TrainedModel
from longtail.registry import TASKS
from longtail.tasks.loading import load_model

NOTE = "calibration.json"
"""What was done to a detector, beside its files."""
PREFIX = "torchvision:"


@dataclass(frozen=True)
class StoredDetector:
    """A detector with what it was read with."""

    model: Any
    save: Callable[[Any, Path], None]
    """Write a model of the same kind to a folder that exists, in the format that it came in."""
    processor: Any = None
    """Image processor of a model of transformers; None if its folder has none."""


def load_detector(name: str, weights: Path | None = None, classes: int | None = None) -> StoredDetector:
    """Read a detector.

    Args:
        name: folder of a model of transformers, a run of longtail, or ``torchvision:`` and the name of a model.
        weights: state dict of a model of torchvision, .safetensors or .pth.
        classes: ``num_classes`` of a model of torchvision; from the weights if None.

    Raises:
        LongtailError: it is not there, of another kind, or its files do not fit together.
    """
    if name.startswith(PREFIX):
        return _load_torchvision(name.removeprefix(PREFIX), weights, classes)
    if weights is not None or classes is not None:
        raise LongtailError(f"{name}: --weights and --classes are for torchvision:NAME")
    folder = Path(name)
    if not folder.is_dir():
        raise LongtailError(
            f"{name}: there is no such folder; expected the folder of a model of transformers, a run of longtail, "
            "torchvision:NAME with --weights FILE, or a COCO result file (.json)"
        )
    config = folder / "config.json"
    if config.is_file():
        try:
            content = json.loads(config.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise LongtailError(f"{config}: cannot be read as JSON: {error}") from None
        if isinstance(content, dict) and ("architectures" in content or "model_type" in content):
            return _load_transformers(folder, content)
    model = load_model(folder)
    find_class_head(model)
    return StoredDetector(model, lambda changed, out: _save_run(changed, folder, out))


def _save_run(model: TrainedModel, source: Path, out: Path) -> None:
    """Write a detector of longtail as it was read: as a run with its settings, which name its test set, or as a model.

    Metrics of the detector as it was are left out.
    """
    info = {**model.config.training_info, "calibrated": True}
    model.config = dataclasses.replace(model.config, metrics={}, training_info=info)
    settings = source / "config.yaml"
    if settings.is_file():
        out.joinpath("recognizer").mkdir()
        shutil.copyfile(settings, out / settings.name)
        out = out / "recognizer"
    model.save(out)


def _load_transformers(folder: Path, config: dict[str, Any]) -> StoredDetector:
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError:
        raise LongtailError(f"{folder}: needs transformers: pip install transformers") from None
    if not any(folder.glob("*.safetensors")):
        raise LongtailError(
            f"{folder}: contains no .safetensors; weights in other files are pickles, which may run code when they are "
            "read: convert them first (model.save_pretrained)"
        )
    name = next(iter(config.get("architectures") or ()), "")
    kind = getattr(transformers, name, transformers.AutoModelForObjectDetection)
    try:
        with quiet():
            model, info = kind.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise LongtailError(f"{folder}: cannot be read as a detector of transformers: {error}") from None
    find_class_head(model)
    if info["missing_keys"] or info["mismatched_keys"]:
        first = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))[0]
        raise LongtailError(f"{folder}: its weights do not fit {type(model).__name__}: {first} is missing or another")
    processor = None
    if (folder / "preprocessor_config.json").is_file():
        try:
            with quiet():
                processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, ImportError) as error:
            raise LongtailError(f"{folder}: its image processor cannot be read: {error}") from None

    def save(changed: Any, out: Path) -> None:
        with quiet():
            changed.save_pretrained(out)
        # processor, tokenizer and model card are not the model's to write
        for path in folder.iterdir():
            if path.suffix in {".json", ".txt", ".md"} and not (out / path.name).exists() and "index" not in path.name:
                shutil.copyfile(path, out / path.name)

    return StoredDetector(model.eval(), save, processor)


def _load_torchvision(name: str, weights: Path | None, classes: int | None) -> StoredDetector:
    known = list_models(module=detection)
    if name not in known:
        raise LongtailError(f"{PREFIX}{name}: there is no such detector of torchvision{did_you_mean(name, known)}")
    if weights is None:
        raise LongtailError(f"{PREFIX}{name}: expected its weights, --weights FILE (.safetensors or .pth)")
    state = read_state_dict(weights)

    def build(num_classes: int) -> Any:
        return getattr(detection, name)(weights=None, weights_backbone=None, num_classes=num_classes).eval()

    if classes is None:
        classes = _classes_of(state, build(2), weights)
    if classes < 1:
        raise LongtailError(f"--classes {classes}: expected at least 1")
    model = build(classes)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        line = " ".join(str(error).split())
        raise LongtailError(
            f"{weights}: does not fit {name} with {classes} classes: {line[:300]}{'…' if len(line) > 300 else ''}"
        ) from None

    def save(changed: Any, out: Path) -> None:
        tensors = {key: value.detach().cpu().contiguous().clone() for key, value in changed.state_dict().items()}
        if weights.suffix == ".safetensors":
            save_file(tensors, out / weights.name)
        else:
            torch.save(tensors, out / weights.name)

    return StoredDetector(model, save)


def _classes_of(state: dict[str, Tensor], example: nn.Module, weights: Path) -> int:
    """Return the number of outputs of the class layer in a state dict, from a model with two."""
    layer = find_class_head(example).layers[0]
    key = next(f"{name}.bias" for name, module in example.named_modules() if module is layer)
    if key not in state or layer.bias is None:
        raise LongtailError(f"{weights}: has no {key}: expected the state dict of this detector")
    return len(state[key]) // (len(layer.bias) // 2)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a state dict, or of a checkpoint that holds one as ``model`` or ``state_dict``.

    Raises:
        LongtailError: the file is missing, or holds anything but tensors and plain values.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError) as error:
        raise LongtailError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except Exception as error:  # what unpickling raises is not limited
        raise LongtailError(
            f"{path}: cannot be read as a state dict without running code from it ({type(error).__name__}); save "
            "model.state_dict()"
        ) from None
    for key in ("model", "state_dict", "model_state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise LongtailError(f"{path}: expected a state dict, tensors by name")
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def write_folder(out: Path, write: Callable[[Path], None], note: dict[str, Any], overwrite: bool) -> None:
    """Fill a folder and its note, all of it or nothing.

    Args:
        out: the folder.
        write: fills a folder.
        note: what :data:`NOTE` holds.
        overwrite: replace a folder that an earlier call wrote.

    Raises:
        LongtailError: there is something else already, or the folder cannot be written.
    """
    check_out(out, overwrite)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as place:
            partial = Path(place) / "new"
            partial.mkdir()
            write(partial)
            write_json(partial / NOTE, note)
            old = Path(place) / "old"
            try:
                if out.exists():
                    out.rename(old)
                partial.rename(out)
            except BaseException:  # Ctrl-C too
                if old.exists() and not out.exists():
                    old.rename(out)
                raise
    except (OSError, RuntimeError, SafetensorError) as error:
        raise LongtailError(f"{out}: cannot be written: {getattr(error, 'strerror', None) or error}") from None


def check_out(out: Path, overwrite: bool) -> None:
    """Raise LongtailError if a folder is there and is not to be replaced, or holds more than a corrected detector."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise LongtailError(f"{out}: exists already; use --overwrite or another --out")
    if not (out / NOTE).is_file():
        raise LongtailError(f"{out}: is not a folder that this command wrote (no {NOTE}); choose another --out")


def check_original(source: Path) -> None:
    """Raise LongtailError if a folder holds a corrected detector or results, to which a correction would be added."""
    if (source / NOTE).is_file():
        raise LongtailError(f"{source}: was corrected already (it has {NOTE}); correct the original")


def export_detector(model: Any, path: Path, size: tuple[int, int] | None = None) -> None:
    """Write a detector as an ONNX file.

    A model of torchvision takes one image, (3, H, W) float32 in [0, 1], resizes it, and returns boxes, labels and
    scores after suppression. A model of transformers takes ``pixel_values`` as its image processor makes them, for the
    given size, and returns ``logits`` and ``pred_boxes``. One of longtail is exported as its task does it.

    Args:
        model: on the CPU.
        path: the file.
        size: height and width of the example image; 320 × 320 if None. A model of transformers is exported for it.

    Raises:
        LongtailError: the extra onnx is missing, the model is of another kind, or cannot be exported.
    """
    if isinstance(model, TrainedModel):
        TASKS[model.config.task].export(model, path, "uniform", (), "none")
        return
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise LongtailError("--export: needs the extra onnx: pip install 'longtail[onnx]'") from None
    modules = {kind.__module__.split(".")[0] for kind in type(model).__mro__}
    if not modules & {"torchvision", "transformers"}:
        raise LongtailError("--export: is for detectors of torchvision, transformers and longtail")
    height, width = size or (320, 320)
    image = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with quiet():
            if "torchvision" in modules:
                # the older exporter: suppression and the choice of the best depend on values, which torch.export
                # does not trace through
                torch.onnx.export(
                    model,
                    ([image],),
                    partial,
                    dynamo=False,
                    input_names=["image"],
                    output_names=_output_names(model),
                    dynamic_axes={"image": {1: "height", 2: "width"}},
                    opset_version=17,
                )
            else:
                program = torch.onnx.export(
                    _Raw(model), (image[None],), dynamo=True, verbose=False, input_names=["pixel_values"]
                )
                assert program is not None
                program.save(partial)
        partial.replace(path)
    except OSError as error:
        raise LongtailError(f"{path}: cannot be written: {error.strerror}") from None
    except Exception as error:  # what an exporter raises is not limited
        line = " ".join(str(error).split())[:200]
        raise LongtailError(f"{path}: {type(model).__name__} cannot be exported: {line}") from None
    finally:
        partial.unlink(missing_ok=True)


def _output_names(model: Any) -> list[str]:
    rcnn = hasattr(model, "roi_heads")
    names = ["boxes", "labels", "scores"] if rcnn else ["boxes", "scores", "labels"]
    return [*names, "masks"] if rcnn and model.roi_heads.has_mask() else names


class _Raw(nn.Module):
    """The logits and boxes of a model of transformers as a tuple."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.model(pixel_values=pixel_values)
        return outputs.logits, outputs.pred_boxes


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what other libraries say while they read, write or export from the user, bars of progress too."""
    with silent_export(), contextlib.redirect_stderr(io.StringIO()):
        yield

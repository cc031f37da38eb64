"""The layer of a detector that computes its class logits, and a correction of the logits written into its weights.

Legend: L outputs of the layer for a proposal, A anchors at a place, C classes without the background.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.ssd import SSD

from longtail.errors import LongtailError
from longtail.evaluation.detector_scores import Background, LogitCorrection, class_outputs

Model = TypeVar("Model", bound=Any)

SUPPORTED = (
    "torchvision's Faster R-CNN, Mask R-CNN, Keypoint R-CNN, RetinaNet, FCOS, SSD and SSDlite; DETR, Conditional, "
    "Deformable and DAB-DETR, Table Transformer, YOLOS, RT-DETR, RT-DETRv2, D-FINE, DEIMv2 and LW-DETR of "
    "transformers; models with an attribute class_layer"
)


@dataclass(frozen=True)
class ClassHead:
    """Where a detector computes its class logits."""

    layers: tuple[Any, ...]
    """Linear or Conv2d layers, or others with rows of ``weight`` and ``bias``, whose outputs are the logits, one for
    each resolution of SSD; A · L rows each, anchor by anchor."""
    num_outputs: int
    """L."""
    background: Background
    """Which of the L outputs is the background; None for sigmoids."""
    label_names: tuple[str, ...] | None = None
    """C names of the classes, where the model knows them."""
    scaling_folds: bool = True
    """Whether the logits are the layer's outputs alone; D-FINE adds the quality of the box, which a factor in the
    layer would not reach."""

    @property
    def num_classes(self) -> int:
        """C."""
        return self.num_outputs - (self.background is not None)

    @property
    def classes(self) -> slice:
        """Where the C classes are among the L outputs."""
        return class_outputs(self.num_outputs, self.background)

    @property
    def first_label(self) -> int:
        """The label that a detection of the first class has."""
        return 1 if self.background == "first" else 0

    def check_scaling(self) -> None:
        """Raise LongtailError if a factor of the logits cannot be written into the layer."""
        if not self.scaling_folds:
            raise LongtailError(
                "LogN: this model adds the quality of the box to its class logits, so that a factor cannot be written "
                "into the class layer; use NorCal, or longtail.evaluation.detector_scores.logn on its logits"
            )

    @torch.no_grad()
    def fold(self, correction: LogitCorrection) -> None:
        """Write a correction into weights and biases; the identity changes no bit of them.

        Raises:
            LongtailError: the correction has another number of outputs, or cannot be written into this layer.
        """
        if len(correction.shift) != self.num_outputs:
            raise LongtailError(
                f"correction: of {len(correction.shift)} outputs, but the class layer of the model has "
                f"{self.num_outputs}"
            )
        scaled = not bool((correction.scale == 1).all())
        if scaled:
            self.check_scaling()
        for layer in dict.fromkeys(self.layers):  # a layer that serves several resolutions once
            if layer.bias is None:
                raise LongtailError("model: its class layer has no bias, which a correction is written into")
            anchors = len(layer.bias) // self.num_outputs
            if scaled:
                scale = correction.scale.repeat(anchors).to(layer.weight.device)
                layer.weight.copy_(layer.weight.double() * scale.reshape(-1, *(1,) * (layer.weight.ndim - 1)))
                layer.bias.copy_(layer.bias.double() * scale)
            shift = correction.shift.repeat(anchors).to(layer.bias.device)
            # where: adding 0 would turn −0 into 0
            layer.bias.copy_(torch.where(shift == 0, layer.bias.double(), layer.bias.double() + shift))


@dataclass(frozen=True)
class _Place:
    """Where a class of transformers has its class layer."""

    path: str
    softmax: bool
    scaling_folds: bool = True


_TRANSFORMERS = {
    "DetrForObjectDetection": _Place("class_labels_classifier", True),
    "DetrForSegmentation": _Place("detr.class_labels_classifier", True),
    "TableTransformerForObjectDetection": _Place("class_labels_classifier", True),
    "YolosForObjectDetection": _Place("class_labels_classifier", True),
    "ConditionalDetrForObjectDetection": _Place("class_labels_classifier", False),
    "DabDetrForObjectDetection": _Place("class_embed", False),
    "DeformableDetrForObjectDetection": _Place("class_embed", False),
    "RTDetrForObjectDetection": _Place("model.decoder.class_embed", False),
    "RTDetrV2ForObjectDetection": _Place("model.decoder.class_embed", False),
    "DFineForObjectDetection": _Place("model.decoder.class_embed", False, scaling_folds=False),
    "Deimv2ForObjectDetection": _Place("model.decoder.class_embed", False, scaling_folds=False),
    "LwDetrForObjectDetection": _Place("class_embed", False),
}
"""Of decoders with a class layer for each of their layers, the one of the layer whose detections are returned is
corrected: the others serve the training alone. The class scores with which an encoder chooses its proposals are left
as they are, like those of a region proposal network: they choose boxes, and the scores of the detections follow."""


def find_class_head(model: Any) -> ClassHead:
    """Return where a detector computes its class logits.

    Beside the detectors of torchvision and transformers, any object will do that has ``class_layer``, a Linear or
    Conv2d layer or one with the same ``weight`` and ``bias`` (or a sequence of them), and ``background``: ``first``,
    ``last`` (or True) or None (or False). ``config.class_names`` gives the names; without them ``num_outputs`` is
    needed where the layer has several anchors. ``find(images)`` yields :class:`~longtail.data.detection.Detections`.

    Raises:
        LongtailError: the detector is of another kind.
    """
    head = _torchvision_head(model) or _transformers_head(model) or _declared_head(model)
    if head is None:
        raise LongtailError(
            f"model: {type(model).__name__} is not a detector whose class layer is known; supported: {SUPPORTED}. For "
            "others use the functions of longtail.evaluation.detector_scores on scores or logits"
        )
    return head


def layer_names(model: Any, head: ClassHead) -> list[str]:
    """Return the names of a detector's class layers, as its state dict has them before ``.weight`` and ``.bias``."""
    if isinstance(model, nn.Module):
        named = list(model.named_modules())
    else:  # longtail's own, whose parts are modules
        parts = [(name, part) for name, part in vars(model).items() if isinstance(part, nn.Module)]
        named = [pair for name, part in parts for pair in part.named_modules(prefix=name)]
    name_of = {id(module): name for name, module in reversed(named)}
    return [name_of[id(layer)] for layer in dict.fromkeys(head.layers) if id(layer) in name_of]


def _torchvision_head(model: Any) -> ClassHead | None:
    if isinstance(model, FasterRCNN):  # Mask and Keypoint R-CNN are subclasses
        predictor = model.roi_heads.box_predictor
        layer = getattr(predictor, "cls_score", None)
        if not isinstance(layer, nn.Linear):
            raise LongtailError(
                f"model: {type(predictor).__name__}, the box predictor of the {type(model).__name__}, has no Linear "
                "layer cls_score, which a correction is written into"
            )
        return ClassHead((layer,), layer.out_features, "first")
    if isinstance(model, RetinaNet | FCOS):
        head = model.head.classification_head
        return ClassHead((head.cls_logits,), head.num_classes, None)
    if isinstance(model, SSD):
        head = model.head.classification_head
        # SSDlite: the last layer of a block of convolutions
        layers = tuple(list(block)[-1] if isinstance(block, nn.Sequential) else block for block in head.module_list)
        return ClassHead(layers, head.num_columns, "first")
    return None


def _transformers_head(model: Any) -> ClassHead | None:
    names = [kind.__name__ for kind in type(model).__mro__ if kind.__module__.startswith("transformers.")]
    name = next((name for name in names if name in _TRANSFORMERS), None)
    if name is None:
        return None
    place = _TRANSFORMERS[name]
    layer = model.get_submodule(place.path)
    if isinstance(layer, nn.ModuleList):
        last = getattr(model.config, "eval_idx", -1)
        layer = layer[last % model.config.decoder_layers]
    elif not isinstance(layer, nn.Linear):
        layer = list(layer.layers)[-1]  # a perceptron
    labels = {int(index): str(label) for index, label in (model.config.id2label or {}).items()}
    classes = layer.out_features - place.softmax
    known = sorted(labels) == list(range(classes)) and any(labels[i] != f"LABEL_{i}" for i in labels)
    return ClassHead(
        (layer,),
        layer.out_features,
        "last" if place.softmax else None,
        tuple(labels[index] for index in range(classes)) if known else None,
        place.scaling_folds,
    )


def _declared_head(model: Any) -> ClassHead | None:
    layer = getattr(model, "class_layer", None)
    if layer is None or not hasattr(model, "background"):
        return None
    layers = (layer,) if isinstance(layer, nn.Module) and not isinstance(layer, nn.ModuleList) else tuple(layer)
    background: Background = {True: "last", False: None}.get(model.background, model.background)
    names = getattr(getattr(model, "config", None), "class_names", None)
    outputs = getattr(model, "num_outputs", None)
    if outputs is None:
        outputs = len(names) + (background is not None) if names else len(layers[0].weight)
    return ClassHead(layers, outputs, background, None if names is None else tuple(names))


def removes_prior(model: Any) -> bool:
    """Return whether a detector subtracts the log prior of its classes from its scores by itself.

    Those of longtail that were trained with plain cross-entropy do, at every prediction: NorCal with a power of 1.
    """
    return bool(getattr(getattr(model, "config", None), "predicts_under", None) == "train")


def check_uncorrected(model: Any) -> None:
    """Raise LongtailError for a detector of longtail that says that it was corrected: corrections would add up."""
    if getattr(getattr(model, "config", None), "training_info", {}).get("calibrated"):
        raise LongtailError("the detector was corrected already; correct the original one")


def corrected_copy(model: Model, correction: LogitCorrection) -> Model:
    """Return a copy of a detector whose class layer holds the correction; raises as :meth:`ClassHead.fold` does.

    If the detector removes the prior by itself, see :func:`removes_prior`, the copy no longer does: the correction
    takes the place of that, instead of being added to it.
    """
    twin = copy.deepcopy(model)
    find_class_head(twin).fold(correction)
    if removes_prior(twin):
        twin.config = dataclasses.replace(twin.config, predicts_under="uniform")
    return twin


def corrected_logits(logits: Tensor | Sequence[Tensor], correction: LogitCorrection | None) -> Any:
    """Return corrected logits, of one tensor or of one for each resolution; with None the same."""
    if correction is None:
        return logits
    if isinstance(logits, Tensor):
        return correction.apply(logits)
    return [correction.apply(part) for part in logits]

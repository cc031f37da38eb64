"""Running a detector on images once, and its detections under any number of corrections of its logits.

The network runs once for an image; thresholds, suppression and the choice of the best are then the detector's own, on
the logits under each correction, so that nothing is approximated, and no logits are kept beyond a batch. Detectors that
give no access to their logits, which for longtail's is ``find_corrected``, run once for every correction.

Legend: L outputs of the class layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from inspect import signature
from itertools import islice
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torchvision.models.detection import FasterRCNN
from torchvision.transforms.functional import pil_to_tensor

from longtail.data.detection import DEFAULT_POST_PROCESSING, Detections, PostProcessing
from longtail.detector_calibration.heads import ClassHead, corrected_copy, corrected_logits, find_class_head
from longtail.errors import LongtailError
from longtail.evaluation.detector_scores import LogitCorrection, LogitStatistics

Item = TypeVar("Item")
_CANDIDATES = 10  # times the detections of an image: pairs of a box and a class that suppression begins with


class DetectorRunner:
    """Runs a detector.

    Args:
        model: any that :func:`~longtail.detector_calibration.heads.find_class_head` knows.
        processor: the image processor of a model of transformers.
        score_threshold: detections with lower scores are left out; the detector's own if None, but see
            :meth:`down_to`; and 0 for transformers, whose post-processing has none of its own.
        max_detections: of an image; the detector's own if None, but see :meth:`up_to`.
        batch_size: images in a pass.

    Raises:
        LongtailError: the detector is not supported, or a model of transformers comes without its processor.
    """

    def __init__(
        self,
        model: Any,
        processor: Any = None,
        score_threshold: float | None = None,
        max_detections: int | None = None,
        batch_size: int = 1,
    ) -> None:
        self.model, self.processor, self.head = model, processor, find_class_head(model)
        self.score_threshold, self.max_detections, self.batch_size = score_threshold, max_detections, batch_size
        torchvision = type(model).__mro__
        self._is_torchvision = any(kind.__module__.startswith("torchvision.models.detection") for kind in torchvision)
        self._is_transformers = any(kind.__module__.startswith("transformers.") for kind in torchvision)
        self._is_own = hasattr(model, "find_corrected")
        if self._is_transformers and processor is None:
            raise LongtailError(
                "processor: a model of transformers needs its image processor to run on images "
                "(AutoImageProcessor.from_pretrained; preprocessor_config.json in the folder of the model)"
            )

    def down_to(self, score_threshold: float) -> DetectorRunner:
        """Return one that finds objects with scores as low as that; the same one where a threshold was given.

        The same one too where the detector leaves out fewer, or its ``find`` takes no ``score_threshold``.
        """
        own: Any = 0.0
        if self._is_torchvision:
            own = _owner(self.model).score_thresh
        elif self._is_own:
            own = DEFAULT_POST_PROCESSING.score_threshold
        elif not self._is_transformers:
            parameter = signature(self.model.find).parameters.get("score_threshold")
            own = 0.0 if parameter is None else parameter.default
        if self.score_threshold is not None or not isinstance(own, int | float) or own <= score_threshold:
            return self
        other = copy.copy(self)
        other.score_threshold = score_threshold
        return other

    def up_to(self, max_detections: int) -> DetectorRunner:
        """Return one that finds up to so many objects in an image; the same one where a number was given.

        A detector of another kind whose ``find`` takes no ``max_detections`` finds as many as it does.
        """
        has_limit = self._is_torchvision or self._is_transformers or self._is_own
        has_limit = has_limit or "max_detections" in signature(self.model.find).parameters
        if self.max_detections is not None or not has_limit:
            return self
        other = copy.copy(self)
        other.max_detections = max_detections
        return other

    def detect(
        self, images: Iterable[Image.Image], corrections: Sequence[LogitCorrection | None]
    ) -> Iterator[tuple[Detections, ...]]:
        """Yield for each image its detections under each correction; labels are classes in [0, C).

        With None they are those of the detector as it is, which differ from those of the identity where the detector
        removes the prior by itself (:func:`~longtail.detector_calibration.heads.removes_prior`).
        """
        for batch in _batches(images, self.batch_size):
            if self._is_torchvision or self._is_transformers:
                by_correction: list[list[Detections]] = []

                def keep(
                    logits: Any, finish: Callable[[Any], list[Detections]], out: list[Any] = by_correction
                ) -> None:
                    out += [finish(corrected_logits(logits, correction)) for correction in corrections]

                self._run(batch, keep)
            else:
                given = {"score_threshold": self.score_threshold, "max_detections": self.max_detections}
                limits: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
                if self._is_own:
                    functions = [None if correction is None else correction.apply for correction in corrections]
                    yield from self.model.find_corrected(batch, functions, PostProcessing(**limits))
                    continue
                models = [self.model if c is None else corrected_copy(self.model, c) for c in corrections]
                by_correction = [list(model.find(batch, **limits)) for model in models]
            yield from zip(*by_correction, strict=True)

    def statistics(
        self, images: Iterable[Image.Image], progress: Callable[[int], object] | None = None
    ) -> LogitStatistics:
        """Return the statistics of the logits of all boxes, anchors or queries of some images.

        Args:
            images: of the training set.
            progress: called with the number of images after each batch.

        Raises:
            LongtailError: the detector adds other values to the outputs of its class layer.
        """
        self.head.check_scaling()
        statistics = LogitStatistics(self.head.num_outputs)

        def add(logits: Any, _: Any = None) -> None:
            for part in [logits] if isinstance(logits, Tensor) else logits:
                statistics.update(part)

        for batch in _batches(images, self.batch_size):
            if self._is_torchvision or self._is_transformers:
                self._run(batch, add)
            else:
                _run_with_hooks(self.model, self.head, batch, add)
            if progress is not None:
                progress(len(batch))
        return statistics

    @torch.no_grad()
    def _run(self, batch: list[Image.Image], use: Callable[[Any, Callable[[Any], list[Detections]]], None]) -> None:
        """Run the network on images, and call ``use`` with the logits and with what makes detections of logits."""
        (self._run_torchvision if self._is_torchvision else self._run_transformers)(batch, use)

    def _run_torchvision(self, batch: list[Image.Image], use: Callable[..., None]) -> None:
        model = self.model
        is_rcnn, owner = isinstance(model, FasterRCNN), _owner(model)
        device = next(model.parameters()).device
        inputs = [pil_to_tensor(image.convert("RGB")).to(device).float() / 255 for image in batch]
        sizes = [(image.height, image.width) for image in batch]
        original = owner.postprocess_detections
        limits = {"score_thresh": self.score_threshold, "detections_per_img": self.max_detections}
        before = {name: getattr(owner, name) for name in limits}

        def capture(first: Any, *rest: Any) -> Any:
            logits = first if is_rcnn else first["cls_logits"]

            def finish(corrected: Any) -> list[Detections]:
                if is_rcnn:
                    found = _suppressed(owner, original, corrected, rest)
                else:
                    found = original({**first, "cls_logits": corrected}, *rest)
                return self._detections(model.transform.postprocess(found, rest[-1], sizes))

            use(logits, finish)
            # nothing was found, as far as masks and keypoints are concerned, which are not needed
            nothing = [torch.zeros(0, 4, device=device), torch.zeros(0, device=device)]
            labels = torch.zeros(0, dtype=torch.int64, device=device)
            if is_rcnn:
                return tuple([part] * len(batch) for part in (*nothing, labels))
            return [{"boxes": nothing[0], "scores": nothing[1], "labels": labels} for _ in batch]

        was_training = model.training
        model.eval()
        try:
            owner.postprocess_detections = capture
            for name, value in limits.items():
                setattr(owner, name, before[name] if value is None else value)
            model(inputs)
        finally:
            del owner.postprocess_detections  # the method of the class is there again
            for name, value in before.items():
                setattr(owner, name, value)
            model.train(was_training)

    def _run_transformers(self, batch: list[Image.Image], use: Callable[..., None]) -> None:
        model = self.model
        was_training = model.training
        model.eval()
        try:
            inputs = self.processor(images=[image.convert("RGB") for image in batch], return_tensors="pt")
            outputs = model(**inputs.to(next(model.parameters()).device))
        finally:
            model.train(was_training)
        sizes = torch.tensor([(image.height, image.width) for image in batch], device=outputs.logits.device)

        def finish(logits: Tensor) -> list[Detections]:
            post_process = self.processor.post_process_object_detection
            takes_limit = self.max_detections is not None and "top_k" in signature(post_process).parameters
            found = post_process(
                SimpleNamespace(logits=logits, pred_boxes=outputs.pred_boxes),
                threshold=0.0 if self.score_threshold is None else self.score_threshold,
                target_sizes=sizes,
                **({"top_k": self.max_detections} if takes_limit else {}),
            )
            return self._detections(found)

        use(outputs.logits, finish)

    def _detections(self, found: Sequence[Any]) -> list[Detections]:
        detections = []
        for one in found:
            order = one["scores"].argsort(descending=True, stable=True)[: self.max_detections]
            boxes, labels, scores = (one[name].detach()[order].cpu() for name in ("boxes", "labels", "scores"))
            detections.append(Detections(boxes, labels - self.head.first_label, scores))
        return detections


def _owner(model: Any) -> Any:
    """Return what of a model of torchvision holds the thresholds and makes detections of logits."""
    return model.roi_heads if isinstance(model, FasterRCNN) else model


def _suppressed(owner: Any, postprocess: Callable[..., Any], logits: Tensor, rest: Sequence[Any]) -> list[Any]:
    """Return the detections of a Faster R-CNN, without comparing all pairs of a box and a class where few are needed.

    With LVIS's classes and a low threshold a million pairs of an image can reach suppression, which takes seconds. No
    box is suppressed by one with a lower score, so a higher threshold gives the same detections if as many are left as
    the detector returns; if there are fewer, it is lowered, to the detector's own in the end.
    """
    wanted, own = owner.detections_per_img, owner.score_thresh
    outputs = logits.softmax(dim=-1)[:, 1:].split([len(boxes) for boxes in rest[1]])
    candidates = _CANDIDATES * wanted
    try:
        while True:
            kth = [
                float(scores.flatten().topk(candidates, sorted=False).values.min())
                for scores in outputs
                if scores.numel() > candidates
            ]
            # an image with fewer pairs than that keeps all of them
            owner.score_thresh = max(own, min(kth)) if len(kth) == len(outputs) > 0 else own
            found = postprocess(logits, *rest)
            if owner.score_thresh == own or all(len(scores) >= wanted for scores in found[1]):
                break
            candidates *= 4
    finally:
        owner.score_thresh = own
    names = ("boxes", "scores", "labels")
    return [dict(zip(names, one, strict=True)) for one in zip(*found, strict=True)]


def _run_with_hooks(model: Any, head: ClassHead, batch: list[Image.Image], use: Callable[[Tensor], None]) -> None:
    """Call ``use`` with the outputs of the class layers: (N, L) of a Linear, (N, A · L, H, W) of a Conv2d."""

    def take(_: Any, __: Any, output: Tensor) -> None:
        is_map = output.ndim == 4
        use(output.unflatten(1, (-1, head.num_outputs)).movedim(2, -1) if is_map else output)

    handles = [layer.register_forward_hook(take) for layer in dict.fromkeys(head.layers)]
    try:
        list(model.find(batch))
    finally:
        for handle in handles:
            handle.remove()


def _batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def on_device(model: Any, device: torch.device) -> Any:
    """Return a copy of a detector on a device; the same one if it is there."""
    here = next(model.parameters()).device if isinstance(model, torch.nn.Module) else model.device
    return model if here == device else copy.deepcopy(model).to(device)

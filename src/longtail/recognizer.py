"""The thing that a user keeps: encoder, classifier, class names, preprocessing and priors, in one folder.

Legend: N images, C classes, S side in pixels.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from PIL import Image
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from longtail.data.images import to_square
from longtail.data.pictures import open_image
from longtail.data.views import center, to_float
from longtail.errors import LongtailError
from longtail.evaluation.calibration import conformal_thresholds
from longtail.evaluation.shift import EstimatedPrior, estimate_map
from longtail.files import write_json, write_text, write_whole
from longtail.modelcard import model_card
from longtail.nn import CosineClassifier, Encoder, JoinedClassifier, LinearClassifier, ProjectionMLP
from longtail.objectives import log_prior, posterior
from longtail.objectives.posterior import along

Classifier = CosineClassifier | LinearClassifier | JoinedClassifier
_Self = TypeVar("_Self", bound="Recognizer")
_FILES = ["config.json", "model.safetensors", "validation.safetensors", "README.md"]
_PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"})
_CLASSES = {"classification": "Recognizer", "segmentation": "Segmenter"}
ImageLike = str | Path | Image.Image | np.ndarray[Any, Any] | Tensor


@dataclass(frozen=True, kw_only=True)
class Card:
    """What ``config.json`` holds."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    class_names: tuple[str, ...]
    class_counts: tuple[int, ...]
    """Training images a class; of a segmentation its labelled pixels."""
    network: str
    task: Literal["classification", "segmentation"] = "classification"
    """Whether an image has one class, or every pixel its own."""
    scale: float
    """Of the cosine classifier."""
    head: Literal["cosine", "linear", "joined"] = "cosine"
    """What the classifier is: linear after ``longtail rebalance``, joined with a mixture by ``gml.join_weight``."""
    keys: tuple[int, int] = (0, 0)
    """Number and width of those keys."""
    join_weight: float = 0.0
    """Weight of the mixture's log-likelihood beside the classifier's score."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    """S: what the network sees."""
    stored_size: int
    """Side that an image is resized to before its centre is cut out."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """What scores are divided by, fitted on the validation images; 1 where there were none."""
    class_temperatures: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = ()
    """The same by predicted class, where every shot group has its own."""
    shape: tuple[int, int] | None = None
    """Height and width of most images that were segmented; others will do."""
    predicts_under: Literal["uniform", "train"]
    """The prior that is in the scores: the training set's after plain cross-entropy, else none."""
    trained: dict[str, Any] = field(default_factory=dict)
    """How: method, recipe, epochs, seed, versions, seconds."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """On the test set."""

    @property
    def channels(self) -> int:
        """3 for colour, 1 for grey."""
        return len(self.mean)


class HeldOut(NamedTuple):
    """What a model made of the M validation images, under the uniform prior."""

    labels: Tensor
    """(M,) int64."""
    predicted: Tensor
    """(M,) int64."""
    true_probability: Tensor
    """(M,) float32, the probability of the label."""
    bias: Tensor
    """(C,) float32, what their scores lack, see :func:`~longtail.evaluation.calibration.fit_bias`."""
    halves: Tensor
    """(2, C) float32, the same as each half of the images of every class says it: by how far it can be believed."""


@dataclass(frozen=True)
class Predictions:
    """Probabilities with the names of what they are of."""

    probabilities: Tensor
    """(N, C)."""
    class_names: tuple[str, ...]
    prior: EstimatedPrior | None = None
    """Class frequencies that were estimated from these images, where that was asked for."""
    in_set: Tensor | None = None
    """(N, C) bool, the classes in an image's conformal set, where a coverage was asked for."""

    @property
    def labels(self) -> Tensor:
        """(N,) most probable class of each image."""
        return self.probabilities.argmax(dim=1)

    @property
    def names(self) -> list[str]:
        """Its name."""
        return [self.class_names[label] for label in self.labels.tolist()]

    @property
    def sets(self) -> list[list[str]] | None:
        """The names of the classes in each image's conformal set."""
        if self.in_set is None:
            return None
        return [[self.class_names[c] for c in row.nonzero()[:, 0].tolist()] for row in self.in_set]

    def top(self, k: int = 5) -> list[list[tuple[str, float]]]:
        """Return the k most probable classes of each image with their probabilities, best first."""
        values, indices = self.probabilities.topk(min(k, len(self.class_names)), dim=1)
        return [
            [(self.class_names[index], value) for index, value in zip(row, probabilities, strict=True)]
            for row, probabilities in zip(indices.tolist(), values.tolist(), strict=True)
        ]


class Recognizer(ModelHubMixin, library_name="longtail", tags=["longtail"]):
    """A trained long-tailed recogniser.

    Args:
        encoder: images in [0, 1] to features.
        classifier: features to scores.
        card: everything else.
        held_out: what it made of the validation images, where there were some.

    Example:
        >>> from longtail import Recognizer
        >>> recognizer = Recognizer.load("runs/digits-lt")            # doctest: +SKIP
        >>> recognizer.predict(["photo.png"], prior="uniform").names  # doctest: +SKIP
    """

    task = "classification"

    def __init__(self, encoder: Encoder, classifier: Classifier, card: Card, held_out: HeldOut | None = None) -> None:
        self.encoder, self.classifier, self.card, self.held_out = encoder.eval(), classifier.eval(), card, held_out

    @torch.no_grad()
    def scores(self, images: Tensor) -> Tensor:
        """Return (N, C) log-likelihood scores, free of any prior, of (N, channels, S, S) images in [0, 1]."""
        return self.free(self.trained_scores(images))

    def trained_scores(self, images: Tensor) -> Tensor:
        """Return the classifier's own scores, which after plain cross-entropy have the training prior in them."""
        scores: Tensor = self.classifier(self.encoder(images.contiguous(memory_format=torch.channels_last))).float()
        return scores

    def free(self, scores: Tensor) -> Tensor:
        """Return scores free of any prior, divided by the temperature."""
        if self.card.predicts_under == "train":
            scores = scores - along(self._log_counts.to(scores), scores)
        if self.card.class_temperatures:
            by_class = torch.tensor(self.card.class_temperatures, device=scores.device)
            return scores / by_class[scores.argmax(dim=1)][:, None]
        return scores if self.card.temperature == 1 else scores / self.card.temperature

    @functools.cached_property
    def _log_counts(self) -> Tensor:
        return log_prior(self.card.class_counts)

    def log_prior(self, prior: str | Sequence[float] | Tensor) -> Tensor | None:
        """Return the logarithm of ``uniform``, ``train``, or C class frequencies."""
        if isinstance(prior, str):
            if prior not in {"uniform", "train"}:
                raise LongtailError(f"prior '{prior}': expected uniform, train, or one frequency a class")
            return log_prior(self.card.class_counts) if prior == "train" else None
        given = torch.as_tensor(prior, dtype=torch.float64)
        classes = len(self.card.class_names)
        if given.shape != (classes,) or not bool((given > 0).all()):
            raise LongtailError(f"prior: expected {classes} positive frequencies, got shape {tuple(given.shape)}")
        return (given / given.sum()).log().float()

    def predict(
        self,
        images: ImageLike | Iterable[ImageLike],
        prior: str | Sequence[float] | Tensor = "uniform",
        batch_size: int = 256,
        coverage: float | None = None,
    ) -> Predictions:
        """Return class probabilities.

        Args:
            images: files, Pillow images, arrays (H, W) or (H, W, channels) of uint8, or a tensor (N, channels, H, W)
                of uint8, or of floats in [0, 1].
            prior: how frequent the classes are where the images come from: ``uniform``, ``train`` (as in the training
                set), C frequencies, or ``estimate``: from these images themselves (:meth:`estimated`).
            batch_size: images at a time.
            coverage: share of each class's images that have it in their conformal set, in (0, 1); no sets if not given.

        Raises:
            LongtailError: a file cannot be read, the prior does not fit, or there were no validation images to make
                sets from.
        """
        bias = None if isinstance(prior, str) and prior == "estimate" else self.log_prior(prior)
        thresholds = None if coverage is None else self.thresholds(coverage)
        parts = [self.scores(batch).cpu() for batch in self._batches(images, batch_size)]
        scores = torch.cat(parts) if parts else torch.empty(0, len(self.card.class_names))
        estimated = None
        if isinstance(prior, str) and prior == "estimate":
            estimated = self.estimated(scores)
            bias = self.log_prior(self.effective(estimated))
        in_set = None if thresholds is None else posterior(scores).exp() >= thresholds.to(scores)
        return Predictions(posterior(scores, bias).exp(), self.card.class_names, estimated, in_set)

    def estimated(self, scores: Tensor, weights: Tensor | None = None) -> EstimatedPrior:
        """Return the class frequencies of images from their scores: :func:`~longtail.evaluation.shift.estimate_map`.

        Args:
            scores: (N, C) as :meth:`scores` gives them.
            weights: (N,) how much each image counts; alike if not given.

        Raises:
            LongtailError: there is no image.
        """
        if len(scores) == 0:
            raise LongtailError("prior estimate: there are no images to estimate it from")
        known = self.held_out
        bias, halves = (None, None) if known is None else (known.bias.numpy(), known.halves.numpy())
        return estimate_map(scores.cpu().numpy(), self.card.class_counts, bias, halves, weights)

    def effective(self, estimated: EstimatedPrior) -> list[float]:
        """Return (C,) frequencies to predict under: the estimated, and with them what the scores lack."""
        if self.held_out is None:
            return estimated.frequencies
        lacking: Tensor = torch.tensor(estimated.frequencies, dtype=torch.float64) * self.held_out.bias.double().exp()
        return lacking.tolist()

    def thresholds(self, coverage: float) -> Tensor:
        """Return (C,) probabilities under the uniform prior from which on a class is in a conformal set."""
        if not 0 < coverage < 1:
            raise LongtailError(f"coverage {coverage}: expected a share between 0 and 1")
        if self.held_out is None:
            raise LongtailError(
                "coverage: the run had no validation images to promise it by; train with some (--data.val_fraction 0.1)"
            )
        return conformal_thresholds(
            self.held_out.true_probability, self.held_out.labels, len(self.card.class_names), coverage
        )

    def _batches(self, images: ImageLike | Iterable[ImageLike], batch_size: int) -> Iterable[Tensor]:
        device = self.classifier.weight.device
        if isinstance(images, Tensor) and images.ndim == 4:
            for part in images.split(batch_size):
                pixels = part if part.dtype == torch.uint8 else (part.clamp(0, 1) * 255).round().to(torch.uint8)
                if pixels.shape[1:] == (self.card.channels, self.card.image_size, self.card.image_size):
                    yield (to_float(pixels) if part.dtype == torch.uint8 else part).to(device)
                else:
                    yield self._prepared([to_pillow(image) for image in pixels]).to(device)
            return
        if isinstance(images, str | Path | Image.Image | np.ndarray | Tensor):
            images = [images]
        batch: list[Image.Image] = []
        for image in images:
            batch.append(to_pillow(image))
            if len(batch) == batch_size:
                yield self._prepared(batch).to(device)
                batch = []
        if batch:
            yield self._prepared(batch).to(device)

    def _prepared(self, images: list[Image.Image]) -> Tensor:
        pixels = torch.stack([to_square(image, self.card.stored_size, self.card.channels) for image in images])
        return to_float(center(pixels, self.card.image_size))

    def prepared(self, image: Image.Image) -> Tensor:
        """Return an image as the network sees it, (1, channels, S, S) in [0, 1]."""
        return self._prepared([image]).to(self.classifier.weight.device)

    def to(self, device: torch.device | str) -> Recognizer:
        """Move to ``device``."""
        self.encoder.to(device)
        self.classifier.to(device)
        return self

    def save(self, folder: Path | str) -> None:
        """Write ``model.safetensors``, ``config.json`` and ``README.md``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"encoder.{name}": tensor for name, tensor in self.encoder.state_dict().items()}
        tensors |= {f"classifier.{name}": tensor for name, tensor in self.classifier.state_dict().items()}
        plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        write_whole(folder / "model.safetensors", lambda partial: save_file(plain, partial))
        if self.held_out is not None:
            kept = {name: t.detach().cpu().contiguous() for name, t in self.held_out._asdict().items()}
            write_whole(folder / "validation.safetensors", lambda partial: save_file(kept, partial))
        write_text(folder / "README.md", model_card(self.card))
        # last: what has it is whole
        write_json(folder / "config.json", dataclasses.asdict(self.card))

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write what :meth:`save` writes; ``save_pretrained`` and ``push_to_hub`` of huggingface_hub call this."""
        self.save(save_directory)

    @classmethod
    def _from_pretrained(
        cls: type[_Self],
        *,
        model_id: str,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **_: Any,
    ) -> _Self:
        folder = snapshot_download(
            model_id,
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
            allow_patterns=_FILES,  # weights as safetensors; nothing that could run code is fetched
        )
        return cls.load(folder)

    @classmethod
    def from_pretrained(cls: type[_Self], pretrained_model_name_or_path: str | Path, **options: Any) -> _Self:
        """Read a recogniser from its folder, or by its name on the Hugging Face Hub.

        Args:
            pretrained_model_name_or_path: folder, or ``owner/name``.
            options: as huggingface_hub's ``ModelHubMixin`` takes them: revision, token, cache_dir, local_files_only, ….

        Raises:
            LongtailError: it cannot be had, or its files do not fit together.
        """
        if Path(pretrained_model_name_or_path).is_dir():
            return cls.load(pretrained_model_name_or_path)
        try:
            found: _Self = super().from_pretrained(pretrained_model_name_or_path, **options)
        except LongtailError:
            raise
        except (OSError, ValueError) as error:  # the network's, the Hub's, and what a name is refused for
            reason = " ".join(str(error).split())[:200]
            raise LongtailError(
                f"'{pretrained_model_name_or_path}': is no folder, and cannot be had from the Hub: {reason}"
            ) from None
        return found

    @classmethod
    def load(cls: type[_Self], folder: Path | str) -> _Self:
        """Read a recogniser from its folder, or from the folder of its run.

        Raises:
            LongtailError: there is none, or its files do not fit together.
        """
        folder = _recognizer_folder(Path(folder))
        card = _read_card(folder)
        if card.task != cls.task:
            raise LongtailError(f"{folder}: is for {card.task}, not for {cls.task}: use {_CLASSES[card.task]}.load")
        encoder = Encoder(card.network, card.mean, card.std)
        classifier = _classifier(card, encoder.num_features)
        try:
            tensors = load_file(folder / "model.safetensors")
            for name, module in (("encoder.", encoder), ("classifier.", classifier)):
                module.load_state_dict({k.removeprefix(name): t for k, t in tensors.items() if k.startswith(name)})
        except (SafetensorError, RuntimeError, OSError) as error:
            message = " ".join(str(error).split())[:200]
            raise LongtailError(f"{folder / 'model.safetensors'}: does not fit config.json: {message}") from None
        encoder.to(memory_format=torch.channels_last)
        return cls(encoder, classifier, card, _held_out(folder / "validation.safetensors", len(card.class_names)))


def read_card(folder: Path | str) -> Card:
    """Read what ``config.json`` of a recogniser's folder, or of its run's, holds.

    Raises:
        LongtailError: there is none, or it is not as it must be.
    """
    return _read_card(_recognizer_folder(Path(folder)))


def _recognizer_folder(folder: Path) -> Path:
    if (folder / "recognizer").is_dir():
        folder = folder / "recognizer"
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        unfinished = (folder / "config.yaml").is_file()
        hint = "the run has not finished; --resume it" if unfinished else "expected the folder of a finished run"
        raise LongtailError(f"{folder}: holds no recogniser: {hint}")
    pickle = next((path for path in sorted(folder.iterdir()) if path.suffix.lower() in _PICKLES), None)
    if pickle is not None:
        raise LongtailError(f"{pickle}: may run code when it is read; weights are safetensors: remove it")
    return folder


def _read_card(folder: Path) -> Card:
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        card: Card = TypeAdapter(Card).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise LongtailError(f"{folder / 'config.json'}: {where}: {first['msg']}") from None
    except (OSError, ValueError) as error:
        raise LongtailError(f"{folder / 'config.json'}: cannot be read: {error}") from None
    return card


def _held_out(path: Path, classes: int) -> HeldOut | None:
    if not path.is_file():
        return None
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise LongtailError(f"{path}: cannot be read: {' '.join(str(error).split())[:200]}") from None
    if set(tensors) != set(HeldOut._fields):
        raise LongtailError(
            f"{path}: holds {', '.join(sorted(tensors))}, expected {', '.join(HeldOut._fields)}: another version's; "
            "train again with --resume, or remove it and do without"
        )
    found = HeldOut(**tensors)
    labels = found.labels
    lengths = {len(found.predicted), len(found.true_probability), len(labels)}
    shapes = found.bias.shape, found.halves.shape
    if len(lengths) > 1 or shapes != ((classes,), (2, classes)) or not bool(((labels >= 0) & (labels < classes)).all()):
        raise LongtailError(f"{path}: is not of the {classes} classes of config.json")
    return found


def _classifier(card: Card, features: int) -> Classifier:
    """Return a classifier whose tensors are still to be read."""
    if card.head == "linear":
        return LinearClassifier(features, len(card.class_names))
    cosine = CosineClassifier(features, len(card.class_names), card.scale)
    if card.head == "cosine":
        return cosine
    count, width = card.keys
    labels = torch.full((count,), -1, dtype=torch.int64)
    return JoinedClassifier(
        cosine, ProjectionMLP(features, width), torch.zeros(count, width), labels, torch.ones(()), card.join_weight
    )


def to_pillow(image: ImageLike) -> Image.Image:
    """Return a file, an array or a tensor as a Pillow image."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, str | Path):
        return open_image(Path(image))
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8:
            image = (image.clamp(0, 1) * 255).round().to(torch.uint8)
        image = image.detach().cpu().permute(1, 2, 0).numpy() if image.ndim == 3 else image.detach().cpu().numpy()
    if image.dtype != np.uint8 or image.ndim not in {2, 3}:
        raise LongtailError(
            f"image: expected an array of uint8, (H, W) or (H, W, channels), got {image.dtype} of shape {image.shape}"
        )
    return Image.fromarray(image[:, :, 0] if image.ndim == 3 and image.shape[2] == 1 else image)

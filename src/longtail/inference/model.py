"""What every trained model is: encoder, classifier, classes, preprocessing and priors, saved in one folder.

Legend: N images, C classes, H and W sides in pixels.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from longtail.errors import LongtailError
from longtail.evaluation.class_frequencies import resolve_class_frequencies
from longtail.files import atomic_write, write_json, write_text
from longtail.inference.model_card import ModelCardText, model_card
from longtail.inference.model_config import PLUGIN_HINT, ModelConfig, model_folder, read_model_config
from longtail.losses import compute_log_prior
from longtail.losses.score_loss import broadcast_to_classes
from longtail.nn import (
    CosineClassifier,
    Encoder,
    ExpertClassifier,
    LinearClassifier,
    MixtureEnsembleHead,
    ProjectionMLP,
    RegionClassifier,
)
from longtail.nn.encoder import channels_last
from longtail.nn.experts import split_experts
from longtail.registry import TASKS

Classifier = CosineClassifier | LinearClassifier | MixtureEnsembleHead | RegionClassifier
Prior = str | Path | Mapping[str, float] | Sequence[float] | Tensor
_Self = TypeVar("_Self", bound="TrainedModel")
_FILES = ["config.json", "model.safetensors", "validation.safetensors", "README.md"]


class CalibrationStats(NamedTuple):
    """Predictions of a model on the M validation images under the uniform prior; saved with it."""

    labels: Tensor
    """(M,) int64."""
    predicted: Tensor
    """(M,) int64."""
    true_probability: Tensor
    """(M,) float32, probability of the label."""
    bias: Tensor
    """(C,) float32, correction of the scores, see :func:`~longtail.evaluation.calibration.fit_bias`."""
    halves: Tensor
    """(2, C) float32, the same fitted on each half of the images of every class: how certain it is."""


class TrainedModel(ModelHubMixin, ABC, library_name="longtail", tags=["longtail"]):
    """A trained model.

    Args:
        encoder: images in [0, 1] to features.
        classifier: features to scores.
        config: everything else.
        calibration_stats: its predictions on the validation images, if there were some.
    """

    build_backbone: ClassVar[Callable[[str, int, str], nn.Module]]
    """Builds a network by its name, for a number of channels, with some pretrained weights."""
    card_text: ClassVar[ModelCardText]

    def __init__(
        self,
        encoder: Encoder,
        classifier: Classifier,
        config: ModelConfig,
        calibration_stats: CalibrationStats | None = None,
    ) -> None:
        self.encoder, self.classifier, self.config = encoder.eval(), classifier.eval(), config
        self.calibration_stats = calibration_stats

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.classifier.weight.device

    @torch.no_grad()
    def scores(self, images: Tensor) -> Tensor:
        """Return (N, C) log-likelihood scores, free of any prior, of (N, channels, S, S) images in [0, 1].

        Raises:
            LongtailError: the images are not floats.
        """
        return self.remove_prior(self.raw_scores(images))

    def raw_scores(self, images: Tensor) -> Tensor:
        """Return the scores of the classifier, which contain the training prior after plain cross-entropy.

        Raises:
            LongtailError: the images are not floats. Their values are not checked: an accelerator's would have to be
                waited for.
        """
        if not images.is_floating_point():
            raise LongtailError(f"images: expected floats in [0, 1], got {images.dtype}; for uint8 take images / 255")
        scores: Tensor = self.classifier(self.encoder(channels_last(images))).float()
        return scores

    def remove_prior(self, scores: Tensor) -> Tensor:
        """Return raw scores free of any prior, divided by the temperature.

        A class without training images has no frequency to divide by: its score, which the training of plain
        cross-entropy lowered on every image, stays as it is. Under the uniform prior it is then predicted only where it
        is the highest raw score already, and under the training prior never.
        """
        if self.config.predicts_under == "train":
            scores = scores - broadcast_to_classes(self._removed_prior.to(scores), scores)
        if self.config.class_temperatures:
            by_class = torch.tensor(self.config.class_temperatures, device=scores.device)
            return scores / by_class[scores.argmax(dim=1)][:, None]
        return scores if self.config.temperature == 1 else scores / self.config.temperature

    @functools.cached_property
    def _log_counts(self) -> Tensor:
        return compute_log_prior(self.config.class_counts)

    @functools.cached_property
    def _removed_prior(self) -> Tensor:
        return self._log_counts.masked_fill(self._log_counts == -math.inf, 0.0)

    def log_prior(self, prior: Prior) -> Tensor | None:
        """Return the (C,) logarithms of class frequencies, None for the uniform ones.

        Args:
            prior: ``uniform``, ``train``, C frequencies, a mapping from class name to frequency, or a file of them.

        Raises:
            LongtailError: the frequencies do not fit the classes.
        """
        if isinstance(prior, str) and prior == "uniform":
            return None
        if isinstance(prior, str) and prior == "train":
            return self._log_counts
        frequencies = resolve_class_frequencies(
            prior.tolist() if isinstance(prior, Tensor) else prior, self.config.class_names, self.config.class_counts
        )
        return torch.tensor(frequencies, dtype=torch.float64).log().float()

    @classmethod
    def build_classifier(cls, config: ModelConfig, encoder: Encoder) -> Classifier:
        """Return a classifier whose weights are still to be loaded."""
        return _build_classifier(config, encoder.num_features)

    @abstractmethod
    def preprocess(self, image: Image.Image) -> Tensor:
        """Return an image as the network sees it, (1, channels, H, W) in [0, 1]."""

    @abstractmethod
    def export_input(self, image: Image.Image, size: tuple[int, int]) -> Tensor:
        """Return an image as an exported file takes it, (H, W, channels) uint8.

        Args:
            image: of any size.
            size: (H, W).
        """

    def to(self: _Self, device: torch.device | str) -> _Self:
        """Move to ``device``."""
        self.encoder.to(device)
        self.classifier.to(device)
        return self

    def save(self, folder: Path | str) -> None:
        """Write ``model.safetensors``, ``config.json`` and ``README.md``.

        Raises:
            LongtailError: they cannot be written.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # a model that is there stays whole until all of the new one is on the disk
            with tempfile.TemporaryDirectory(prefix=".", suffix=".partial", dir=folder) as place:
                self._write(Path(place))
                (folder / "config.json").unlink(missing_ok=True)
                (folder / "validation.safetensors").unlink(missing_ok=True)
                for path in sorted(Path(place).iterdir(), key=lambda path: path.name == "config.json"):
                    path.replace(folder / path.name)  # last config.json: a folder that has it is complete
        except OSError as error:
            raise LongtailError(f"{folder}: cannot be written: {error.strerror or error}") from None

    def _write(self, folder: Path) -> None:
        tensors = {f"encoder.{name}": tensor for name, tensor in self.encoder.state_dict().items()}
        tensors |= {f"classifier.{name}": tensor for name, tensor in self.classifier.state_dict().items()}
        weights = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        atomic_write(folder / "model.safetensors", lambda partial: save_file(weights, partial))
        if self.calibration_stats is not None:
            stats = {name: t.detach().cpu().contiguous() for name, t in self.calibration_stats._asdict().items()}
            atomic_write(folder / "validation.safetensors", lambda partial: save_file(stats, partial))
        write_text(folder / "README.md", model_card(self.config, self.card_text))
        write_json(folder / "config.json", dataclasses.asdict(self.config))

    def save_pretrained(
        self, save_directory: Path | str, *, repo_id: str | None = None, push_to_hub: bool = False, **options: Any
    ) -> str | None:
        """Write what :meth:`save` writes, and return the address of the commit if it is also pushed to the Hub.

        That of huggingface_hub removes ``config.json`` first, so that where writing fails a model that is there would
        be lost.

        Args:
            save_directory: the folder.
            repo_id: name on the Hub; that of the folder if not given.
            push_to_hub: whether to push it.
            options: of huggingface_hub's ``push_to_hub``: private, token, branch, ….

        Raises:
            LongtailError: the files cannot be written.
        """
        self.save(save_directory)
        if not push_to_hub:
            return None
        address: str = self.push_to_hub(repo_id or Path(save_directory).name, **options)
        return address

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
            allow_patterns=_FILES,  # weights as safetensors; nothing that could run code is downloaded
        )
        return cls.load(folder)

    @classmethod
    def from_pretrained(cls: type[_Self], pretrained_model_name_or_path: str | Path, **options: Any) -> _Self:
        """Read a model from its folder, or by its name on the Hugging Face Hub.

        Args:
            pretrained_model_name_or_path: folder, or ``owner/name``.
            options: as huggingface_hub's ``ModelHubMixin`` takes them: revision, token, cache_dir, local_files_only, ….

        Raises:
            LongtailError: it cannot be downloaded, or its files do not fit together.
        """
        if Path(pretrained_model_name_or_path).is_dir():
            return cls.load(pretrained_model_name_or_path)
        try:
            model: _Self = super().from_pretrained(pretrained_model_name_or_path, **options)
        except LongtailError:
            raise
        except (OSError, ValueError) as error:  # the network's, the Hub's, and what a name is refused for
            reason = " ".join(str(error).split())[:200]
            raise LongtailError(
                f"'{pretrained_model_name_or_path}': is not a folder and could not be downloaded from the Hub: {reason}"
            ) from None
        return model

    @classmethod
    def load(cls: type[_Self], folder: Path | str) -> _Self:
        """Read a model from its folder, or from the folder of its run.

        Raises:
            LongtailError: there is none, it is another task's, or its files do not fit together.
        """
        config, folder = read_model_config(folder), model_folder(folder)
        model_class = TASKS[config.task].model_class
        if not issubclass(model_class, cls):  # a task of a plugin may have the models of another one
            raise LongtailError(
                f"{folder}: is a model for {config.task}, which is not for {cls.__name__}: use "
                f"{model_class.__name__}.load"
            )
        size, build = config.network_size, cls.build_backbone
        try:
            encoder = Encoder(config.network, config.mean, config.std, resize=size, build=build)
        except LongtailError as error:
            raise LongtailError(f"{folder / 'config.json'}: {error} {PLUGIN_HINT}") from None
        if config.experts > 1:
            split_experts(encoder, config.experts, config.expert_stages)
        classifier = cls.build_classifier(config, encoder)
        try:
            tensors = load_file(folder / "model.safetensors")
            for name, module in (("encoder.", encoder), ("classifier.", classifier)):
                module.load_state_dict({k.removeprefix(name): t for k, t in tensors.items() if k.startswith(name)})
        except (SafetensorError, RuntimeError, OSError) as error:
            message = " ".join(str(error).split())[:200]
            raise LongtailError(f"{folder / 'model.safetensors'}: does not fit config.json: {message}") from None
        encoder.to(memory_format=torch.channels_last)
        stats = _read_calibration_stats(folder / "validation.safetensors", len(config.class_names))
        return cls(encoder, classifier, config, stats)


def _read_calibration_stats(path: Path, num_classes: int) -> CalibrationStats | None:
    if not path.is_file():
        return None
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise LongtailError(f"{path}: cannot be read: {' '.join(str(error).split())[:200]}") from None
    if set(tensors) != set(CalibrationStats._fields):
        raise LongtailError(
            f"{path}: holds {', '.join(sorted(tensors))}, expected {', '.join(CalibrationStats._fields)}: it was saved "
            "by another version; train again with --resume, or remove the file and do without"
        )
    stats = CalibrationStats(**tensors)
    labels = stats.labels
    lengths = {len(stats.predicted), len(stats.true_probability), len(labels)}
    shapes = stats.bias.shape, stats.halves.shape
    in_range = bool(((labels >= 0) & (labels < num_classes)).all())
    if len(lengths) > 1 or shapes != ((num_classes,), (2, num_classes)) or not in_range:
        raise LongtailError(f"{path}: does not fit the {num_classes} classes of config.json")
    return stats


def _build_classifier(config: ModelConfig, num_features: int) -> Classifier:
    """Return a classifier whose weights are still to be loaded."""
    num_classes = len(config.class_names)
    if config.head == "linear":
        return LinearClassifier(num_features, num_classes)
    if config.head == "experts":
        return ExpertClassifier(num_features, num_classes, config.scale, config.experts)
    num_features //= config.experts  # of the classifier, and of the mixture
    cosine = CosineClassifier(num_features, num_classes, config.scale)
    if config.head == "cosine":
        return cosine
    count, width = config.mixture_keys
    labels = torch.full((count,), -1, dtype=torch.int64)
    query_mlp, keys = ProjectionMLP(num_features, width), torch.zeros(count, width)
    return MixtureEnsembleHead(cosine, query_mlp, keys, labels, torch.ones(()), config.ensemble_weight)

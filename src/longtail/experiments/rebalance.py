"""A new classifier on a trained encoder: decoupled training.

Source: Kang et al., *Decoupling Representation and Classifier for Long-Tailed Recognition*, ICLR 2020,
arXiv 1910.09217. Legend: N images, V views, F feature width, C classes.

The classifier is linear without bias, trained on the frozen encoder's features of a few augmented views:

    crt    from zero, with class-balanced sampling
    lws    with instance sampling; then a learned factor f_c of the score of every class, with class-balanced sampling
    tau    with instance sampling; then w_c / ‖w_c‖^τ

Post-hoc logit adjustment needs no new classifier: it is the uniform prior at prediction (``longtail evaluate`` shows
both).
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtail.config import Config
from longtail.data.dataset import ImageSet, LongTailedData
from longtail.data.loader import TrainLoader
from longtail.errors import LongtailError
from longtail.evaluation.metrics import classification_metrics, count_correct
from longtail.files import write_text
from longtail.inference.features import encode_split
from longtail.inference.kept_features import FeatureImages, feature_data
from longtail.inference.model import TrainedModel
from longtail.nn import LinearClassifier
from longtail.nn.encoder import channels_last
from longtail.randomness import mix
from longtail.registry import TASKS
from longtail.tasks.evaluate import evaluate_split
from longtail.tasks.loading import load_run

RebalanceMethod = Literal["crt", "lws", "tau"]

_HEAD = mix(6)  # an independent stream of random draws
_BATCH = 512
MIN_STEPS = 2000  # a small set needs more passes than a large one
_TAUS = tuple(step / 10 for step in range(21))


@dataclasses.dataclass(frozen=True)
class RebalanceSettings:
    """How the classifier is trained."""

    method: RebalanceMethod
    epochs: int = 10
    """Passes over the features of all views, for each fit; more where they are fewer than 2,000 steps."""
    views: int = 4
    """V, augmented views of every training image."""
    tau: float | None = None
    """τ; chosen on the validation images if not given, 1 where there are none."""
    learning_rate: float = 0.1
    weight_decay: float = 5e-4


def rebalance(
    run: Path, out: Path, settings: RebalanceSettings, data_root: str | None = None
) -> dict[str, dict[str, Any]]:
    """Train a new classifier on a run's encoder, evaluate it, and save it as a run of its own.

    Args:
        run: folder of a finished run; it is not changed.
        out: folder of the new one: ``config.yaml``, ``metrics.jsonl``, ``recognizer/``.
        settings: how.
        data_root: where the images are now, if not where they were.

    Returns:
        Metrics on the test set, under the prior ``uniform`` and under ``train``.

    Raises:
        LongtailError: the run has not finished, ``out`` is not empty, or a setting is out of its range.
    """
    for name, low in (("epochs", 1), ("views", 1)):
        if getattr(settings, name) < low:
            raise LongtailError(f"--{name} {getattr(settings, name)}: expected at least {low}")
    if settings.tau is not None and not 0 <= settings.tau <= 10:
        raise LongtailError(f"--tau {settings.tau}: expected a value between 0 (no change) and 10")
    if out.exists() and any(out.iterdir()):
        raise LongtailError(f"{out}: is not empty; choose another --out")
    # the random state of the caller stays as it is
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        model, config, data = load_run(run, data_root)
        task = TASKS[data.task]
        if task.label_maps:
            raise LongtailError(f"{run}: labels pixels; a new classifier is supported for whole images only")
        started = time.monotonic()
        source = data
        if config.tune == "head":  # its features are kept
            data = feature_data(data, model.encoder, config, device=model.device)
        torch.manual_seed(mix(config.seed, _HEAD))
        features, labels = _augmented_features(model, config, data, settings.views)
        validation = None
        if data.val is not None:
            validation = (*plain_features(model, data.val), config, list(data.class_counts))
        head, tau = fit_head(features, labels, len(data.class_names), settings, validation)
    training_info = {
        **model.config.training_info,
        "rebalanced": settings.method,
        "rebalanced_seconds": round(time.monotonic() - started, 3),
        **({"tau": tau} if settings.method == "tau" else {}),
    }
    model_config = dataclasses.replace(
        model.config,
        head="linear",
        predicts_under="uniform",
        training_info=training_info,
        metrics={},
        temperature=1.0,
        class_temperatures=(),
        temperature_fits={},
    )
    rebalanced = type(model)(model.encoder, head, model_config)
    if data.val is not None:
        rebalanced = task.calibrate(rebalanced, data.val, config)
    metrics = evaluate_split(rebalanced, data.test, config)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LongtailError(f"{out}: cannot be made: {error.strerror}") from None
    rebalanced.config = dataclasses.replace(rebalanced.config, metrics=metrics["uniform"])
    rebalanced.save(out / "recognizer")
    task.save_examples(out, source.test, metrics[rebalanced.config.predicts_under])
    write_text(out / "config.yaml", config.to_yaml())
    write_text(out / "metrics.jsonl", json.dumps({"kind": "test", "step": 0, **metrics}) + "\n")
    return metrics


def fit_head(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    settings: RebalanceSettings,
    validation: tuple[Tensor, Tensor, Config, list[int]] | None = None,
) -> tuple[LinearClassifier, float | None]:
    """Return a linear head, and the τ that was used.

    Args:
        features: (N, F), the training images'.
        labels: (N,) int64 in [0, C).
        num_classes: C.
        settings: how.
        validation: features, labels, settings of the run and class counts, to choose τ with.
    """
    head = LinearClassifier(features.shape[1], num_classes).to(features.device)
    # features of different networks differ in scale; with mean square 1, one learning rate fits all
    size = features.square().mean().sqrt().clamp(min=1e-12)
    features = features / size
    if validation is not None:
        validation = (validation[0] / size, *validation[1:])
    _train(head, head.weight, features, labels, settings, balanced=settings.method == "crt")
    if settings.method == "lws":
        factors = nn.Parameter(torch.ones(num_classes, 1, device=features.device))
        weight = head.weight.detach().clone()

        def scaled(x: Tensor) -> Tensor:
            return F.linear(x, weight * factors)

        _train(scaled, factors, features, labels, settings, balanced=True)
        head.weight.data.copy_(weight * factors.detach())
    tau = None
    if settings.method == "tau":
        tau = settings.tau if settings.tau is not None else _best_tau(head, validation)
        head.weight.data.copy_(tau_normalize(head.weight.data, tau))
    head.weight.data.div_(size)
    return head, tau


def tau_normalize(weight: Tensor, tau: float) -> Tensor:
    """Return w_c / ‖w_c‖^τ; a weight of norm 0 stays 0."""
    norms = weight.norm(dim=1, keepdim=True)
    return torch.where(norms > 0, weight / norms.clamp(min=1e-12) ** tau, 0.0)


def _train(
    score: Any,
    parameter: nn.Parameter,
    features: Tensor,
    labels: Tensor,
    settings: RebalanceSettings,
    *,
    balanced: bool,
) -> None:
    counts = torch.bincount(labels).clamp(min=1)
    weights = (1.0 / counts)[labels]
    steps = -(-len(labels) // _BATCH)
    epochs = max(settings.epochs, -(-MIN_STEPS // steps))
    optimizer = torch.optim.SGD(
        [parameter], lr=settings.learning_rate, momentum=0.9, weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps * epochs)
    for _ in range(epochs):
        if balanced:
            order = torch.multinomial(weights, len(labels), replacement=True)
        else:
            order = torch.randperm(len(labels), device=labels.device)
        for rows in order.split(_BATCH):
            loss = F.cross_entropy(score(features[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def _augmented_features(model: TrainedModel, config: Config, data: LongTailedData, views: int) -> tuple[Tensor, Tensor]:
    """Return (V · N, F) features of augmented views of the training images, and their labels."""
    model.encoder.eval()
    kept = data.train.images
    if isinstance(kept, FeatureImages):
        labels_of_views = data.train.labels.repeat(len(kept.features))
        return torch.cat(kept.features).to(model.device), labels_of_views.to(model.device)
    transforms = TASKS[data.task].build_transforms(config, data, ["classification"])
    loader = TrainLoader(data.train, _BATCH, transforms, config.seed, workers=config.data.workers)
    features, labels = [], []
    for view in range(views):
        for batch in loader.epoch(view):
            features.append(model.encoder(channels_last(batch.views[0].to(model.device))).float())
            labels.append(batch.labels.to(model.device))
    return torch.cat(features), torch.cat(labels)


def plain_features(model: TrainedModel, images: ImageSet) -> tuple[Tensor, Tensor]:
    """Return (N, F) features of images without augmentation, and their labels."""
    model.encoder.eval()
    batches = list(encode_split(model.encoder, images, model.config.image_size, device=model.device))
    return torch.cat([features for features, _ in batches]), torch.cat([labels for _, labels in batches])


@torch.no_grad()
def _best_tau(head: LinearClassifier, validation: tuple[Tensor, Tensor, Config, list[int]] | None) -> float:
    if validation is None:
        return 1.0
    features, labels, config, counts = validation

    def accuracy(tau: float) -> float:
        correct = count_correct(F.linear(features, tau_normalize(head.weight, tau)), labels).cpu()
        balanced: float = classification_metrics(correct, counts, config.shots)["balanced_accuracy"]
        return balanced

    return max(_TAUS, key=accuracy)

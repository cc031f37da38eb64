"""A new head on a trained encoder: decoupled training.

Source: Kang et al., *Decoupling Representation and Classifier for Long-Tailed Recognition*, ICLR 2020,
arXiv 1910.09217. Legend: N images, V views, F feature width, C classes.

The head is linear and has no bias. What it is made from are the frozen encoder's features of a few augmented views:

    crt    from nothing, with classes shown equally often
    lws    as the images come; then a factor f_c of every class's score, with classes shown equally often
    tau    as the images come; then w_c / ‖w_c‖^τ

Post-hoc logit adjustment needs no new head: it is the uniform prior at prediction (``longtail evaluate`` shows both).
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
from longtail.data.loaders import TrainLoader, evaluation_batches
from longtail.data.scenes import DenseData
from longtail.engine.calibrate import calibrated
from longtail.engine.choices import build_views
from longtail.engine.evaluate import open_finished
from longtail.engine.judge import judge
from longtail.engine.thumbnails import keep_thumbnails
from longtail.errors import LongtailError
from longtail.evaluation.metrics import metrics, tally
from longtail.files import write_text
from longtail.nn import LinearClassifier
from longtail.randomness import mix
from longtail.recognizer import Recognizer

How = Literal["crt", "lws", "tau"]

_HEAD = mix(6)  # a stream of draws of its own
_BATCH = 512
_LEAST_STEPS = 2000  # a small set needs more passes than a large one
_TAUS = tuple(step / 10 for step in range(21))


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a head is made."""

    how: How
    epochs: int = 10
    """Passes over the features of all views, for each of the head's fits; more where they make under 2,000 steps."""
    views: int = 4
    """V, augmented views of every training image."""
    tau: float | None = None
    """τ of tau; chosen on the validation images if not given, and 1 where there are none."""
    learning_rate: float = 0.1
    weight_decay: float = 5e-4


def rebalance(run: Path, out: Path, settings: Settings, data_root: str | None = None) -> dict[str, dict[str, Any]]:
    """Put a new head on a run's encoder, judge it, and keep it as a run of its own.

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
        raise LongtailError(f"--tau {settings.tau}: expected a value from 0, which changes nothing, to 10")
    if out.exists() and any(out.iterdir()):
        raise LongtailError(f"{out}: is not empty; choose another --out")
    # a caller's own random numbers are not ours to move
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        recognizer, config, data = open_finished(run, data_root)
        if isinstance(data, DenseData):
            raise LongtailError(f"{run}: is a segmenter, whose head cannot be made anew; expected another run")
        started = time.monotonic()
        torch.manual_seed(mix(config.seed, _HEAD))
        features, labels = _features(recognizer, config, data, settings.views)
        head, chosen = fit_head(
            features, labels, len(data.class_names), settings, _validation(recognizer, data, config)
        )
    trained = {
        **recognizer.card.trained,
        "rebalanced": settings.how,
        "rebalanced_seconds": round(time.monotonic() - started, 3),
        **({"tau": chosen} if settings.how == "tau" else {}),
    }
    card = dataclasses.replace(
        recognizer.card,
        head="linear",
        predicts_under="uniform",
        trained=trained,
        metrics={},
        temperature=1.0,
        class_temperatures=(),
    )
    made = Recognizer(recognizer.encoder, head, card)
    if data.val is not None:
        made = calibrated(made, data.val, config)
    judged = judge(made, data.test, config)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LongtailError(f"{out}: cannot be made: {error.strerror}") from None
    made.card = dataclasses.replace(made.card, metrics=judged["uniform"])
    made.save(out / "recognizer")
    keep_thumbnails(out, data.test, judged[made.card.predicts_under]["mistakes"])
    write_text(out / "config.yaml", config.to_yaml())
    write_text(out / "metrics.jsonl", json.dumps({"kind": "test", "step": 0, **judged}) + "\n")
    return judged


def fit_head(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    settings: Settings,
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
    # features of different networks differ in size; of mean square 1, one learning rate suits all
    size = features.square().mean().sqrt().clamp(min=1e-12)
    features = features / size
    if validation is not None:
        validation = (validation[0] / size, *validation[1:])
    _train(head, head.weight, features, labels, settings, balanced=settings.how == "crt")
    if settings.how == "lws":
        factors = nn.Parameter(torch.ones(num_classes, 1, device=features.device))
        weight = head.weight.detach().clone()

        def scaled(x: Tensor) -> Tensor:
            return F.linear(x, weight * factors)

        _train(scaled, factors, features, labels, settings, balanced=True)
        head.weight.data.copy_(weight * factors.detach())
    tau = None
    if settings.how == "tau":
        tau = settings.tau if settings.tau is not None else _best_tau(head, validation)
        head.weight.data.copy_(normalised(head.weight.data, tau))
    head.weight.data.div_(size)
    return head, tau


def normalised(weight: Tensor, tau: float) -> Tensor:
    """Return w_c / ‖w_c‖^τ; a class without a weight keeps none."""
    norms = weight.norm(dim=1, keepdim=True)
    return torch.where(norms > 0, weight / norms.clamp(min=1e-12) ** tau, 0.0)


def _train(
    score: Any, parameter: nn.Parameter, features: Tensor, labels: Tensor, settings: Settings, *, balanced: bool
) -> None:
    counts = torch.bincount(labels).clamp(min=1)
    weights = (1.0 / counts)[labels]
    steps = -(-len(labels) // _BATCH)
    epochs = max(settings.epochs, -(-_LEAST_STEPS // steps))
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
def _features(recognizer: Recognizer, config: Config, data: LongTailedData, views: int) -> tuple[Tensor, Tensor]:
    """Return (V · N, F) features of augmented views of the training images, and their labels."""
    device = recognizer.classifier.weight.device
    recognizer.encoder.eval()
    loader = TrainLoader(
        data.train, _BATCH, build_views(config, data, ["classification"]), config.seed, workers=config.data.workers
    )
    made, labels = [], []
    for view in range(views):
        for batch in loader.epoch(view):
            images = batch.views[0].to(device).contiguous(memory_format=torch.channels_last)
            made.append(recognizer.encoder(images).float())
            labels.append(batch.labels.to(device))
    return torch.cat(made), torch.cat(labels)


@torch.no_grad()
def _validation(
    recognizer: Recognizer, data: LongTailedData, config: Config
) -> tuple[Tensor, Tensor, Config, list[int]] | None:
    if data.val is None:
        return None
    features, labels = plain_features(recognizer, data.val)
    return features, labels, config, list(data.class_counts)


@torch.no_grad()
def plain_features(recognizer: Recognizer, images: ImageSet) -> tuple[Tensor, Tensor]:
    """Return (N, F) features of images as they are, every one once, and their labels."""
    device = recognizer.classifier.weight.device
    recognizer.encoder.eval()
    made = [
        (recognizer.encoder(views.to(device).contiguous(memory_format=torch.channels_last)).float(), labels.to(device))
        for views, labels in evaluation_batches(images, recognizer.card.image_size)
    ]
    return torch.cat([features for features, _ in made]), torch.cat([labels for _, labels in made])


@torch.no_grad()
def _best_tau(head: LinearClassifier, validation: tuple[Tensor, Tensor, Config, list[int]] | None) -> float:
    if validation is None:
        return 1.0
    features, labels, config, counts = validation

    def accuracy(tau: float) -> float:
        counted = tally(F.linear(features, normalised(head.weight, tau)), labels).cpu()
        found: float = metrics(counted, counts, config.shots)["balanced_accuracy"]
        return found

    return max(_TAUS, key=accuracy)

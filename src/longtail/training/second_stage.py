"""A new classifier on a trained encoder: decoupled training, at the end of a run or on a finished one.

Source: Kang et al., *Decoupling Representation and Classifier for Long-Tailed Recognition*, ICLR 2020,
arXiv 1910.09217. Legend: N images, V views, F feature width, C classes, n_c images of class c.

The classifier is linear without bias, trained on the frozen encoder's features of a few augmented views:

    crt       from zero, with class-balanced sampling
    reweight  from zero, with instance sampling and the loss of class c weighted by N / (C n_c): crt in expectation
    lws       with instance sampling; then a factor f_c of the score of every class, with class-balanced sampling
    tau       with instance sampling; then w_c / ‖w_c‖^τ

Post-hoc logit adjustment needs no new classifier: it is the uniform prior at prediction (``longtail evaluate`` shows
both). All draws are functions of (seed, pass): a stage that is interrupted and begins again gives the same classifier.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtail.config import Config, first_stage_epochs
from longtail.data.dataset import ImageSet, LongTailedData
from longtail.data.loader import TrainLoader
from longtail.data.samplers import epoch_order
from longtail.distributed import all_reduce_sum, rank, world_size
from longtail.errors import StoppedError
from longtail.evaluation.metrics import classification_metrics, count_correct
from longtail.inference.features import encode_split
from longtail.inference.kept_features import FeatureImages
from longtail.inference.model import TrainedModel
from longtail.losses.reweighting import frequency_weights
from longtail.nn import LinearClassifier
from longtail.nn.encoder import channels_last
from longtail.randomness import Stream, mix
from longtail.registry import TASKS
from longtail.training.preemption import PreemptionHandler

logger = logging.getLogger(__name__)

HeadMethod = Literal["crt", "lws", "reweight", "tau"]
Validation = tuple[Tensor, Tensor, Config, Sequence[int]]
"""(N, F) features, (N,) labels, settings of the run and class counts."""

_HEAD = mix(Stream.SECOND_STAGE)
BATCH = 512
FEATURE_BYTES = 2**31  # of the features of all views, at most
MIN_STEPS = 2000  # a small set needs more passes than a large one
_TAUS = tuple(step / 10 for step in range(21))


@dataclasses.dataclass(frozen=True)
class HeadSettings:
    """How a classifier is trained on features."""

    method: HeadMethod
    epochs: int = 10
    """Passes over the features of all views, for each fit; more where they are fewer than 2,000 steps."""
    tau: float | None = None
    """τ; chosen on the validation images if not given, 1 where there are none."""
    learning_rate: float = 0.1
    weight_decay: float = 5e-4


def train_second_stage(model: TrainedModel, data: LongTailedData, config: Config, quiet: bool) -> TrainedModel:
    """Return the model of a run's first stage with the classifier of its second one, not calibrated.

    It is short, and has no checkpoint of its own: a run that is resumed begins it again.

    Args:
        model: of the first stage.
        data: training images, or the encoder's features of them.
        config: settings of the run.
        quiet: print nothing when a signal arrives.

    Raises:
        StoppedError: SIGTERM or SIGINT came.
    """
    assert isinstance(config.epochs, int)
    assert config.second_stage != "none"
    first, started, calls = first_stage_epochs(config), time.monotonic(), itertools.count()
    views = config.epochs - first
    logger.info("second stage %s: a new classifier on the features of %d views", config.second_stage, views)
    with PreemptionHandler(quiet) as stop:

        def check(now: bool = False) -> None:
            signal_name, _ = stop.sync(next(calls), False, model.device, now)
            if signal_name:
                raise StoppedError(signal_name, "at the end of the first stage")

        trained, _ = retrain_classifier(
            model, data, config, HeadSettings(config.second_stage), views=views, first_view=first, check=check
        )
        check(now=True)
    seconds, info = time.monotonic() - started, model.config.training_info
    info = {
        **info,
        "seconds": round(info["seconds"] + seconds, 3),
        "student_passes": info["student_passes"] + views * len(data.train),
        "second_stage": {"classifier": config.second_stage, "epochs": views, "seconds": round(seconds, 3)},
    }
    trained.config = dataclasses.replace(trained.config, training_info=info)
    return trained


def retrain_classifier(
    model: TrainedModel,
    data: LongTailedData,
    config: Config,
    settings: HeadSettings,
    *,
    views: int,
    first_view: int,
    check: Callable[[], None] = lambda: None,
) -> tuple[TrainedModel, float | None]:
    """Return a model with a new linear classifier on the same encoder, not calibrated, and the τ that was used.

    Several processes share the images; all return the same.

    Args:
        model: its encoder is not changed.
        data: training images, or the encoder's features of them.
        config: settings of the run.
        settings: how the classifier is trained.
        views: V, augmented views of every training image; fewer where their features would take more than 2 GiB.
        first_view: the epoch whose view of every image is the first.
        check: called now and then, equally often in all processes; what it raises ends the training.
    """
    validation: Validation | None = None
    if settings.method == "tau" and settings.tau is None and data.val is not None:
        validation = (*plain_features(model, data.val), config, data.class_counts)
    features, labels = _augmented_features(model, config, data, views, first_view, check)
    head, tau = fit_head(features, labels, len(data.class_names), settings, validation, seed=config.seed, check=check)
    # of process 0, in all of them
    weight = head.weight.detach()
    head.weight.data.copy_(all_reduce_sum(weight if rank() == 0 else torch.zeros_like(weight)))
    model_config = dataclasses.replace(
        model.config,
        head="linear",
        predicts_under="uniform",
        metrics={},
        temperature=1.0,
        class_temperatures=(),
        temperature_fits={},
    )
    return type(model)(model.encoder, head, model_config), tau


def fit_head(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    settings: HeadSettings,
    validation: Validation | None = None,
    *,
    seed: int = 0,
    check: Callable[[], None] = lambda: None,
) -> tuple[LinearClassifier, float | None]:
    """Return a linear head, and the τ that was used.

    Args:
        features: (N, F), the training images'.
        labels: (N,) int64 in [0, C), on the CPU.
        num_classes: C.
        settings: how.
        validation: to choose τ with.
        seed: of the order of the features.
        check: called before every pass.
    """
    head = LinearClassifier(features.shape[1], num_classes).to(features.device)
    # features of different networks differ in scale; with mean square 1, one learning rate fits all
    size = features.square().mean().sqrt().clamp(min=1e-12)
    training = _HeadTraining(features, size, labels.cpu(), num_classes, settings, seed, check)
    training.fit(
        head,
        head.weight,
        sampler="class" if settings.method == "crt" else "instance",
        weighted=settings.method == "reweight",
    )
    if settings.method == "lws":
        factors = nn.Parameter(torch.ones(num_classes, 1, device=features.device))
        weight = head.weight.detach().clone()

        def scaled(x: Tensor) -> Tensor:
            return F.linear(x, weight * factors)

        training.fit(scaled, factors, sampler="class")
        head.weight.data.copy_(weight * factors.detach())
    tau = None
    if settings.method == "tau":
        if settings.tau is not None:
            tau = settings.tau
        else:
            tau = 1.0 if validation is None else _best_tau(head, (validation[0] / size, *validation[1:]))
        head.weight.data.copy_(tau_normalize(head.weight.data, tau))
    head.weight.data.div_(size)
    return head, tau


def tau_normalize(weight: Tensor, tau: float) -> Tensor:
    """Return w_c / ‖w_c‖^τ; a weight of norm 0 stays 0."""
    norms = weight.norm(dim=1, keepdim=True)
    return torch.where(norms > 0, weight / norms.clamp(min=1e-12) ** tau, 0.0)


def head_loss(scores: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return the mean of w_y · cross-entropy over a batch, a scalar; its expectation does not depend on the batches.

    Args:
        scores: (B, C).
        labels: (B,) int64.
        weights: (C,) w.
    """
    losses = F.cross_entropy(scores, labels, reduction="none")
    return (losses * weights[labels]).mean()


class _HeadTraining:
    """One fit after another of parameters on the same features, divided by their size."""

    def __init__(
        self,
        features: Tensor,
        size: Tensor,
        labels: Tensor,
        num_classes: int,
        settings: HeadSettings,
        seed: int,
        check: Callable[[], None],
    ) -> None:
        self.features, self.size, self.labels = features, size, labels
        self.settings, self.seed, self.check = settings, seed, check
        self.labels_there = labels.to(features.device)
        self.counts = torch.bincount(labels, minlength=num_classes)
        self.passes = 0

    def fit(
        self, score: Callable[[Tensor], Tensor], parameter: nn.Parameter, *, sampler: str, weighted: bool = False
    ) -> None:
        settings, device = self.settings, self.features.device
        weights = torch.ones(len(self.counts), device=device)
        if weighted:
            # mean 1 over the images rather than over the classes, as the gradient's size does not change then
            weights = frequency_weights(self.counts).to(device)
            weights /= weights[self.labels_there].mean()
        steps = -(-len(self.labels) // BATCH)
        epochs = max(settings.epochs, -(-MIN_STEPS // steps))
        optimizer = torch.optim.SGD(
            [parameter], lr=settings.learning_rate, momentum=0.9, weight_decay=settings.weight_decay
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps * epochs)
        for _ in range(epochs):
            self.check()
            order = epoch_order(self.labels, sampler, mix(self.seed, _HEAD), self.passes).to(device)
            self.passes += 1
            for rows in order.split(BATCH):
                loss = head_loss(score(self.features[rows] / self.size), self.labels_there[rows], weights)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()


def plain_features(model: TrainedModel, images: ImageSet) -> tuple[Tensor, Tensor]:
    """Return (N, F) features of images without augmentation, and their labels."""
    model.encoder.eval()
    batches = list(encode_split(model.encoder, images, model.config.image_size, device=model.device))
    return torch.cat([features for features, _ in batches]), torch.cat([labels for _, labels in batches])


@torch.no_grad()
def _augmented_features(
    model: TrainedModel,
    config: Config,
    data: LongTailedData,
    views: int,
    first_view: int,
    check: Callable[[], None],
) -> tuple[Tensor, Tensor]:
    """Return (V · N, F) features of augmented views of the training images, and (V · N,) labels on the CPU."""
    encoder, device, count = model.encoder.eval(), model.device, len(data.train)
    kept = data.train.images
    if isinstance(kept, FeatureImages):
        return torch.cat(kept.features).to(device), data.train.labels.repeat(len(kept.features))
    fitting = max(1, FEATURE_BYTES // (4 * count * encoder.num_features))
    if fitting < views:
        logger.info("features of %d of %d views of every image: more take over 2 GiB", fitting, views)
        views = fitting
    transforms = TASKS[data.task].build_transforms(config, data, ["classification"])
    process, processes = rank(), world_size()
    loader = TrainLoader(
        data.train, BATCH, transforms, config.seed, workers=config.data.workers, rank=process, world=processes
    )
    features = torch.zeros(views, count, encoder.num_features, device=device)
    splits = torch.arange(count).split(BATCH)
    for view in range(views):
        for split, batch in zip(splits, loader.batches(splits, first_view + view), strict=True):
            check()
            own = split.tensor_split(processes)[process]
            if len(own):  # a process without images of its own is given one that counts elsewhere
                images = channels_last(batch.views[0].to(device))
                features[view, int(own[0]) : int(own[-1]) + 1] = encoder(images).float()
    return all_reduce_sum(features).flatten(0, 1), data.train.labels.repeat(views)


@torch.no_grad()
def _best_tau(head: LinearClassifier, validation: Validation) -> float:
    features, labels, config, counts = validation

    def accuracy(tau: float) -> float:
        correct = count_correct(F.linear(features, tau_normalize(head.weight, tau)), labels).cpu()
        balanced: float = classification_metrics(correct, list(counts), config.shots)["balanced_accuracy"]
        return balanced

    return max(_TAUS, key=accuracy)

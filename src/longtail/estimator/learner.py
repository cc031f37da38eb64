"""What :class:`~longtail.LongTailClassifier` trains: a small network on standardised embeddings.

Legend: N samples, B of a batch, D features, C classes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtail.losses import GMLLoss
from longtail.losses.mixture_autograd import mixture_losses
from longtail.losses.reduction import batch_mean
from longtail.memory import ClassQueues
from longtail.nn import CosineClassifier, ProjectionMLP

FIXED_PARAMETERS = ("method", "hidden", "scale", "embedding_dim", "queue_size", "queue_minimum")
"""Parameters that must not change between the calls of a training."""
Array = np.ndarray[Any, Any]


def content_ids(X: Array) -> Array:  # noqa: N803
    """Return an id of each of (N, D) samples, (N,) int64 of at least 0: a hash of its bytes.

    A sample has the same id in every call, and so have samples that are equal.
    """
    digests = b"".join(hashlib.blake2b(row, digest_size=8).digest() for row in np.ascontiguousarray(X))
    ids: Array = (np.frombuffer(digests, dtype="<u8") >> 1).astype(np.int64)  # −1 is that of an unfilled slot
    return ids


class Standardization:
    """The weighted mean and standard deviation of each feature, over all samples that were added."""

    def __init__(self, width: int) -> None:
        self.samples, self.weight = 0, 0.0
        self.mean, self._squares = np.zeros(width), np.zeros(width)
        self._low, self._high = np.full(width, math.inf), np.full(width, -math.inf)

    def add(self, X: Array, weights: Array) -> tuple[Array, Array, Array]:  # noqa: N803
        """Add (N, D) samples with (N,) weights above 0.

        Source: Chan, Golub & LeVeque, *Algorithms for Computing the Sample Variance*, 1983, equation 1.5.

        Returns:
            Ratio and shift, (D,): what was standardised as z before is (z − shift) / ratio now; and (D,) bool, which
            features were constant and vary now.
        """
        old_mean, (old_std, varied) = self.mean, self._std()
        weight = float(weights.sum())
        mean = weights @ X / weight
        share = weight / (self.weight + weight)
        self._squares = self._squares + weights @ (X - mean) ** 2 + (mean - self.mean) ** 2 * self.weight * share
        self.mean = self.mean + (mean - self.mean) * share
        self.samples, self.weight = self.samples + len(X), self.weight + weight
        self._low, self._high = np.minimum(self._low, X.min(axis=0)), np.maximum(self._high, X.max(axis=0))
        std, varies = self._std()
        # a feature that was constant had z = 0
        shift = np.where(varied, (self.mean - old_mean) / old_std, (self.mean - old_mean) / std)
        ratio = np.where(varied, std / old_std, 1.0)
        return ratio, np.where(varies, shift, 0.0), varies & ~varied

    def __call__(self, X: Array) -> Array:  # noqa: N803
        """Return the samples with mean 0 and standard deviation 1.

        A feature that was constant is 0, whatever it is here: nothing has been learned of what it means.
        """
        std, varies = self._std()
        standardized: Array = X - self.mean
        standardized /= std
        standardized[:, ~varies] = 0
        return standardized

    def _std(self) -> tuple[Array, Array]:
        """Return the standard deviations, 1 for a constant feature, and which features vary, both (D,)."""
        if self.samples == 0:
            return np.ones(len(self.mean)), np.zeros(len(self.mean), dtype=bool)
        std = np.sqrt(self._squares / self.weight)
        # rounding errors give a constant feature a small standard deviation too, proportional to its magnitude
        varies = (self._high - self._low > 1e-12 * np.maximum(abs(self._low), abs(self._high))) & (std > 0)
        return np.where(varies, std, 1.0), varies


class Learner(nn.Module):
    """What a training continues from: hidden layer, classifier, and for gml the mixture, with their optimizer.

    Args:
        parameters: of the estimator.
        width: D.
        queue_counts: (C,) class frequencies, as counts, by which slots are divided among the queues (gml).
        queue_size: slots in total (gml).
        seed: of the weights and of the batches.
    """

    layers: nn.Sequential

    def __init__(
        self, parameters: Mapping[str, Any], width: int, queue_counts: Array, queue_size: int, seed: int
    ) -> None:
        super().__init__()
        self.parameters_of_training = {name: parameters[name] for name in FIXED_PARAMETERS}
        hidden, classes, embedding_dim = parameters["hidden"], len(queue_counts), parameters["embedding_dim"]
        features, has_mixture = hidden or width, parameters["method"] == "gml"
        # without values, which would be drawn from the random numbers that all threads share
        with torch.device("meta"):
            self.layers = nn.Sequential()
            if hidden:
                self.layers = nn.Sequential(nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU())
            self.classifier = CosineClassifier(features, classes, parameters["scale"])
            if has_mixture:
                self.query = ProjectionMLP(features, embedding_dim)
                self.key = ProjectionMLP(width, embedding_dim)
        random_numbers = torch.Generator().manual_seed(seed)
        self.to_empty(device="cpu")
        self._draw_weights(random_numbers)
        self.mixture: GMLLoss | None = None  # for its temperature
        self.queues: ClassQueues | None = None
        if has_mixture:
            self.queues = ClassQueues(queue_counts, queue_size, parameters["queue_minimum"], width)
            self.mixture = GMLLoss([1] * classes, parameters["temperature"])
        temperature = [] if self.mixture is None else list(self.mixture.parameters())
        others = [p for p in self.parameters() if all(p is not t for t in temperature)]
        groups = [{"params": others, "decays": True}, {"params": temperature, "decays": False}]
        self.optimizer = torch.optim.AdamW(groups)
        self.random_numbers = random_numbers.get_state()
        """State of the generator that draws the batches."""
        self.steps = 0

    def _draw_weights(self, random_numbers: torch.Generator) -> None:
        """Draw the weights from the same distributions, and in the same order, as the layers do when they are made."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5), generator=random_numbers)
                if module.bias is not None:
                    bound = 1 / math.sqrt(module.in_features)
                    nn.init.uniform_(module.bias, -bound, bound, generator=random_numbers)
            elif isinstance(module, CosineClassifier):
                nn.init.normal_(module.weight, generator=random_numbers)
            elif isinstance(module, nn.BatchNorm1d):
                module.reset_parameters()

    def check_unchanged(self, parameters: Mapping[str, Any]) -> None:
        """Raise ValueError if a parameter has changed that the network depends on."""
        for name, value in self.parameters_of_training.items():
            if parameters[name] != value:
                raise ValueError(
                    f"{name}: expected {value!r}, as when the training began, got {parameters[name]!r}; fit begins "
                    "another training"
                )

    def move(self, device: torch.device) -> None:
        """Move the network, its queues and the optimizer's state."""
        self.to(device)
        if self.queues is not None:
            self.queues.to(device)
        for state in self.optimizer.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name].to(device)

    @torch.no_grad()
    def keep_features(self, ratio: Tensor, shift: Tensor, begins_to_vary: Tensor) -> None:
        """Change the hidden layer so that its features stay the same where the standardisation has changed, and the
        samples in the queues to the new one.

        Args:
            ratio: (D,), see :meth:`Standardization.add`.
            shift: (D,), likewise.
            begins_to_vary: (D,) bool, likewise; their weights, which no sample has trained, become 0.
        """
        if self.queues is not None:
            self.queues.map_features(lambda samples: (samples - shift) / ratio)
        if not len(self.layers):
            return
        linear, norm = self.layers[0], self.layers[1]
        assert isinstance(linear, nn.Linear)
        assert isinstance(norm, nn.BatchNorm1d)
        assert norm.running_mean is not None
        linear.weight[:, begins_to_vary] = 0
        norm.running_mean -= linear.weight @ shift
        linear.weight *= ratio
        state = self.optimizer.state[linear.weight]
        if state:
            state["exp_avg"] /= ratio
            state["exp_avg_sq"] /= ratio**2

    @torch.no_grad()
    def start_from_class_means(self, samples: Tensor, labels: Tensor, weights: Tensor) -> None:
        """Turn the classifier of an untrained network to the directions from the mean of all features to that of each
        class; a class without a sample, or with the mean of all, keeps a random direction.

        Args:
            samples: (N, D), standardised.
            labels: (N,) class indices.
            weights: (N,).
        """
        features = samples
        if len(self.layers):
            if len(samples) < 2:
                return
            features = F.relu(F.batch_norm(self.layers[0](samples), None, None, training=True))
            features = features - weights @ features / weights.sum()
        weight = self.classifier.weight
        sums = torch.zeros_like(weight).index_add_(0, labels, weights[:, None] * features)
        lengths = weight.new_zeros(len(weight)).index_add_(0, labels, weights * features.norm(dim=1))
        norms = sums.norm(dim=1)
        # of a class alone, the difference is a rounding error
        known = (norms > 1e-4 * lengths)[:, None]
        weight.copy_(torch.where(known, F.normalize(sums), F.normalize(weight)))

    def step(
        self,
        samples: Tensor,
        labels: Tensor,
        weights: Tensor,
        ids: Tensor,
        log_prior: Tensor,
        learning_rate: float,
        share: float,
    ) -> None:
        """Minimise the loss of one batch.

        Args:
            samples: (B, D), standardised.
            labels: (B,) class indices.
            weights: (B,) factors of their losses.
            ids: (B,) int64, the same for a sample in every step; see :func:`content_ids`. Only for gml.
            log_prior: (C,) what is added to the scores; −inf for a class that has no part.
            learning_rate: of this step.
            share: B relative to a usual batch, in (0, 1]: how far the running statistics follow this one.
        """
        self.train(len(samples) > 1)  # a batch of one sample has no statistics
        if len(self.layers):
            # the running statistics of BatchNorm are the mean of the first steps, and follow later ones
            norm = self.layers[1]
            assert isinstance(norm, nn.BatchNorm1d)
            norm.momentum = max(0.1 * share, 1 / (self.steps + 1))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        features = self.layers(samples)
        losses = F.cross_entropy(self.classifier(features) + log_prior, labels, reduction="none")
        loss = (weights * losses).mean()
        if self.mixture is not None and self.queues is not None:
            self.queues.push(samples, labels, ids)
            slots = self.queues.slots()
            losses, loo_losses, mask, loo_mask = mixture_losses(
                self.query(features),
                labels,
                self.key(slots.features),
                slots.labels,
                log_prior,
                self.mixture.temperature,
                ids,
                slots.ids,
                separate_temperature=True,
            )
            loss = loss + batch_mean(weights * losses, mask) + batch_mean(weights * loo_losses, loo_mask)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.steps += 1

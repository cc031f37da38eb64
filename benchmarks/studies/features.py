"""How well the mixture models the features, by shot group.

For finished runs of ce, la and gml on CIFAR-100-LT (from benchmarks/studies/methods.py) and their test images: the
log-likelihood of embeddings under one component per class and under the mixture, the effective number of components of
an image, the spread within classes, alignment and uniformity, neural collapse, and the accuracy of the mixture's
posterior alone and of its ensemble with the classifier. Nothing is trained.

Command:
    python benchmarks/studies/features.py --seeds 3      (--out FOLDER of those runs, --root DATA)
with --json FILE, and --plot FILE for a t-SNE of seed 0.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import parser
from torch import Tensor

from longtail.data.dataset import LongTailedData
from longtail.evaluation.metrics import classification_metrics, count_correct
from longtail.losses import class_log_likelihood
from longtail.losses.von_mises_fisher import concentration, log_bessel_ratio
from longtail.methods.gml import GML
from longtail.nn import Encoder
from longtail.tasks.loading import load_run
from longtail.training.checkpoint import load_checkpoint
from longtail.training.second_stage import plain_features

GROUPS = ("many", "medium", "few")
PlotEmbeddings = Callable[[Tensor, Tensor, list[str]], None]
"""Plots (N, D) embeddings with (N,) labels and the shot groups of the classes."""


def log_density(cosine: Tensor, kappa: Tensor, dim: int) -> Tensor:
    """Return the log density of von Mises–Fisher on the unit sphere at a cosine to the mean direction."""
    order = dim / 2 - 1
    normaliser = -log_bessel_ratio(kappa, order) - dim / 2 * math.log(2 * math.pi)
    return kappa * cosine + normaliser


@torch.no_grad()
def likelihoods(z: Tensor, keys: Tensor, key_labels: Tensor, classes: int, tau: float) -> dict[str, Tensor]:
    """Return (N, C) log p(z|c) of three models fitted on the keys, each a density on the unit sphere."""
    dim = z.shape[1]
    counts = torch.bincount(key_labels, minlength=classes).clamp(min=1)
    mean = torch.zeros(classes, dim, dtype=z.dtype).index_add(0, key_labels, keys) / counts[:, None]
    cosine = z @ F.normalize(mean).t()
    width = torch.tensor(1 / tau, dtype=z.dtype)
    return {
        "one component, the mixture's width": log_density(cosine, width, dim),
        "one von Mises–Fisher, its own width": log_density(cosine, concentration(mean).clamp(max=1e3), dim),
        "mixture": class_log_likelihood(z, keys, key_labels, classes, tau) + log_density(torch.zeros(()), width, dim),
    }


@torch.no_grad()
def components(z: Tensor, labels: Tensor, keys: Tensor, key_labels: Tensor, tau: float) -> Tensor:
    """Return (N,) exp(entropy of the responsibilities) over the components of the image's own class."""
    scores = (z @ keys.t() / tau).masked_fill(labels[:, None] != key_labels[None], -math.inf)
    log_share = F.log_softmax(scores, dim=1)
    used: Tensor = torch.special.entr(log_share.exp()).sum(dim=1).exp()
    return used


def geometry(features: Tensor, labels: Tensor, weights: Tensor, few: Tensor) -> dict[str, float]:
    """Return alignment and uniformity (Wang & Isola, 2020) and neural-collapse measures (Papyan et al., 2020)."""
    h = F.normalize(features).double()
    classes = len(weights)
    counts = torch.bincount(labels, minlength=classes)
    mean = torch.zeros(classes, h.shape[1], dtype=h.dtype).index_add(0, labels, h) / counts[:, None]
    centred = h - mean[labels]
    within = centred.t() @ centred / len(h)
    between_means = mean - mean.mean(dim=0)
    between = between_means.t() @ between_means / classes
    directions = F.normalize(between_means)
    off = (directions @ directions.t())[~torch.eye(classes, dtype=torch.bool)]
    # of unit vectors ‖x − y‖² = 2 − 2 x·y, so a class's mean pair is 2 − 2‖mean‖²
    alignment = 2 - 2 * (mean**2).sum(dim=1)
    sample = h[torch.arange(0, len(h), 5)]
    distances = torch.pdist(sample) ** 2
    return {
        "alignment": alignment.mean().item(),
        "alignment few": alignment[few].mean().item(),
        "uniformity": (-2 * distances).exp().mean().log().item(),
        "NC1 within/between": float(torch.trace(within @ torch.linalg.pinv(between)) / classes),
        "NC2 deviation of cosines": off.std().item(),
        "NC3 weights to means": (F.normalize(weights.double()) * directions).sum(dim=1).mean().item(),
        "NC3 few": (F.normalize(weights.double()) * directions).sum(dim=1)[few].mean().item(),
    }


def by_group(values: Tensor, labels: Tensor, groups: list[str]) -> dict[str, float]:
    """Return the mean over classes of their means, for each shot group."""
    classes = len(groups)
    counts = torch.bincount(labels, minlength=classes)
    mean = torch.zeros(classes, dtype=values.dtype).index_add(0, labels, values) / counts
    return {g: mean[torch.tensor([name == g for name in groups])].mean().item() for g in GROUPS}


def load_gml(folder: Path, data: LongTailedData, config: Any) -> GML:
    """Return the method, with its queues, from the checkpoint at the end of its run."""
    network = config.network if config.teacher.network == "auto" else config.teacher.network
    teacher = Encoder(network, data.mean, data.std)
    method = GML(config, Encoder(config.network, data.mean, data.std), data.class_counts, teacher.eval())
    state = load_checkpoint(folder / "last.ckpt")["method"]
    method.load_state_dict(state)
    return method.eval()


@torch.no_grad()
def measure(folder: Path, seed: int, root: str | None, plot: PlotEmbeddings | None) -> dict[str, Any]:
    """Return the measurements of one seed."""
    results: dict[str, Any] = {}
    for name in ("ce", "la", "gml"):
        run = folder / f"{name}-seed{seed}"
        model, config, data = load_run(run, root)
        groups = config.shots.groups(data.class_counts)
        features, labels = plain_features(model, data.test)
        few = torch.tensor([group == "few" for group in groups])
        results[f"geometry {name}"] = geometry(features, labels, model.classifier.weight.detach(), few)
        if name != "gml":
            continue
        method = load_gml(run, data, config)
        z = method.query_mlp(features).double()
        slots = method.queues.slots()
        kept = slots.labels >= 0
        keys, key_labels = method.key_mlp(slots.features[kept]).double(), slots.labels[kept]
        tau, classes = method.mixture.temperature.item(), len(groups)
        models = likelihoods(z, keys, key_labels, classes, tau)
        results["temperature"] = tau
        scores = model.classifier(features).double()
        for title, likelihood in models.items():
            own = likelihood.gather(1, labels[:, None])[:, 0]
            results[f"log-likelihood {title}"] = by_group(own, labels, groups)
            results[f"accuracy {title}"] = accuracy(likelihood, labels, data, config)
        results["accuracy classifier"] = accuracy(scores, labels, data, config)
        for share in (0.25, 0.5, 1.0):
            results[f"accuracy classifier + {share:g} mixture"] = accuracy(
                scores + share * models["mixture"], labels, data, config
            )
        results["components"] = by_group(components(z, labels, keys, key_labels, tau), labels, groups)
        count = torch.bincount(key_labels, minlength=classes)
        results["keys"] = {g: count[torch.tensor([n == g for n in groups])].double().mean().item() for g in GROUPS}
        spread = torch.stack([1 - z[labels == c].mean(dim=0).norm() for c in range(classes)])
        results["spread"] = by_group(spread[labels], labels, groups)
        log_count = torch.tensor(data.class_counts).double().log()
        results["correlation of spread and log count"] = float(torch.corrcoef(torch.stack([spread, log_count]))[0, 1])
        if plot is not None:
            plot(z, labels, groups)
    return results


def accuracy(scores: Tensor, labels: Tensor, data: LongTailedData, config: Any) -> dict[str, float]:
    """Return balanced accuracy and the accuracy of the shot groups, under the uniform prior."""
    metrics = classification_metrics(count_correct(scores, labels), data.class_counts, config.shots)
    return {name: metrics[name] for name in ("balanced_accuracy", *GROUPS)}


def tsne_plot(path: Path) -> PlotEmbeddings:
    """Return a function that plots a t-SNE of five head classes and five tail classes to a file."""

    def plot(z: Tensor, labels: Tensor, groups: list[str]) -> None:
        from matplotlib.figure import Figure
        from sklearn.manifold import TSNE

        many = [c for c, group in enumerate(groups) if group == "many"][:5]
        few = [c for c, group in enumerate(groups) if group == "few"][-5:]
        rows = torch.isin(labels, torch.tensor(many + few))
        flat = TSNE(init="pca", random_state=0, metric="cosine").fit_transform(z[rows].float().numpy())
        figure = Figure(figsize=(6, 5), layout="constrained")
        axes = figure.add_subplot()
        for index, label in enumerate(many + few):
            here = (labels[rows] == label).numpy()
            marker, color = ("o" if label in many else "x"), f"C{index}"
            kind = "many" if label in many else "few"
            x, y = flat[here].T
            axes.scatter(x, y, s=10, marker=marker, color=color, linewidths=0.8, label=f"class {label}, {kind}")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.legend(fontsize=7, ncols=2, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0))
        figure.savefig(path, dpi=110)

    return plot


def summary(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return mean and standard deviation over seeds of every value."""

    def combine(values: list[Any]) -> Any:
        if isinstance(values[0], dict):
            return {key: combine([value[key] for value in values]) for key in values[0]}
        return [round(statistics.fmean(values), 4), round(statistics.stdev(values), 4) if len(values) > 1 else None]

    means: dict[str, Any] = combine(seeds)
    return means


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--plot", type=Path)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    seeds = []
    for seed in range(args.seeds):
        seeds.append(measure(args.out, seed, args.root, tsne_plot(args.plot) if args.plot and seed == 0 else None))
    results = {
        "command": f"python benchmarks/studies/features.py --seeds {args.seeds}",
        "seeds": args.seeds,
        "mean and deviation": summary(seeds),
    }
    print(json.dumps(results, indent=1, ensure_ascii=False))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()

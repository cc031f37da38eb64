"""The options of every command: one dataclass per command, from which tyro makes flags and help. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from longtail.config import Config, Data, Shots
from longtail.inference.options import TTA, InferenceOptions

Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a model: longtail train [RECIPE | DATA] [OPTIONS].

    DATA is a folder, a list, a table or hub:NAME; with --data DATA a recipe trains on it. The defaults below are the
    recipe's: without a name those of digits-lt; longtail train folder --help has those for your own images.
    """

    config: Annotated[Config, tyro.conf.arg(name="")]
    out: Path | None = None
    """Folder of the run (default: runs/RECIPE-METHOD-seedN)."""
    resume: Flag = False
    """Continue from the folder's last checkpoint; the result equals an uninterrupted run's."""
    overwrite: Flag = False
    """Replace the run in the folder."""
    json: Path | None = None
    """Also write the test metrics to this file."""
    quiet: Flag = False
    """Show no progress and no messages."""


@dataclass(frozen=True, kw_only=True)
class InferenceFlags:
    """How the scores of an image are computed."""

    sliding_window: int | None = None
    """Models that label pixels: side of a square window that slides over an image; that of the run's settings if not
    given, without one the whole image at once."""
    tta: TTA | Literal["auto"] = "none"
    """Test-time augmentation: average the scores over views of the image. flip: it and its mirror image, 2 times the
    computation; crops: centre and corners, each also mirrored, 10 times; auto: the cheapest that no other exceeds by
    more than noise on the run's validation images (evaluate only). Models that label pixels: none or flip."""
    tta_flip: Flag = False
    """The same as --tta flip."""
    tta_scales: tuple[float, ...] = (1.0,)
    """Models that label pixels: average over these scales of the image."""

    @property
    def inference_options(self) -> InferenceOptions:
        """The same as the Python interface takes it."""
        return InferenceOptions(
            sliding_window=self.sliding_window, tta=self.tta, tta_flip=self.tta_flip, tta_scales=self.tta_scales
        )


@dataclass(frozen=True, kw_only=True)
class Evaluate(InferenceFlags):
    """Metrics of a run on its test set, in percent; or of objects that any program has found, with --annotations."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run, or a file of results in COCO's format (.json)."""
    annotations: Path | None = None
    """Of a file of results: the annotations of its images, in COCO's or LVIS's format."""
    train_annotations: Path | None = None
    """Of a file of results: the annotations of the training images, by which classes are rare, common or frequent."""
    prior: str = "uniform"
    """Class frequencies for the top level of --json: uniform, train, estimate (from the test images without their
    labels) or a file (.csv or JSON); the table always shows uniform and train."""
    test_prior: str | None = None
    """Class frequencies that the test set is weighted to have: forward or backward (a long tail in the order of the
    training set, or reversed), uniform, train or a file; its own if not given."""
    imbalance: float = 100.0
    """Imbalance factor of a forward or backward test prior."""
    coverage: float | None = None
    """Report the size of conformal sets that contain the true class for this fraction of each class's images, for
    example 0.9; the run needs validation images."""
    root: Path | None = None
    """Where the images are now, if not where they were."""
    csv: Path | None = None
    """Models that classify whole images: write what is predicted of every test image under --prior to this .csv file:
    path, label, class, probability, label_probability; the most confident errors first."""
    json: Path | None = None
    """Write the metrics, per class too, to this file."""
    quiet: Flag = False
    """Print nothing."""


@dataclass(frozen=True, kw_only=True)
class Rebalance:
    """Train a new classifier on a run's encoder, saved as a run of its own (Kang et al., ICLR 2020)."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of a finished run; it is not changed."""
    method: Literal["crt", "lws", "reweight", "tau"] = "crt"
    """crt: re-train the classifier with class-balanced sampling; reweight: with class-balanced weights of the loss
    instead; lws: learn a factor for the score of every class; tau: divide the weights of every class by their norm to
    the power τ."""
    out: Path | None = None
    """Folder of the new run (default: RUN-METHOD)."""
    epochs: int = 10
    """Passes over the features, for every fit."""
    views: int = 4
    """Augmented views of every training image to take features of."""
    tau: float | None = None
    """τ; if not given, the best on the validation images, or 1 where there are none."""
    root: Path | None = None
    """Where the images are now, if not where they were."""
    json: Path | None = None
    """Also write the test metrics to this file."""
    quiet: Flag = False
    """Print nothing."""


@dataclass(frozen=True, kw_only=True)
class Predict(InferenceFlags):
    """Classes and probabilities of images, the labels of their pixels as PNG files, or the objects in them.

    Images that cannot be read are named at the end, and the exit code is 1 then.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run, or of a model; or an ONNX file that longtail export wrote."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES…")]
    """Image files, or folders of them."""
    prior: str | None = None
    """Class frequencies where the images come from: uniform, train, estimate (from these images) or a file (.csv or
    JSON); if not given, uniform, or those inside an ONNX file."""
    coverage: float | None = None
    """Show conformal sets, which contain the true class for this fraction of each class's images, for example 0.9; the
    run needs validation images."""
    top: int | None = None
    """Classes to show per image (default: 3); of models that find objects: objects (default: at most 100)."""
    threshold: float | None = None
    """Models that find objects: lowest score of an object that is shown (default: 0.5)."""
    out: Path | None = None
    """Models that label pixels: folder of the label images and overlays (default: segmented). Models that find objects:
    folder of drawings, and of results in COCO's format (default: none are written)."""
    json: Path | None = None
    """Also write the table to this file."""
    csv: Path | None = None
    """Also write the table to this .csv file, for spreadsheets: path, class, probability, the next classes, error; of
    objects a row for each."""
    quiet: Flag = False
    """Print nothing."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """One ONNX file with normalisation, labels and prior inside: uint8 images in, probabilities or objects out."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run, or of a model."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES…")] = ()
    """Images on which the file is compared with PyTorch, the first four at most; random ones if none are given."""
    format: Literal["onnx"] = "onnx"
    """What to write."""
    prior: str = "uniform"
    """Class frequencies where the file will be used: uniform, train, or a file of class frequencies."""
    tta: TTA = "none"
    """Test-time augmentation inside the file: flip (2 times the computation) or crops (10 times); not for models that
    label pixels."""
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
    """A local page to drop images on: classes with probabilities and similar training images, or boxes of objects."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run, or of a model."""
    host: str = "127.0.0.1"
    """Address to listen at; the default is seen from this machine alone."""
    port: int = 8000
    """Port; 0 takes a free one."""
    allowed_hosts: tuple[str, ...] = ()
    """Additional host names to accept, e.g. behind a reverse proxy; HOST's own are always accepted."""
    tta: TTA = "none"
    """Test-time augmentation: flip (2 times the computation) or crops (10 times)."""
    root: Path | None = None
    """Where the training images are now, if not where they were."""
    quiet: Flag = False
    """Print nothing."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write the report of a run again, or a page that compares several runs: longtail report RUN…."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN…")]
    """Folders of finished runs over the same classes."""
    out: Path | None = None
    """The page that compares several runs (default: comparison.html)."""
    json: Path | None = None
    """Write one record per run to this file."""
    quiet: Flag = False
    """Print nothing."""


@dataclass(frozen=True, kw_only=True)
class CalibrateDetector:
    """Correct a trained detector for the long tail of its training set, without training: NorCal or LogN.

    MODEL is the folder of a model of transformers, a run of longtail, torchvision:NAME with --weights, or a COCO result
    file (.json), of which scores alone can be scaled. The corrected model has the format that it came in.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """The detector."""
    annotations: Path
    """Annotations of the training set, whose classes are counted: COCO or LVIS json, or a folder in the layout of COCO,
    Pascal VOC or YOLO."""
    out: Path
    """Folder of the corrected detector and calibration.json."""
    method: Literal["norcal", "logn"] = "norcal"
    """norcal: scores are divided by the class counts to a power; logn: logits are normalised by their mean and
    deviation on training images, which are read from --images."""
    power: str = "auto"
    """NorCal: exponent of the counts, or auto: the highest AP on the validation images of 0, 0.1, …, 1."""
    validation: Path | None = None
    """Annotations of validation images, json or a folder with such a split: for --power auto, and for the AP before and
    after."""
    images: Path | None = None
    """Folder of the images of --validation, and of --annotations with logn, if these are json files."""
    counts: Literal["images", "objects"] = "images"
    """What the count of a class is of."""
    normalization: Literal["foreground", "paper"] = "foreground"
    """NorCal: foreground: all classes together keep their odds against the background; paper: counts as they are, which
    lowers all scores, so use lower score thresholds."""
    class_order: Literal["auto", "name", "id", "index"] = "auto"
    """How categories are matched to classes: by name, label = category id, or in the order of the ids."""
    weights: Path | None = None
    """State dict of a model of torchvision (.safetensors, .pth)."""
    classes: int | None = None
    """num_classes of a model of torchvision; from the weights if not given."""
    score_threshold: float | None = None
    """Detections below it are left out of the AP; 0.001, or the detector's own if that is lower, if not given."""
    statistics_images: int = 1000
    """LogN: number of training images, drawn at random."""
    export: Path | None = None
    """Also write the corrected detector to this .onnx file."""
    overwrite: Flag = False
    """Replace a folder or file that is there."""
    json: Path | None = None
    """Also write method, power and metrics to this file."""
    quiet: Flag = False
    """Print nothing."""


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Several methods × seeds under one recipe: longtail compare [RECIPE | DATA] [OPTIONS]."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    methods: str | None = None
    """Methods, separated by commas (default: ce, la and the recipe's own; for your own images ce,la)."""
    seeds: int = 3
    """Number of seeds, counted up from --seed."""
    imbalances: str | None = None
    """Imbalance factors to compare under, separated by commas; the recipe's own if not given."""
    budget: Literal["passes", "epochs"] = "passes"
    """What is equal for all methods: student passes (images through it; of experts by operations), or epochs."""
    jobs: int | None = None
    """Runs at a time. On a CPU each is a process of its own with its share of the cores (default: 1); on a GPU they are
    threads, as many as its memory holds (default: at most 8)."""
    out: Path | None = None
    """Folder of the runs (default: runs/compare-RECIPE); finished runs in it are not trained again."""
    overwrite: Flag = False
    """Train everything again."""
    json: Path | None = None
    """Write one record per run to this file: an array, or one line each where it ends in .jsonl."""
    quiet: Flag = False
    """Show no progress and no messages."""


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Class distribution and problems of a data set: longtail inspect SOURCE [OPTIONS].

    SOURCE is a named set, a folder with one sub-folder per class, a list (.txt), a table (.csv, .tsv, .parquet),
    annotations (.json) or hub:NAME. The exit code is 1 where training would refuse the set, else 0.
    """

    data: Data
    shots: Shots = field(default_factory=Shots)
    seed: int = 0
    """Seed of the split and of a named set's tail, as in training."""
    plot: Path | None = None
    """Write the histogram of the classes to this PNG file."""
    fix: Path | None = None
    """Write a table of the images that can be read to this .csv file, for longtail train --data."""
    json: Path | None = None
    """Write the results to this file."""
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
    pretrained: str = "auto"
    """Weights of a timm model: auto (from the Hub's local cache, an installed package or the Hub), timm (its own,
    downloaded at first use), a file of them, or none."""
    out: Path = Path("embeddings.npz")
    """The file."""
    batch_size: int = 64
    """Images per pass."""
    seed: int = 0
    """Seed of the split and of a named set's tail, as in training."""
    json: Path | None = None
    """Also write the counts to this file."""
    quiet: Flag = False
    """Print nothing."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """Split a data set into train, val and test, class by class: longtail split SOURCE --out FILE.csv [OPTIONS].

    The file is a table (path, class_name, split) to train on: longtail train --data FILE.csv --data.root FOLDER. Of
    images with boxes it is a folder with a .json file for every split, in COCO's format.
    """

    data: Data
    out: Path | None = None
    """The table, or the folder (default: split.csv or split)."""
    val: float = 0.1
    """Fraction of each class for validation; 0 for none."""
    test: float = 0.2
    """Fraction of each class for testing; 0 for none."""
    groups: str | None = None
    """Column of a table (patient, camera, the same bird) whose images of one value stay together. A group is divided
    only where a class of two images or more would be missing from train or test, which is printed."""
    strict_groups: Flag = False
    """Divide no group; a class may then be missing from a split."""
    seed: int = 0
    """Seed of the split."""
    overwrite: Flag = False
    """Replace a split that is there."""
    json: Path | None = None
    """Also write the counts to this file."""
    quiet: Flag = False
    """Print nothing."""


@dataclass(frozen=True, kw_only=True)
class Recipes:
    """Recipes with their expected score («paper»: published, not run here)."""

    json: Path | None = None
    """Also write the table to this file."""
    quiet: Flag = False
    """Print nothing."""

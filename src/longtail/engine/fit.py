"""The training loop. It knows no method: it asks for loss terms, adds them up, and keeps the books."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor
from tqdm import tqdm

import longtail
from longtail.config import Config
from longtail.data.dataset import ImageSet, LongTailedData
from longtail.data.images import Images
from longtail.data.loaders import Batch, TrainLoader, evaluation_batches
from longtail.data.per_image import PerImageView
from longtail.data.sources import load_data
from longtail.data.views import View, build_view
from longtail.engine.files import load_checkpoint, open_run, save_checkpoint
from longtail.engine.schedule import rate
from longtail.engine.teacher import given_teacher, trained_teacher
from longtail.errors import LongtailError
from longtail.evaluation.metrics import metrics
from longtail.files import write_text
from longtail.methods import method_class
from longtail.methods.base import Method
from longtail.methods.gml import queue_size
from longtail.nn import Encoder
from longtail.randomness import mix
from longtail.recognizer import Card, Recognizer

_INITIAL, _STEP = mix(3), mix(4)  # streams of draws that never meet


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path
    config: Config
    card: Card
    judged: dict[str, dict[str, Any]]
    """Metrics on the test set, under the prior ``uniform`` and under ``train``."""
    student_passes: int
    """Images that went through the student, forward and backward."""
    seconds: float
    """Training the student; evaluation and the teacher are not in it."""
    teacher_seconds: float

    @property
    def metrics(self) -> dict[str, Any]:
        """Metrics under the prior that the method predicts under."""
        return self.judged[self.card.predicts_under]


def resolve(config: Config, data: LongTailedData) -> Config:
    """Return ``config`` with every choice that was left to the data made.

    A network for the size of the images; the augmentation of their source.
    """
    return explained(config, data)[0]


def explained(config: Config, data: LongTailedData) -> tuple[Config, list[str]]:
    """Return :func:`resolve`'s configuration with the reason of every choice."""
    size, images, reasons = data.image_size, len(data.train), []
    if config.network == "auto":
        network = "conv8" if size <= 12 else "resnet32" if size <= 64 else "resnet18"
        config = config.replace(network=network)
        reasons.append(f"network {network}: images of {size} × {size} pixels")
    if config.epochs == "auto":
        steps = -(-images // config.batch_size)
        config = config.replace(epochs=max(30, min(200, round(20_000 / steps))))
        reasons.append(
            f"epochs {config.epochs}: {steps} steps an epoch with {images:,} images; 20,000 steps, 30 to 200 epochs"
        )
    if config.method == "gml" and config.gml.queue_size is None:
        slots = queue_size(config, data.class_counts)
        config = config.replace(gml={"queue_size": slots})
        reasons.append(f"gml.queue_size {slots}: a slot for every training image, at most 16,384")
    augment = data.augment if config.data.augment == "auto" else config.data.augment
    contrast: str = config.data.contrast_augment
    if contrast == "auto":
        contrast = "imagenet-contrast" if augment == "imagenet" else augment
    return config.replace(data={"augment": augment, "contrast_augment": contrast}), reasons


def build_views(config: Config, data: LongTailedData, wanted: Sequence[str]) -> list[View | PerImageView]:
    """Return the augmentation of every view, by what it is for.

    Raises:
        LongtailError: some are batched and some are not, or they do not suit the images.
    """
    names = {"classification": config.data.augment, "contrast": config.data.contrast_augment}
    chosen = [names[use] for use in wanted]
    one_by_one = [name.startswith("imagenet") for name in chosen]
    if any(one_by_one) != all(one_by_one):
        raise LongtailError(
            f"data.augment {names['classification']} and data.contrast_augment {names['contrast']} do not go together: "
            "the imagenet recipes are drawn an image at a time, the others a batch at a time"
        )
    if len(data.mean) == 1 and any(name not in {"none", "digits"} for name in chosen):
        raise LongtailError(f"data.augment {chosen[0]}: needs images in colour, these are grey; use digits or none")
    size = data.image_size
    return [PerImageView(name, size) if name.startswith("imagenet") else build_view(name, size) for name in chosen]


def fit(
    config: Config,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    teachers: Path | None = None,
    data: LongTailedData | None = None,
) -> Run:
    """Train, evaluate and keep a recogniser.

    Args:
        config: what to train.
        out: folder of the run: ``config.yaml``, ``metrics.jsonl``, ``last.ckpt``, ``recognizer/``.
        resume: go on from ``last.ckpt`` where there is one; the result equals an uninterrupted run's.
        overwrite: replace a run that is there.
        quiet: show neither progress nor remarks.
        teachers: folder that keeps trained teachers; ``teachers`` beside ``out`` if not given.
        data: the set, where it has been loaded already.

    Raises:
        LongtailError: an input cannot be used; nothing was changed.
    """
    data = load_data(config.data, config.seed) if data is None else data
    say: Callable[[str], None] = (lambda _line: None) if quiet else (lambda line: tqdm.write(line, file=sys.stderr))
    config, reasons = explained(config, data)
    # a caller's own random numbers are not ours to move
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        trainer = _Trainer(config, data, out, quiet=quiet, say=say)
        open_run(out, config, resume=resume, overwrite=overwrite)
        if config.recipe != "teacher":  # the student's run has said it
            for line in (*data.remarks, *reasons):
                say(line)
        teachers = out.parent / "teachers" if teachers is None else teachers

        def train_teacher(settings: Config, folder: Path) -> object:
            return fit(settings, folder, resume=True, quiet=quiet, teachers=teachers, data=data)

        return trainer.run(resume, teachers, train_teacher)


class _Trainer:
    """One run from its settings to its recogniser."""

    def __init__(
        self, config: Config, data: LongTailedData, out: Path, *, quiet: bool, say: Callable[[str], None]
    ) -> None:
        self.config, self.data, self.out, self.quiet, self.say = config, data, out, quiet, say
        self.broken = 0
        try:
            self.fabric = Fabric(accelerator=config.device, devices=1, precision=config.precision)
        except (RuntimeError, ValueError) as error:
            raise LongtailError(f"device {config.device}: is not to be had: {' '.join(str(error).split())}") from None
        # built before the run's folder is made: a network that does not exist leaves nothing behind
        torch.manual_seed(mix(config.seed, _INITIAL))
        self.encoder = Encoder(config.network, data.mean, data.std)
        self.state = torch.get_rng_state()
        self.kind = method_class(config.method)
        self.kind.check(config, data.class_counts)
        self.views = build_views(config, data, self.kind.views(config))
        assert isinstance(config.epochs, int)
        self.epochs = config.epochs
        # a teacher that is given is looked at before the run's folder is made, too
        given = self.kind.needs_teacher and config.teacher.source != "train"
        self.teacher = given_teacher(config, data) if given else None

    def run(self, resume: bool, teachers: Path, train_teacher: Callable[[Config, Path], object]) -> Run:
        config, data = self.config, self.data
        parts: tuple[Any, ...] = ()
        teacher_seconds = 0.0
        if self.kind.needs_teacher:
            teacher = self.teacher or trained_teacher(config, data, teachers, train_teacher, self.say)
            parts, teacher_seconds = (teacher.encoder, teacher.classifier), teacher.seconds
        torch.set_rng_state(self.state)
        method = self.kind(config, self.encoder, data.class_counts, *parts)
        method.to(memory_format=torch.channels_last)
        undecayed = method.undecayed()
        decayed = [p for p in method.parameters() if p.requires_grad and all(p is not other for other in undecayed)]
        settings = config.optimizer
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": undecayed, "weight_decay": 0.0}]
        optimizer = torch.optim.SGD(
            [group for group in groups if group["params"]],
            lr=settings.learning_rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            nesterov=settings.nesterov,
        )
        wrapped, optimizer = self.fabric.setup(method, optimizer)
        loader = TrainLoader(
            data.train,
            config.batch_size,
            self.views,
            config.seed,
            epochs=self.epochs,
            sampler=config.data.sampler,
            deferred_from=config.data.deferred_from,
            workers=config.data.workers,
        )
        books = _Books()
        checkpoint = self.out / "last.ckpt"
        if resume and checkpoint.is_file():
            self._restore(load_checkpoint(checkpoint), method, optimizer, books)
            self.say(f"resumed at step {books.step} of {loader.steps * self.epochs}")
        else:
            device = self.fabric.device

            def draw(splits: Sequence[Tensor], number: int) -> Iterator[Batch]:
                # rounds are told from epochs by their sign
                for batch in loader.batches(splits, -1 - number, only=[len(self.views) - 1]):
                    yield batch.to(device)

            method.fill(draw, data.train.labels)
        self._keep_metrics(books)
        self._train(wrapped, method, optimizer, loader, books)
        return self._finish(method, books, teacher_seconds)

    def _train(self, wrapped: Any, method: Method, optimizer: Any, loader: TrainLoader, books: _Books) -> None:
        config, total = self.config, loader.steps * self.epochs
        method.train()
        saved = tick = time.monotonic()
        with _Progress(config.method, books.step, total, self.quiet) as progress:
            for epoch in range(books.step // loader.steps, self.epochs):
                for batch in loader.epoch(epoch, books.step % loader.steps):
                    learning_rate = config.optimizer.learning_rate * rate(config.schedule, books.step, total)
                    for group in optimizer.param_groups:
                        group["lr"] = learning_rate
                    # what draws at random inside a network (dropout, for one) follows the step as well
                    _seed(mix(config.seed, _STEP, books.step))
                    terms = wrapped(batch.to(self.fabric.device))
                    optimizer.zero_grad(set_to_none=True)
                    self.fabric.backward(torch.stack(list(terms.values())).sum())
                    optimizer.step()
                    books.add(terms, len(batch.labels), len(batch.labels) * method.student_views(config))
                    books.seconds += time.monotonic() - tick
                    progress.step(epoch, self.epochs, learning_rate, books)
                    if books.step % loader.steps == 0:
                        self._end_epoch(method, books, epoch, learning_rate)
                    if time.monotonic() - saved >= config.checkpoint_seconds or books.step == total:
                        self._save(method, optimizer, books)
                        saved = time.monotonic()
                    # what follows a step is not training, and is not counted as such
                    tick = time.monotonic()

    def _end_epoch(self, method: Method, books: _Books, epoch: int, learning_rate: float) -> None:
        means = books.means()
        for name, value in means.items():
            if not math.isfinite(value):
                raise LongtailError(
                    f"{self.out}: the loss term '{name}' is {value} in epoch {epoch + 1}; "
                    "lower optimizer.learning_rate (the last checkpoint is whole)"
                )
        watched = {name: value.item() for name, value in method.watched().items()}
        self._log(
            {
                "kind": "epoch",
                "epoch": epoch + 1,
                "step": books.step,
                "learning_rate": learning_rate,
                "loss": sum(means.values()),
                **means,
                **watched,
                **({"broken_images": len(self.data.train.images.broken)} if self.data.train.images.broken else {}),
                "images_per_second": round(books.speed(), 1),
                "student_passes": books.student_passes,
                "seconds": round(books.seconds, 3),
            }
        )
        broken = self.data.train.images.broken
        if len(broken) > self.broken:
            self.broken = len(broken)
            first = next(iter(broken.values()))
            self.say(
                f"{len(broken)} training images cannot be read; others of their class stood in; the first: {first}"
            )
        books.clear()
        if self.data.val is not None:
            self._judge(method, books, self.data.val)
            method.train()

    def _judge(self, method: Method, books: _Books, images: ImageSet) -> None:
        """Keep the weights that are best on the validation set; a tie keeps the earlier ones."""
        card = self._recognizer(method, {}, {})
        result = judge(card, images, self.config)[method.predicts_under]
        score = result["balanced_accuracy"]
        self._log({"kind": "validation", "step": books.step, "balanced_accuracy": score, "top1": result["top1"]})
        if books.best is None or score > books.best["score"]:
            weights = {name: t.detach().cpu().clone() for name, t in _kept(method).items()}
            books.best = {"score": score, "step": books.step, "weights": weights}

    def _recognizer(self, method: Method, trained: dict[str, Any], judged: dict[str, Any]) -> Recognizer:
        data = self.data
        card = Card(
            class_names=data.class_names,
            class_counts=tuple(data.class_counts),
            network=self.config.network,
            scale=self.config.classifier.scale,
            mean=data.mean,
            std=data.std,
            image_size=data.image_size,
            stored_size=_stored_size(data.test.images, data.image_size),
            predicts_under=method.predicts_under,
            trained=trained,
            metrics=judged,
        )
        return Recognizer(method.encoder, method.classifier, card)

    def _finish(self, method: Method, books: _Books, teacher_seconds: float) -> Run:
        config = self.config
        if books.best is not None:
            method.load_state_dict(books.best["weights"], strict=False)
        trained: dict[str, Any] = {
            "longtail": longtail.__version__,
            "torch": torch.__version__,
            "recipe": config.recipe,
            "method": config.method,
            "epochs": config.epochs,
            "seed": config.seed,
            "seconds": round(books.seconds, 3),
            "teacher_seconds": round(teacher_seconds, 3),
            "student_passes": books.student_passes,
        }
        if books.best is not None:
            trained["best_step"] = books.best["step"]
        recognizer = self._recognizer(method, trained, {})
        judged = judge(recognizer, self.data.test, config)
        kept = self._recognizer(method, trained, judged["uniform"])
        kept.save(self.out / "recognizer")
        self._log({"kind": "test", "step": books.step, **judged})
        return Run(self.out, config, kept.card, judged, books.student_passes, trained["seconds"], teacher_seconds)

    def _save(self, method: Method, optimizer: Any, books: _Books) -> None:
        state = {"method": method.state_dict(), "optimizer": optimizer.state_dict(), "books": books.state()}
        save_checkpoint(self.out / "last.ckpt", {"images": self.data.fingerprint, **state})

    def _restore(self, state: dict[str, Any], method: Method, optimizer: Any, books: _Books) -> None:
        if state.get("images") != self.data.fingerprint:
            raise LongtailError(
                f"{self.out / 'last.ckpt'}: was trained on other images than there are now; "
                "restore them, or start anew with --overwrite"
            )
        try:
            method.load_state_dict(state["method"])
            optimizer.load_state_dict(state["optimizer"])
            books.restore(state["books"])
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            message = " ".join(str(error).split())[:200]
            raise LongtailError(
                f"{self.out / 'last.ckpt'}: is another recipe's checkpoint ({message}); start anew with --overwrite"
            ) from None

    def _keep_metrics(self, books: _Books) -> None:
        """Drop the lines of ``metrics.jsonl`` that were written after the checkpoint."""
        path = self.out / "metrics.jsonl"
        if path.is_file():
            kept = [line for line in read_metrics(path) if line["kind"] != "test" and line["step"] <= books.step]
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))

    def _log(self, line: dict[str, Any]) -> None:
        try:
            with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise LongtailError(f"{self.out / 'metrics.jsonl'}: cannot be written: {error.strerror}") from None


class _Progress:
    """The bar: epoch, loss terms, learning rate, images a second, and the time left."""

    def __init__(self, name: str, done: int, total: int, quiet: bool) -> None:
        # a log file wants a line now and then, not one a step
        self.every = 0.5 if sys.stderr.isatty() else 20.0
        self.shown = time.monotonic()
        self.bar = tqdm(
            desc=name,
            initial=done,
            total=total,
            disable=quiet,
            unit="step",
            mininterval=self.every,
            maxinterval=self.every,
            dynamic_ncols=True,
        )

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def step(self, epoch: int, epochs: int, learning_rate: float, books: _Books) -> None:
        now = time.monotonic()
        if not self.bar.disable and now - self.shown >= self.every:
            self.shown = now
            shown = {
                "epoch": f"{epoch + 1}/{epochs}",
                **{name: f"{value:.3f}" for name, value in books.means().items()},
            }
            shown |= {"lr": f"{learning_rate:.4f}", "images/s": f"{books.speed():.0f}"}
            self.bar.set_postfix(shown, refresh=False)
        self.bar.update()


class _Books:
    """What a run counts. The sums stay on the device: reading one makes the host wait."""

    def __init__(self) -> None:
        self.step = 0
        self.student_passes = 0
        self.seconds = 0.0
        self.best: dict[str, Any] | None = None
        self.clear()

    def clear(self) -> None:
        """Begin an epoch."""
        self.sums: dict[str, Tensor] = {}
        self.images = 0
        self.entered = self.seconds

    def add(self, terms: dict[str, Tensor], images: int, passes: int) -> None:
        for name, value in terms.items():
            weighted = value.detach() * images
            self.sums[name] = self.sums[name] + weighted if name in self.sums else weighted
        self.step, self.images, self.student_passes = self.step + 1, self.images + images, self.student_passes + passes

    def speed(self) -> float:
        """Return the epoch's images a second so far."""
        return self.images / max(self.seconds - self.entered, 1e-9)

    def means(self) -> dict[str, float]:
        return {name: (value / self.images).item() for name, value in self.sums.items()}

    def state(self) -> dict[str, Any]:
        return dict(vars(self))

    def restore(self, state: dict[str, Any]) -> None:
        for name in vars(self):
            setattr(self, name, state[name])


def _seed(seed: int) -> None:
    # torch.manual_seed would, where CUDA is built in but not in use, queue a call with its stack trace every time
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


def _kept(method: Method) -> dict[str, Tensor]:
    """Return the tensors that a recogniser keeps, by their names in the method."""
    state = method.state_dict()
    return {name: tensor for name, tensor in state.items() if name.startswith(("encoder.", "classifier."))}


def _stored_size(images: Images, image_size: int) -> int:
    return images.take(torch.zeros(1, dtype=torch.int64)).shape[-1] if len(images) else image_size


def judge(recognizer: Recognizer, images: ImageSet, config: Config) -> dict[str, dict[str, Any]]:
    """Return the metrics of a split under the uniform prior and under the training prior, every image seen once."""
    device = recognizer.classifier.weight.device
    recognizer.encoder.eval()
    scores, labels = [], []
    for views, truth in evaluation_batches(images, recognizer.card.image_size):
        scores.append(recognizer.scores(views.to(device)).cpu())
        labels.append(truth)
    counts, shots = recognizer.card.class_counts, config.shots
    return {
        prior: metrics(torch.cat(scores), torch.cat(labels), counts, shots, recognizer.log_prior(prior))
        for prior in ("uniform", "train")
    }


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a ``metrics.jsonl``; a last line that a crash cut off is left out."""
    lines: Iterable[str] = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    read = []
    for line in lines:
        try:
            read.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return read


def evaluate(run: Path, prior: str = "uniform", data_root: str | None = None) -> dict[str, Any]:
    """Judge a finished run on its test set.

    Args:
        run: its folder.
        prior: ``uniform`` or ``train``: assumed for the metrics at the top level.
        data_root: where the images are now, if not where they were.

    Returns:
        The metrics under ``prior``, with ``prior``, ``class_names`` and, under ``priors``, those under both.
    """
    from longtail.config import read_config

    recognizer = Recognizer.load(run)
    if not (run / "config.yaml").is_file():
        raise LongtailError(f"{run}: has no config.yaml: expected the folder of a run, which names its test set")
    config = read_config(run / "config.yaml")
    if data_root is not None:
        config = config.replace(data={"root": data_root})
    data = load_data(config.data, config.seed)
    if data.class_names != recognizer.card.class_names:
        raise LongtailError(f"{run}: the classes of {config.data.root or config.data.source} are not those of the run")
    judged = judge(recognizer, data.test, config)
    return described(judged, recognizer.card, prior)


def described(judged: dict[str, dict[str, Any]], card: Card, prior: str = "uniform") -> dict[str, Any]:
    """Return what ``evaluate --json`` holds: the metrics under one prior on top, and what they are of."""
    return {
        **judged[prior],
        "prior": prior,
        "class_names": list(card.class_names),
        "class_counts": list(card.class_counts),
        "priors": judged,
    }

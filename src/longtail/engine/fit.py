"""The training loop. It knows no method: it asks for loss terms, adds them up, and keeps the books."""

from __future__ import annotations

import dataclasses
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import longtail
from longtail.config import Config
from longtail.data.dataset import ImageSet, LongTailedData
from longtail.data.loaders import Batch, TrainLoader
from longtail.data.scenes import DenseData
from longtail.data.sources import load_data
from longtail.engine.books import Books, Log, Progress, Watch, check_logs
from longtail.engine.cache import TeacherCache, teacher_cache
from longtail.engine.calibrate import calibrated
from longtail.engine.choices import build_views, explained
from longtail.engine.files import load_checkpoint, open_run, save_checkpoint
from longtail.engine.judge import judge
from longtail.engine.processes import (
    StopSignals,
    as_in_the_first,
    batch_sizes,
    build_fabric,
    one_line_of_a_lost_process,
    rank,
    wait_for_all,
    world_size,
)
from longtail.engine.schedule import rate
from longtail.engine.teacher import Teacher, given_teacher, trained_teacher
from longtail.engine.thumbnails import keep_thumbnails
from longtail.errors import LongtailError, StoppedError
from longtail.files import write_text
from longtail.methods import method_class
from longtail.methods.base import Method
from longtail.nn import CosineClassifier, Encoder, JoinedClassifier
from longtail.nn.backbones import normalization
from longtail.randomness import mix
from longtail.recognizer import Card, Recognizer
from longtail.segmenter import Segmenter

_INITIAL, _STEP = mix(3), mix(4)  # streams of draws that never meet
_NORM_EVERY = 10  # steps between two looks at the gradient's norm, where it is not clipped


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

    Started by torchrun in several processes, each calls this; they share out every batch, one of them writes,
    and all return the same.

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
        StoppedError: SIGTERM or SIGINT came; everything is saved.
    """
    data = load_data(config.data, config.seed) if data is None else data
    config, reasons = explained(config, data)

    def say(line: str) -> None:
        if not quiet and rank() == 0:
            tqdm.write(line, file=sys.stderr)

    # a caller's own random numbers are not ours to move
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        trainer = _Trainer(config, data, out, quiet=quiet, say=say)
        teachers = out.parent / "teachers" if teachers is None else teachers

        def train_teacher(settings: Config, folder: Path) -> object:
            return fit(settings, folder, resume=True, quiet=quiet, teachers=teachers, data=data)

        with one_line_of_a_lost_process():
            if rank() == 0:
                open_run(out, config, resume=resume, overwrite=overwrite)
            wait_for_all()
            if config.recipe != "teacher":  # the student's run has said it
                for line in (*data.remarks, *reasons):
                    say(line)
            return trainer.run(resume, teachers, train_teacher)


class _Trainer:
    """One run from its settings to its recogniser."""

    def __init__(
        self, config: Config, data: LongTailedData, out: Path, *, quiet: bool, say: Callable[[str], None]
    ) -> None:
        self.config, self.data, self.out, self.quiet, self.say = config, data, out, quiet, say
        self.broken = 0
        self.fabric = build_fabric(config)
        # built before the run's folder is made: a network that does not exist leaves nothing behind
        torch.manual_seed(mix(config.seed, _INITIAL))
        mean, std = data.mean, data.std
        if config.pretrained != "none":
            mean, std = (tuple(values) for values in normalization(config.network, len(mean)))
        self.encoder = Encoder(config.network, mean, std, pretrained=config.pretrained)
        self.state = torch.get_rng_state()
        self.kind = method_class(config.method)
        self.kind.check(config, data.class_counts)
        self.views = build_views(config, data, self.kind.views(config))
        assert isinstance(config.epochs, int)
        self.epochs = config.epochs
        # a teacher that is given is looked at before the run's folder is made, too
        check_logs(config.log)
        self._check_parts()
        given = self.kind.needs_teacher(config) and config.teacher.source != "train"
        self.teacher = given_teacher(config, data, self.kind.distillation_weight(config) > 0) if given else None

    def _check_parts(self) -> None:
        parts = self.config.optimizer.accumulate
        least = self._loader(self.views, None, rank(), world_size()).least
        if parts == 1 and least < 2:
            raise LongtailError(
                f"batch_size {self.config.batch_size}: leaves {least} image{'s' * (least != 1)} of "
                f"{len(self.data.train)} in some steps, expected at least 2 (BatchNorm needs them); choose another"
            )
        if least // parts < 2:
            raise LongtailError(
                f"optimizer.accumulate {parts}: leaves {least // parts} of {least} images a part, expected at least 2; "
                "lower it, or raise batch_size"
            )

    def run(self, resume: bool, teachers: Path, train_teacher: Callable[[Config, Path], object]) -> Run:
        config, data = self.config, self.data
        parts: tuple[Any, Any] = (None, None)
        teacher_seconds, cache = 0.0, None
        if self.kind.needs_teacher(config):
            teacher = self.teacher or trained_teacher(config, data, teachers, train_teacher, self.say)
            parts, teacher_seconds = (teacher.encoder, teacher.classifier), teacher.seconds
            if config.teacher.cache:
                started = time.monotonic()
                cache = self._cache(teacher, teachers)
                teacher_seconds += time.monotonic() - started
        torch.set_rng_state(self.state)
        draw_counts = list(data.draw_counts) if isinstance(data, DenseData) else None
        method = self.kind(config, self.encoder, data.class_counts, *parts, draw_counts)
        if world_size() > 1 and self.fabric.device.type != "cpu":
            nn.SyncBatchNorm.convert_sync_batchnorm(method)
        method.to(memory_format=torch.channels_last)
        if config.compile:
            method.encoder.backbone.compile()
        optimizer = self._optimizer(method)
        wrapped, optimizer = self.fabric.setup(method, optimizer)
        average = self._average(method)
        loader = self._loader(self.views, cache, rank(), world_size())
        books = Books()
        checkpoint = self.out / "last.ckpt"
        if resume and checkpoint.is_file():
            self._restore(load_checkpoint(checkpoint), method, optimizer, average, books)
            self.say(f"resumed at step {books.step} of {loader.steps * self.epochs}")
        else:
            device = self.fabric.device

            def draw(splits: Sequence[Tensor], number: int) -> Iterator[Batch]:
                # rounds are told from epochs by their sign
                for batch in loader.batches(splits, -1 - number, only=[len(self.views) - 1]):
                    yield batch.to(device)

            method.fill(draw, data.train.labels)
        if rank() == 0:  # where the images are now, for one, once it is certain that they are the same
            write_text(self.out / "config.yaml", config.to_yaml())
        log = Log(self.out, config.log, self.out.name, books.step)
        try:
            self._train(wrapped, method, optimizer, average, loader, books, log)
            return self._finish(method, average, books, log, teacher_seconds)
        finally:
            log.close()

    def _loader(self, views: Sequence[Any], cache: Any, process: int = 0, processes: int = 1) -> TrainLoader:
        settings = self.config.data
        return TrainLoader(
            self.data.train,
            self.config.batch_size,
            views,
            self.config.seed,
            epochs=self.epochs,
            sampler=settings.sampler,
            deferred_from=settings.deferred_from,
            workers=settings.workers,
            rank=process,
            world=processes,
            cache=cache,
        )

    def _cache(self, teacher: Teacher, teachers: Path) -> TeacherCache:
        device, distils = self.fabric.device, self.kind.distillation_weight(self.config) > 0

        def opened(write: bool) -> TeacherCache:
            return teacher_cache(
                self.config,
                self.data,
                teacher.encoder.to(device).eval(),
                teacher.classifier.to(device) if distils and teacher.classifier is not None else None,
                lambda draws: self._loader(self.views[:1], draws),
                teachers / "cache",
                device,
                self.say,
                write=write,
            )

        made = opened(True) if rank() == 0 else None
        wait_for_all()
        return made or opened(False)

    def _optimizer(self, method: Method) -> torch.optim.Optimizer:
        undecayed = method.undecayed()
        decayed = [p for p in method.parameters() if p.requires_grad and all(p is not other for other in undecayed)]
        settings = self.config.optimizer
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": undecayed, "weight_decay": 0.0}]
        return torch.optim.SGD(
            [group for group in groups if group["params"]],
            lr=settings.learning_rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            nesterov=settings.nesterov,
        )

    def _average(self, method: Method) -> Any:
        """Return a slow average of the student, where one is asked for."""
        if self.config.optimizer.ema is None:
            return None
        from timm.utils import ModelEmaV3

        return ModelEmaV3(_student(method), decay=self.config.optimizer.ema, use_warmup=True)

    def _train(
        self, wrapped: Any, method: Method, optimizer: Any, average: Any, loader: TrainLoader, books: Books, log: Log
    ) -> None:
        config, total = self.config, loader.steps * self.epochs
        method.train()
        watch = Watch(self.out)
        saved = tick = time.monotonic()
        with Progress(config.method, books.step, total, self.quiet) as progress, StopSignals(self.quiet) as signals:
            for epoch in range(books.step // loader.steps, self.epochs):
                for batch in loader.epoch(epoch, books.step % loader.steps):
                    learning_rate = config.optimizer.learning_rate * rate(config.schedule, books.step, total)
                    for group in optimizer.param_groups:
                        group["lr"] = learning_rate
                    terms = self._step(wrapped, method, optimizer, batch, books)
                    if average is not None:
                        average.update(_student(method), step=books.step)
                    assert batch.total is not None
                    books.add(terms, batch.total, batch.total * method.student_views(config))
                    watch.add(books.step, terms)
                    books.seconds += time.monotonic() - tick
                    progress.step(epoch, self.epochs, learning_rate, books)
                    if books.step % loader.steps == 0:
                        self._end_epoch(method, average, books, log, epoch, learning_rate)
                    due = time.monotonic() - saved >= config.checkpoint_seconds
                    name, due = signals.agreed(books.step, due, self.fabric.device)
                    if due or name or books.step == total:
                        watch.flush()
                        self._save(method, optimizer, average, books)
                        saved = time.monotonic()
                    if name and books.step < total:
                        raise StoppedError(name, f"at step {books.step} of {total}")
                    # what follows a step is not training, and is not counted as such
                    tick = time.monotonic()

    def _step(self, wrapped: Any, method: Method, optimizer: Any, batch: Batch, books: Books) -> dict[str, Tensor]:
        settings = self.config.optimizer
        # what draws at random inside a network (dropout, for one) follows the step as well
        _seed(mix(self.config.seed, _STEP, books.step, rank()))
        optimizer.zero_grad(set_to_none=True)
        terms: dict[str, Tensor] = {}
        parts = batch.split(settings.accumulate)
        whole = batch_sizes([len(part) for part in parts], self.fabric.device)
        for number, part in enumerate(parts):
            with self.fabric.no_backward_sync(wrapped, enabled=world_size() > 1 and number + 1 < len(parts)):
                found = wrapped(part.to(self.fabric.device))
                share = whole[number] / sum(whole)
                self.fabric.backward(torch.stack(list(found.values())).sum() * share)
            for name, value in found.items():
                terms[name] = terms[name] + value.detach() * share if name in terms else value.detach() * share
        if settings.clip is not None or books.step % _NORM_EVERY == 0:
            longest = math.inf if settings.clip is None else settings.clip
            norm = self.fabric.clip_gradients(method, optimizer, max_norm=longest, error_if_nonfinite=False)
            assert norm is not None
            books.add_norm(norm)
        optimizer.step()
        return terms

    def _end_epoch(
        self, method: Method, average: Any, books: Books, log: Log, epoch: int, learning_rate: float
    ) -> None:
        means = books.global_means()
        entropy = method.conditional_entropy(means)
        bits = None if entropy is None else (_entropy(self.data.class_counts) - entropy) / math.log(2)
        watched = {name: value.item() for name, value in method.watched().items()}
        broken = self.data.train.images.broken
        if len(broken) > self.broken:
            self.broken = len(broken)
            first = next(iter(broken.values()))
            self.say(
                f"{len(broken)} training images cannot be read, others of their class stood in; the first: {first}"
            )
        log.add(
            {
                "kind": "epoch",
                "epoch": epoch + 1,
                "step": books.step,
                "learning_rate": learning_rate,
                "loss": sum(means.values()),
                **means,
                "information_bits": bits,
                "gradient_norm": books.norm(),
                **watched,
                **({"broken_images": len(broken)} if broken else {}),
                "images_per_second": round(books.speed(), 1),
                "memory_mib": _memory_mib(self.fabric.device),
                "student_passes": books.student_passes,
                "seconds": round(books.seconds, 3),
            }
        )
        books.clear()
        looked = (epoch + 1) % self.config.validate_every == 0 or epoch + 1 == self.epochs
        if self.data.val is not None and looked:
            self._judge(method, average, books, log, self.data.val)
            method.train()

    def _judge(self, method: Method, average: Any, books: Books, log: Log, images: ImageSet) -> None:
        """Keep the weights that are best on the validation set; a tie keeps the earlier ones."""
        student = _kept(method, average)
        as_in_the_first(student)
        kept = self._recognizer(student, {}, {})
        result = judge(kept, images, self.config, brief=True)[method.predicts_under(self.config)]
        names = ("mean_iou", "tail", "balanced_accuracy", "top1")
        shown: dict[str, Any] = {name: result[name] for name in names if name in result}
        score = next(iter(shown.values()))
        log.add({"kind": "validation", "step": books.step, **shown})
        if books.best is None or score > books.best["score"]:
            weights = {name: t.detach().cpu().clone() for name, t in student.state_dict().items()}
            books.best = {"score": score, "step": books.step, "weights": weights}

    def _recognizer(self, student: nn.ModuleDict, trained: dict[str, Any], judged: dict[str, Any]) -> Recognizer:
        data, classifier = self.data, student["classifier"]
        keys, weight = (0, 0), 0.0
        if isinstance(classifier, JoinedClassifier):
            keys, weight = (len(classifier.keys), classifier.keys.shape[1]), classifier.join_weight
        card = Card(
            class_names=data.class_names,
            class_counts=tuple(data.class_counts),
            network=self.config.network,
            scale=self.config.classifier.scale,
            head="joined" if weight else "cosine",
            keys=keys,
            join_weight=weight,
            task="segmentation" if isinstance(data, DenseData) else "classification",
            mean=student["encoder"].mean,  # type: ignore[arg-type]
            std=student["encoder"].std,  # type: ignore[arg-type]
            image_size=data.image_size,
            stored_size=data.image_size if isinstance(data, DenseData) else _stored_size(data),
            shape=data.size if isinstance(data, DenseData) else None,
            predicts_under=self.kind.predicts_under(self.config),
            trained=trained,
            metrics=judged,
        )
        kept = Segmenter if isinstance(data, DenseData) else Recognizer
        return kept(student["encoder"], classifier, card)  # type: ignore[arg-type]

    def _finish(self, method: Method, average: Any, books: Books, log: Log, teacher_seconds: float) -> Run:
        config = self.config
        student = _kept(method, average)
        as_in_the_first(student)
        if books.best is not None:
            student.load_state_dict(books.best["weights"])
        trained: dict[str, Any] = {
            "longtail": longtail.__version__,
            "torch": torch.__version__,
            "recipe": config.recipe,
            "data": config.data.source,
            "method": config.method,
            "epochs": config.epochs,
            "seed": config.seed,
            "seconds": round(books.seconds, 3),
            "teacher_seconds": round(teacher_seconds, 3),
            "student_passes": books.student_passes,
            "images": self.data.fingerprint,
        }
        if books.best is not None:
            trained["best_step"] = books.best["step"]
        kept = self._recognizer(student, trained, {})
        if self.data.val is not None and not isinstance(self.data, DenseData):
            kept = calibrated(kept, self.data.val, config)
        judged = judge(kept, self.data.test, config)
        kept.card = dataclasses.replace(kept.card, metrics=judged["uniform"])
        if rank() == 0:
            kept.save(self.out / "recognizer")
            if config.recipe != "teacher":
                keep_thumbnails(self.out, self.data.test, judged[kept.card.predicts_under].get("mistakes", {}))
        log.add({"kind": "test", "step": books.step, **judged})
        wait_for_all()
        return Run(self.out, config, kept.card, judged, books.student_passes, trained["seconds"], teacher_seconds)

    def _save(self, method: Method, optimizer: Any, average: Any, books: Books) -> None:
        state = {"method": method.state_dict(), "optimizer": optimizer.state_dict(), "books": books.state()}
        if average is not None:
            state["average"] = average.module.state_dict()
        if rank() == 0:
            save_checkpoint(self.out / "last.ckpt", {"images": self.data.fingerprint, **state})

    def _restore(self, state: dict[str, Any], method: Method, optimizer: Any, average: Any, books: Books) -> None:
        if state.get("images") != self.data.fingerprint:
            raise LongtailError(
                f"{self.out / 'last.ckpt'}: was trained on other images than there are now; "
                "restore them, or start anew with --overwrite"
            )
        try:
            method.load_state_dict(state["method"])
            optimizer.load_state_dict(state["optimizer"])
            if average is not None:
                average.module.load_state_dict(state["average"])
            books.restore(state["books"], self.fabric.device)
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            message = " ".join(str(error).split())[:200]
            raise LongtailError(
                f"{self.out / 'last.ckpt'}: is another recipe's checkpoint ({message}); start anew with --overwrite"
            ) from None


def _seed(seed: int) -> None:
    # torch.manual_seed would, where CUDA is built in but not in use, queue a call with its stack trace every time
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


def _student(method: Method) -> nn.ModuleDict:
    """Return what a slow average is taken of."""
    return nn.ModuleDict({"encoder": method.encoder, "classifier": method.classifier})


def _kept(method: Method, average: Any) -> nn.ModuleDict:
    """Return what a recogniser keeps of a method, or of its slow average."""
    student = _student(method) if average is None else average.module
    classifier = student["classifier"]
    assert isinstance(classifier, CosineClassifier)
    return nn.ModuleDict({"encoder": student["encoder"], "classifier": method.head(classifier)})


def _entropy(counts: Sequence[int]) -> float:
    """Return the labels' entropy H(Y) in nats."""
    total = sum(counts)
    return -sum(count / total * math.log(count / total) for count in counts if count)


def _memory_mib(device: torch.device) -> int:
    """Return the most memory that was in use: the accelerator's, or this process's."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10))


def _stored_size(data: LongTailedData) -> int:
    images = data.test.images
    return images.take(torch.zeros(1, dtype=torch.int64)).shape[-1] if len(images) else data.image_size

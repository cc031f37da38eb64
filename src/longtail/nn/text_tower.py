"""Classifier weights from class names, by the text tower of the CLIP or SigLIP model that a timm network belongs to.

Legend: C classes, F feature width, D width of the embedding that images and texts share.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtail.errors import LongtailError
from longtail.nn.network_name import (
    is_decoder_network,
    is_on_hub,
    is_repository,
    repository_file,
    timm_name,
    timm_settings,
)

PROMPT = "a photo of a {}."
_BATCH = 128
_VIT = re.compile(r"vit_(?P<size>base|large|huge|giant|gigantic)_patch(?P<patch>\d+)_clip(_quickgelu)?_(?P<side>\d+)")
_LETTERS = {"base": "B", "large": "L", "huge": "H", "giant": "g", "gigantic": "bigG"}


class TextTower(NamedTuple):
    """A model of open_clip."""

    name: str
    """Its name, ``ViT-B-16``, or the source of a model in the Hub's layout."""
    tag: str | None
    """Its weights, ``openai``; None for those of a source."""


def find_text_tower(network: str, pretrained: str) -> TextTower:
    """Return the model of open_clip whose image tower a network is, after its weights have been found or downloaded.

    Args:
        network: a timm model, ``hf-hub:OWNER/NAME`` or ``local-dir:FOLDER``.
        pretrained: its weights, see :func:`longtail.nn.build_backbone`.

    Raises:
        LongtailError: the extra ``clip`` is not installed, the network has no text tower or no pretrained weights, or
            those of the text tower cannot be reached.
    """
    from huggingface_hub import try_to_load_from_cache

    open_clip = _open_clip()
    name = timm_name(network)
    if pretrained == "none":
        raise LongtailError("classifier.init text: needs a network with pretrained weights; use --pretrained timm")
    if is_decoder_network(network):
        raise LongtailError("classifier.init text: is for models that classify whole images")
    if is_repository(name):
        try:
            repository_file(name, ("open_clip_config.json",))
        except LongtailError:
            raise _no_tower(network) from None
        return TextTower(name, None)
    settings = timm_settings(name)
    tower = None if settings is None else _in_registry(open_clip, name.split(".")[0], settings)
    if tower is None:
        raise _no_tower(network)
    weights = open_clip.get_pretrained_cfg(*tower)
    repository, _, name = weights.get("hf_hub", "").rpartition("/")
    files = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", *([name] if name else []))
    if not any(isinstance(try_to_load_from_cache(repository, file), str) for file in files) and not is_on_hub(
        repository
    ):
        raise _unreachable(tower, "its weights are not in the Hub's local cache, and the Hub cannot be reached")
    try:
        with _quiet_logging():
            file = open_clip.download_pretrained(weights)
    except Exception as error:  # of the network, and of the Hub's client in offline mode
        raise _unreachable(tower, str(error)) from None
    assert file
    return tower


@torch.no_grad()
def text_weights(class_names: Sequence[str], network: str, pretrained: str) -> Tensor:
    """Return (C, F) classifier weights of norm 1: the embeddings of «a photo of a NAME.» in the space of the features.

    Images and texts are compared after a projection P of the features, t · P h, so the weight is Pᵀ t. Underscores in
    class names are spaces.

    Args:
        class_names: C names.
        network: see :func:`find_text_tower`.
        pretrained: see :func:`find_text_tower`.

    Raises:
        LongtailError: see :func:`find_text_tower`; or the model has no linear projection.

    Source: Radford et al., *CLIP*, ICML 2021, arXiv 2103.00020; as initial weights: Shi et al., *LIFT*, ICML 2024,
    arXiv 2309.10019.
    """
    open_clip = _open_clip()
    tower = find_text_tower(network, pretrained)
    prompts = [PROMPT.format(name.replace("_", " ")) for name in class_names]
    try:
        with torch.random.fork_rng(devices=[]), _quiet_logging():
            model: Any = open_clip.create_model(tower.name, pretrained=tower.tag, require_pretrained=True).eval()
            tokens = open_clip.get_tokenizer(tower.name)(prompts)
    except Exception as error:  # of open_clip, of the files, and of a tokenizer that is on the Hub
        raise _unreachable(tower, str(error)) from None
    texts = torch.cat([F.normalize(model.encode_text(part)) for part in tokens.split(_BATCH)]).float()
    projection = _projection(model.visual, texts.shape[1])
    if projection is None:
        raise LongtailError(f"classifier.init text: {tower.name} has no linear projection of its image features")
    return F.normalize(texts @ projection)


def _projection(visual: Any, width: int) -> Tensor | None:
    """Return the (D, F) projection of an image tower's features; None if it has none that is linear."""
    if isinstance(getattr(visual, "proj", None), Tensor):
        return visual.proj.detach().float().T  # type: ignore[no-any-return]
    trunk = getattr(visual, "trunk", None)
    if trunk is None:
        return None
    for layer in (getattr(visual.head, "proj", None), trunk.get_classifier()):
        if isinstance(layer, nn.Linear):
            return layer.weight.detach().float()
    plain = len(visual.head) == 0 and trunk.num_features == width
    return torch.eye(width) if plain else None


def _in_registry(open_clip: Any, architecture: str, settings: Any) -> TextTower | None:
    """Return the model of open_clip with the weights of timm's settings: the same repository, or the same names."""
    for model, tag in open_clip.list_pretrained():
        weights = open_clip.get_pretrained_cfg(model, tag)
        config = open_clip.get_model_config(model) or {}
        if bool(weights.get("quick_gelu")) != bool(config.get("quick_gelu")):
            continue
        same_file = settings.hf_hub_id and weights.get("hf_hub", "").rstrip("/") == settings.hf_hub_id
        if same_file or _same_name(architecture, settings.tag, model, tag, config):
            return TextTower(model, tag)
    return None


def _same_name(architecture: str, timm_tag: str, model: str, tag: str, config: dict[str, Any]) -> bool:
    """Return whether a model of open_clip and its tag are what timm calls by its own name and tag."""
    if "_ft_" in timm_tag:  # weights that were fine-tuned to classify have no text tower
        return False
    if config.get("vision_cfg", {}).get("timm_model_name") == architecture:
        if "siglip" in architecture:
            second, several = timm_tag.startswith("v2_"), timm_tag.endswith("_i18n")
            return tag == "webli" and (("SigLIP2" in model), ("i18n" in model)) == (second, several)
        return tag.replace("_", "").startswith(timm_tag.replace("_", ""))
    match = _VIT.fullmatch(architecture)
    if match is None or config.get("vision_cfg", {}).get("timm_model_name"):
        return False
    side = "" if match["side"] == "224" else f"-{match['side']}"
    expected = f"ViT-{_LETTERS[match['size']]}-{match['patch']}{side}"
    stem = re.sub(r"_(s\d+b.*|b\d+k)$", "", tag).replace("_", "")
    return model.removesuffix("-quickgelu") == expected and stem == timm_tag.replace("_", "")


def _open_clip() -> Any:
    try:
        import open_clip
    except ImportError:
        raise LongtailError("classifier.init text: needs the extra clip: pip install 'longtail[clip]'") from None
    return open_clip


def _no_tower(network: str) -> LongtailError:
    return LongtailError(
        f"classifier.init text: network '{network}' has no text tower; use one of CLIP or SigLIP, such as "
        "vit_base_patch16_clip_224.openai, or classifier.init class_means"
    )


def _unreachable(tower: TextTower, message: str) -> LongtailError:
    reason = " ".join(message.split())[:200]
    return LongtailError(
        f"classifier.init text: the text tower {tower.name}{f' ({tower.tag})' if tower.tag else ''} cannot be loaded; "
        f"check the network connection: {reason}"
    )


@contextlib.contextmanager
def _quiet_logging() -> Iterator[None]:
    """Keep the root logger, to which open_clip writes, as it is; without a handler it would be given one."""
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)

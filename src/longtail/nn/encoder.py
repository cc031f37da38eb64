"""Encoders: image normalisation and a backbone in one module.

An encoder maps images in [0, 1], shape (B, channels, H, W), to features (B, F). It contains the normalisation, so that
student and teacher may differ in it, and a saved model needs no separate note of it.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtail.errors import LongtailError, did_you_mean
from longtail.nn.backbones import BatchNorm, build_backbone
from longtail.nn.network_name import (
    format_network,
    is_timm_network,
    parse_network,
    resolve_network,
    timm_settings,
)
from longtail.nn.pretrained import known_networks, normalization

BackboneBuilder = Callable[[str, int, str], nn.Module]
"""A function of a network's name, the images' channels and ``pretrained``; see :func:`build_backbone`."""

_TRACING = threading.Lock()
_CPU_CHUNK = 64  # images of one pass through a frozen network on a CPU, so that activations stay in its caches


class Normalize(nn.Module):
    """Subtract a mean and divide by a standard deviation of each channel; neither is part of the state dict.

    Args:
        mean: one for each channel.
        std: one for each channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, channels, H, W) normalised images."""
        return (images - self.mean) / self.std


class Encoder(nn.Module):
    """Normalisation and a backbone.

    Args:
        name: the backbone's name, see :func:`build_backbone`.
        mean: mean of each channel of the images.
        std: standard deviation of each channel of the images.
        pretrained: see :func:`build_backbone`.
        resize: side in pixels that images are resized to first; None leaves their size.
        build: function that builds the backbone from its name, the number of channels and ``pretrained``.

    Raises:
        LongtailError: there is no such network, or its weights cannot be loaded.
    """

    def __init__(
        self,
        name: str,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        pretrained: str = "none",
        resize: int | None = None,
        build: BackboneBuilder = build_backbone,
    ) -> None:
        super().__init__()
        self.name, self.resize = name, resize
        self.mean, self.std = tuple(mean), tuple(std)
        self.normalize = Normalize(mean, std)
        self.backbone = build(name, len(mean), pretrained)
        self.rebuild = functools.partial(build, name, len(mean), "none")
        """Returns another backbone of the same kind, with random weights."""
        width = self.backbone.num_features
        assert isinstance(width, int)
        self.num_features: int = width

    @property
    def architecture(self) -> str:
        """The name, the same however the model is found and its arguments are written.

        It is part of what features depend on: networks whose weights have the same names and shapes may compute
        something else with them.
        """
        return format_network(*parse_network(resolve_network(self.name)))

    def forward(self, images: Tensor) -> Tensor:
        """Return features of (B, channels, H, W) images in [0, 1]; (B, num_features) features are returned unchanged.

        Returns:
            (B, num_features); (B, num_features, H', W') from a backbone with features of pixels.
        """
        if images.ndim == 2:  # of a frozen encoder, computed before
            return images
        features: Tensor = self.backbone(self.normalize(_resize(images, self.resize)))
        return features


def pretrained_encoder(name: str, channels: int) -> Encoder:
    """Return a timm model with the weights, the normalisation and the input size that timm has for it.

    Args:
        name: the timm model.
        channels: channels of the images.

    Raises:
        LongtailError: timm has no such model, or its weights cannot be loaded.
    """
    if not is_timm_network(name):
        raise LongtailError(f"timm has no model '{name}'{did_you_mean(name, known_networks())}")
    settings = timm_settings(name)
    if settings is None or not settings.has_weights:
        raise LongtailError(f"timm has no pretrained weights for '{name}'")
    return Encoder(name, *normalization(name, channels), pretrained="timm", resize=settings.input_size[-1])


class FrozenEncoder(nn.Module):
    """An encoder for inference only: no gradients, and BatchNorm folded into the convolutions before it.

    Folding changes the last digits and saves a fifth of the time. A network that torch.fx cannot trace is used as it
    is.

    Args:
        encoder: a trained encoder; its weights are not changed.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.normalize, self.resize, self.num_features = encoder.normalize, encoder.resize, encoder.num_features
        self.backbone = _fold_batch_norm(encoder.backbone.eval())
        self.eval().requires_grad_(False)

    def train(self, _mode: bool = True) -> FrozenEncoder:
        """Stay in eval mode."""
        super().train(False)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, num_features) features of (B, channels, H, W) images in [0, 1]; features stay as they are."""
        if images.ndim == 2:
            return images
        if images.device.type == "cpu" and len(images) > _CPU_CHUNK:
            return torch.cat([self._encode(chunk) for chunk in images.split(_CPU_CHUNK)])
        return self._encode(images)

    def _encode(self, images: Tensor) -> Tensor:
        features: Tensor = self.backbone(self.normalize(_resize(images, self.resize)))
        return features


class EncoderEnsemble(nn.Module):
    """Several encoders of the same images; their features one after the other.

    Args:
        members: the encoders, frozen or not.
    """

    def __init__(self, members: Sequence[Encoder | FrozenEncoder]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.widths = tuple(member.num_features for member in members)
        self.num_features = sum(self.widths)

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, ΣF) features of (B, channels, H, W) images in [0, 1], or (B, ΣF, H', W').

        (B, F) features that replace the images are those of every member.
        """
        return torch.cat([member(images) for member in self.members], dim=1)


TeacherEncoder = Encoder | EncoderEnsemble
"""What a teacher's features come from."""


def freeze(encoder: TeacherEncoder) -> FrozenEncoder | EncoderEnsemble:
    """Return an encoder, or each of several, for inference only; see :class:`FrozenEncoder`."""
    if isinstance(encoder, Encoder):
        return FrozenEncoder(encoder)
    members = [member for member in encoder.members if isinstance(member, Encoder)]
    return EncoderEnsemble([FrozenEncoder(member) for member in members])


@contextlib.contextmanager
def not_compiled(module: nn.Module) -> Iterator[None]:
    """Call the modules inside a module as they are, not what ``torch.compile`` made of them.

    Other batch sizes, the eval mode and calls without gradients would each be compiled anew, until torch gives up after
    a few: then training steps are not compiled either.
    """
    compiled = {part: part._compiled_call_impl for part in module.modules() if part._compiled_call_impl is not None}
    try:
        for part in compiled:
            part._compiled_call_impl = None
        yield
    finally:
        for part, call in compiled.items():
            part._compiled_call_impl = call


def channels_last(images: Tensor) -> Tensor:
    """Return (B, channels, H, W) images with their channels last in memory; (B, F) features as they are."""
    return images if images.ndim == 2 else images.contiguous(memory_format=torch.channels_last)


def _resize(images: Tensor, size: int | None) -> Tensor:
    if size is None or images.shape[-2:] == (size, size):
        return images
    shrinks = max(images.shape[-2:]) > size
    return F.interpolate(images, size=size, mode="bicubic", antialias=shrinks).clamp(0, 1)


def _fold_batch_norm(backbone: nn.Module) -> nn.Module:
    from torch.fx import GraphModule, Tracer
    from torch.fx.experimental.optimization import fuse

    thread = threading.get_ident()

    class ThreadTracer(Tracer):
        """Leaves the modules of other threads alone: while torch.fx traces, it replaces the call of all modules."""

        def call_module(
            self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> Any:
            if threading.get_ident() != thread:
                return forward(*args, **kwargs)
            return super().call_module(m, forward, args, kwargs)

        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, BatchNorm) or super().is_leaf_module(m, module_qualified_name)

    if not any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules()):
        return backbone
    try:
        with _TRACING:
            tracer = ThreadTracer()
            graph = tracer.trace(backbone)
        traced = GraphModule(tracer.root, graph)
        for name, module in list(traced.named_modules()):
            if isinstance(module, BatchNorm):  # torch folds layers of its own class alone
                traced.set_submodule(name, _plain_batch_norm(module))
        folded: nn.Module = fuse(traced, no_trace=True)
    except Exception:  # tracing runs the network's own code, which may raise anything
        return backbone
    return folded


def _plain_batch_norm(norm: BatchNorm) -> nn.BatchNorm2d:
    """Return torch's own layer with the same tensors, which computes the same in eval mode."""
    plain = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum, device="meta")
    plain.load_state_dict(norm.state_dict(), assign=True)
    return plain.eval()

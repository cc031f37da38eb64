"""Experts: several last stages of a network on one stem, as one network whose features are theirs side by side.

Legend: B images, E experts, F feature width of one of them.

The copies of a stage work on parts of one batch of E · B samples, expert after expert, so the code of the network that
calls its stages stays as it is. Source: Wang et al., *Long-tailed Recognition by Routing Diverse Distribution-Aware
Experts* (RIDE), ICLR 2021, arXiv 2010.01809.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from longtail.errors import LongtailError
from longtail.nn.backbones import build_backbone, input_size
from longtail.nn.encoder import Encoder
from longtail.nn.tuning import layer_depths

_SIDE = 32  # in pixels, of images that the operations of a network for any size are counted on
_NESTED = 3  # dots in the name of a parameter of a block: stage, block, layer, parameter


class _Fork(nn.Module):
    """The first stages of the experts: (B, …) to (E · B, …), expert after expert."""

    def __init__(self, experts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        return torch.cat([expert(x, *args, **options) for expert in self.experts])


class _Parallel(nn.Module):
    """Later layers of the experts: (E · B, …) to (E · B, …), each on its own part."""

    def __init__(self, experts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        parts = x.unflatten(0, (len(self.experts), -1))
        return torch.cat([expert(parts[index], *args, **options) for index, expert in enumerate(self.experts)])


class ExpertBackbone(nn.Module):
    """A network with E experts: their features side by side.

    Args:
        backbone: images to (E · B, F) features, expert after expert.
        num_experts: E.
        num_stages: how many of its stages each expert has for itself.
        width: F.
    """

    def __init__(self, backbone: nn.Module, num_experts: int, num_stages: int, width: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_experts, self.num_stages, self.num_features = num_experts, num_stages, num_experts * width
        matcher = getattr(backbone, "group_matcher", None)
        self.group_matcher = None if matcher is None else functools.partial(self._group_matcher, matcher)
        """As timm's networks have it: which layer a parameter belongs to, those of all experts to the same."""

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, E · F) features."""
        features: Tensor = self.backbone(images)
        side_by_side: Tensor = features.unflatten(0, (self.num_experts, -1)).transpose(0, 1).flatten(1)
        return side_by_side

    def _group_matcher(self, matcher: Callable[..., Any], coarse: bool = False) -> Callable[[str], int]:
        from timm.models import group_parameters

        depths = group_parameters(self.backbone, matcher(coarse=coarse), reverse=True)
        deepest = max(depths.values())
        return lambda name: depths.get(name.removeprefix("backbone."), deepest)


def split_experts(encoder: Encoder, num_experts: int, num_stages: int, *, independent: bool = False) -> None:
    """Give an encoder E experts: the last stages, and what follows them, once for each.

    Args:
        encoder: is changed, and not usable after an error; its features become E · F wide.
        num_experts: E.
        num_stages: how many of the last stages each expert has for itself. 0: all stages are shared, and each expert
            has a projection of the features, Linear-BN-ReLU, of the same width.
        independent: the experts' weights are random and independent; otherwise they are copies of the encoder's.

    Raises:
        LongtailError: the network has too few stages, or none that can be told apart.
    """
    backbone, width = encoder.backbone, encoder.num_features
    if num_stages == 0:
        projections = [_projection(width) for _ in range(num_experts)]
        backbone = nn.Sequential(backbone, _Fork(projections))
    else:
        names = _own_modules(encoder, num_stages)
        copies = [encoder.rebuild() if independent else copy.deepcopy(backbone) for _ in range(num_experts - 1)]
        for index, path in enumerate(names):
            modules = [_take(network, path) for network in (backbone, *copies)]
            _put(backbone, path, (_Fork if index == 0 else _Parallel)(modules))
        _check_shapes(encoder, num_experts, width)
    encoder.backbone = ExpertBackbone(backbone, num_experts, num_stages, width)
    encoder.num_features = num_experts * width


@functools.lru_cache(maxsize=16)
def relative_operations(network: str, num_experts: int, num_stages: int) -> float:
    """Return the multiplications and additions of a network with experts, divided by those of the network without.

    They are counted for the forward pass over one colour image, of the network's own size, without computing
    anything.

    Args:
        network: see :func:`~longtail.nn.build_backbone`.
        num_experts: E.
        num_stages: see :func:`split_experts`.

    Raises:
        LongtailError: there is no such network, or it cannot be split.
    """
    with torch.random.fork_rng(devices=[]):
        encoder = Encoder(network, [0.5] * 3, [0.5] * 3, build=build_backbone)
        alone = _operations(encoder)
        split_experts(encoder, num_experts, num_stages)
    return _operations(encoder) / alone


def _operations(encoder: Encoder) -> int:
    backbone = copy.deepcopy(encoder.backbone).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone(_image(encoder))
    return int(counter.get_total_flops())


def _image(encoder: Encoder, count: int = 1) -> Tensor:
    side = input_size(encoder.name) or encoder.resize or _SIDE
    return torch.empty(count, len(encoder.mean), side, side, device="meta")


def _projection(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True))


def _own_modules(encoder: Encoder, num_stages: int) -> list[tuple[str, int | None]]:
    """Return where the layers of the last stages are, in order: modules, or a sequence's modules from an index on."""
    backbone, name = encoder.backbone, encoder.name
    depths: dict[str, int] = getattr(backbone, "stage_depths", dict)()
    stages = sorted(set(depths.values()) - {0})
    if not stages:
        # what timm groups; a stage consists of blocks, single layers behind the last one are none
        depths = layer_depths(backbone, coarse=True)
        stages = sorted({depth for name, depth in depths.items() if depth > 0 and name.count(".") >= _NESTED})
    if not stages:
        raise LongtailError(
            f"experts.stages {num_stages}: the stages of network '{name}' are not known; use experts.stages 0, "
            "or a network of timm with stages or blocks"
        )
    if num_stages > len(stages) - 1:
        raise LongtailError(
            f"experts.stages {num_stages}: network '{name}' has {len(stages)} stages, and at least one is shared; "
            f"expected at most {len(stages) - 1}"
        )
    own = {parameter for parameter, depth in depths.items() if depth >= stages[-num_stages]}
    return list(_covering(backbone, own, ""))


def _covering(module: nn.Module, own: set[str], prefix: str) -> list[tuple[str, int | None]]:
    places: list[tuple[str, int | None]] = []
    children = list(module.named_children())
    inside = [{f"{prefix}{name}.{parameter}" for parameter, _ in child.named_parameters()} for name, child in children]
    whole = [bool(names) and names <= own for names in inside]
    if isinstance(module, nn.Sequential) and True in whole:
        first = whole.index(True)
        if not any(names - own for names in inside[first:]):
            return [(prefix.removesuffix("."), first)]
    for (name, child), names, all_own in zip(children, inside, whole, strict=True):
        if all_own:
            places.append((f"{prefix}{name}", None))
        elif names & own:
            places += _covering(child, own, f"{prefix}{name}.")
    return places


def _take(network: nn.Module, place: tuple[str, int | None]) -> nn.Module:
    module, first = network.get_submodule(place[0]), place[1]
    return module if first is None else nn.Sequential(*list(module.children())[first:])


def _put(network: nn.Module, place: tuple[str, int | None], new: nn.Module) -> None:
    path, first = place
    if first is None:
        parent, _, child = path.rpartition(".")
        setattr(network.get_submodule(parent), child, new)
        return
    sequence = network.get_submodule(path)
    names = [name for name, _ in sequence.named_children()]
    for name in names[first + 1 :]:
        delattr(sequence, name)
    setattr(sequence, names[first], new)


def _check_shapes(encoder: Encoder, num_experts: int, width: int) -> None:
    """Raise LongtailError where the layers of the experts are not called one after the other."""
    try:
        network = copy.deepcopy(encoder.backbone).to("meta").eval()
        with torch.no_grad():
            shape = tuple(network(_image(encoder, 2)).shape)
        reason = f"features of shape {shape}"
    except Exception as error:  # of the network's own code, which may raise anything
        shape, reason = (), (str(error).splitlines() or [type(error).__name__])[0][:160]
    if shape != (2 * num_experts, width):
        raise LongtailError(
            f"network '{encoder.name}': cannot be split into experts at its stages ({reason}); use experts.stages 0"
        )

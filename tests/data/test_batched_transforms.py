"""The batched operations against torchvision's and plain ones, image by image, for the same parameters."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, InterpolationMode
from torchvision.transforms.v2 import functional as V

from longtail.data.transforms import BatchTransform, PerImageTransform, build_transform
from longtail.data.transforms.autoaugment import CifarAutoAugment, apply_operation
from longtail.data.transforms.batched import center, crop_and_flip, cutout, to_float
from longtail.errors import LongtailError
from longtail.registry import TRANSFORMS


def batched(name: str, size: int) -> BatchTransform:
    transform = build_transform(name, size)
    assert not isinstance(transform, PerImageTransform)
    return transform


def images(count: int = 6, size: int = 32, channels: int = 3, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 5, 5, generator=g)
    smooth = F.interpolate(coarse, size=size, mode="bicubic").clamp(0, 1)
    return (smooth * 200 + 20 * torch.rand(count, channels, size, size, generator=g)).to(torch.uint8)


def test_crop_and_flip() -> None:
    batch = images()
    draws = torch.tensor(
        [[0.0, 0.0, 0.9], [0.5, 0.5, 0.9], [0.99, 0.99, 0.9], [0.5, 0.5, 0.1], [0.99, 0.0, 0.1], [0.3, 0.7, 0.2]]
    )
    out = crop_and_flip(batch, draws)
    padded = F.pad(batch, (4, 4, 4, 4))
    for index, (down, right, mirror) in enumerate(draws.tolist()):
        top, left = int(down * 9), int(right * 9)
        expected = padded[index, :, top : top + 32, left : left + 32]
        assert torch.equal(out[index], expected.flip(-1) if mirror < 0.5 else expected)
    assert torch.equal(out[1], batch[1])


def test_cutout_is_clipped_at_the_borders() -> None:
    white = torch.full((3, 3, 32, 32), 255, dtype=torch.uint8)
    out = cutout(white, torch.tensor([[0.5, 0.5], [0.0, 0.0], [0.999, 0.5]]))
    black = (out == 0).all(dim=1)
    assert black.sum((1, 2)).tolist() == [256, 64, 9 * 16]
    assert black[0, 8:24, 8:24].all()
    assert black[1, :8, :8].all()


def reference(name: str, image: torch.Tensor, level: float) -> torch.Tensor:
    """torchvision's operation at a share of its range."""
    size = image.shape[-1]
    nearest = {"interpolation": InterpolationMode.NEAREST}
    geometry = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0], **nearest}
    operations = {
        "ShearX": lambda: V.affine(
            image, **{**geometry, "shear": [math.degrees(math.atan(0.3 * level)), 0.0], "center": [0, 0]}
        ),
        "ShearY": lambda: V.affine(
            image, **{**geometry, "shear": [0.0, math.degrees(math.atan(0.3 * level))], "center": [0, 0]}
        ),
        "TranslateX": lambda: V.affine(image, **{**geometry, "translate": [int(150 / 331 * size * level), 0]}),
        "TranslateY": lambda: V.affine(image, **{**geometry, "translate": [0, int(150 / 331 * size * level)]}),
        "Rotate": lambda: V.rotate(image, 30 * level, **nearest),
        "Brightness": lambda: V.adjust_brightness(image, 1 + 0.9 * level),
        "Color": lambda: V.adjust_saturation(image, 1 + 0.9 * level),
        "Contrast": lambda: V.adjust_contrast(image, 1 + 0.9 * level),
        "Sharpness": lambda: V.adjust_sharpness(image, 1 + 0.9 * level),
        "Posterize": lambda: V.posterize(image, int(8 - round(4 * level))),
        "Solarize": lambda: V.solarize(image, 255 * (1 - level)),
        "AutoContrast": lambda: V.autocontrast(image),
        "Equalize": lambda: V.equalize(image),
        "Invert": lambda: V.invert(image),
    }
    result: torch.Tensor = operations[name]()
    return result


@pytest.mark.parametrize("name", CifarAutoAugment().names)
def test_every_operation_equals_torchvisions(name: str) -> None:
    signed = name in {
        "ShearX",
        "ShearY",
        "TranslateX",
        "TranslateY",
        "Rotate",
        "Brightness",
        "Color",
        "Contrast",
        "Sharpness",
    }
    levels = [0, 2 / 9, 5 / 9, 8 / 9, 1.0] + ([-2 / 9, -5 / 9, -1.0] if signed else [])
    batch = images(len(levels))
    out = apply_operation(name, batch, torch.tensor(levels))
    for image, level, got in zip(batch, levels, out, strict=True):
        # a direction is drawn with even odds, so which of the two is called positive does not matter
        either = [reference(name, image, level)] + (
            [reference(name, image, -level)]
            if name in {"ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"}
            else []
        )
        # a pixel whose source falls on a border between two may round the other way
        wrong = min(((got.int() - want.int()).abs() > 1).any(0).float().mean().item() for want in either)
        # (on a whole row or column at once, where it does)
        assert wrong <= 1 / 32, f"{level}: {wrong:.3f} of the pixels differ"


def test_the_policy_is_torchvisions() -> None:
    policy = CifarAutoAugment()
    table = AutoAugment(AutoAugmentPolicy.CIFAR10).policies
    assert len(policy.operations) == len(table) == 25
    for row, steps in enumerate(table):
        for column, (name, probability, level) in enumerate(steps):
            assert policy.names[int(policy.operations[row, column])] == name
            assert policy.probabilities[row, column].item() == pytest.approx(probability)
            assert policy.levels[row, column].item() == pytest.approx((level or 0) / 9)


def test_sub_policies_happen_as_often_as_they_should() -> None:
    policy, batch = CifarAutoAugment(), images(1).expand(4000, -1, -1, -1)
    draws = torch.rand(4000, policy.draws, generator=torch.Generator().manual_seed(0))
    changed = (policy(batch, draws) != batch).flatten(1).any(1).float().mean().item()
    # the chance that neither step happens, from the table
    untouched = (1 - policy.probabilities).prod(1).mean().item()
    assert changed == pytest.approx(1 - untouched, abs=0.06)


@pytest.mark.parametrize(
    ("name", "size", "stored", "channels"),
    [("none", 32, 32, 3), ("digits", 8, 8, 1), ("cifar", 32, 32, 3), ("photo", 56, 64, 3)],
)
def test_a_view_is_a_function_of_seed_and_image(name: str, size: int, stored: int, channels: int) -> None:
    view, batch, ids = batched(name, size), images(6, stored, channels), torch.arange(6)
    once, again = view(batch, ids, (0, 1, 2)), view(batch, ids, (0, 1, 2))
    assert once.shape == (6, channels, size, size)
    assert once.dtype == torch.float32
    assert once.min() >= 0
    assert once.max() <= 1
    assert torch.equal(once, again)
    order = torch.tensor([3, 1, 5])
    assert torch.allclose(view(batch[order], ids[order], (0, 1, 2)), once[order], atol=1e-6)
    if name != "none":
        other = view(batch, ids, (0, 1, 3))
        assert all(not torch.equal(a, b) for a, b in zip(once, other, strict=True))
        same = view(batch[:1].expand(6, -1, -1, -1), ids, (0, 1, 2))
        assert len({tuple(image.flatten().tolist()) for image in same}) == 6


def test_an_unknown_augmentation_is_an_error() -> None:
    with pytest.raises(LongtailError, match="augmentation 'foto' is not known; perhaps you meant photo"):
        build_transform("foto", 32)


def test_what_is_registered_is_what_it_says() -> None:
    for name in TRANSFORMS:
        transform = TRANSFORMS[name]
        assert isinstance(transform.build(32), PerImageTransform) == transform.per_image
    assert {name for name in TRANSFORMS if TRANSFORMS[name].per_image} == {"imagenet", "imagenet-contrast"}
    assert {name for name in TRANSFORMS if not TRANSFORMS[name].needs_color} == {"none", "digits", "cifar-plain"}
    assert TRANSFORMS["imagenet"].contrast == "imagenet-contrast"


def test_the_centre_is_the_centre() -> None:
    assert torch.equal(center(images(2, 10), 8), images(2, 10)[:, :, 1:9, 1:9])
    assert to_float(torch.full((1, 1, 2, 2), 255, dtype=torch.uint8)).max() == 1

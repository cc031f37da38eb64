"""The recipes an image at a time, and that the batched views agree with them in distribution."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from longtail.data.autoaugment import CifarAutoAugment, RandAugment
from longtail.data.dataset import ImageSet
from longtail.data.images import FileImages
from longtail.data.loaders import TrainLoader
from longtail.data.per_image import RECIPES, PerImageView, undisturbed
from longtail.data.views import build_view, crop_and_flip, cutout
from longtail.errors import LongtailError
from longtail.randomness import uniform
from tests.conftest import save_image
from tests.data.test_views import images

DRAWS = 1500


def picture(size: int = 32) -> Image.Image:
    return Image.fromarray(images(1, size)[0].permute(1, 2, 0).numpy())


def agree(one: Tensor, other: Tensor) -> None:
    """Two samples of images (N, 3, S, S): their means and spreads, pixel by pixel, differ by no more than chance."""
    one, other = one.double(), other.double()
    for a, b in ((one, other), ((one - one.mean(0)) ** 2, (other - other.mean(0)) ** 2)):
        error = ((a.var(0) + b.var(0)) / len(a)).sqrt().clamp(min=1e-9)
        z = (a.mean(0) - b.mean(0)) / error
        assert z.abs().max() < 5.5
        # neighbouring pixels move together, so this is looser than it would be for independent ones
        assert z.pow(2).mean().sqrt() < 1.8


def test_cifars_batched_view_agrees_with_the_recipe() -> None:
    view, image = PerImageView("cifar", 32), picture()
    one = torch.stack([view(image, index, (1, 2)) for index in range(DRAWS)])
    pixels = images(1).expand(DRAWS, -1, -1, -1)
    other = build_view("cifar", 32)(pixels, torch.arange(DRAWS), (3, 4)).mul(255).round()
    agree(one, other)


def test_batched_randaugment_agrees_with_torchvisions() -> None:
    torch.manual_seed(0)
    image, transform = images(1)[0], v2.RandAugment(num_ops=2, magnitude=9)
    one = torch.stack([transform(image) for _ in range(DRAWS)])
    draws = torch.rand(DRAWS, RandAugment.draws)
    other = RandAugment(magnitude=9)(image.expand(DRAWS, -1, -1, -1).clone(), draws)
    agree(one, other)


def uniformly(values: Tensor, outcomes: int) -> None:
    """Every outcome as often as the others: chi-square below its mean and five deviations."""
    counts = torch.bincount(values, minlength=outcomes).double()
    assert len(counts) == outcomes
    expected = len(values) / outcomes
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    assert statistic < outcomes - 1 + 5 * (2 * (outcomes - 1)) ** 0.5


def test_parameters_of_the_batched_views_are_distributed_as_the_recipes_say() -> None:
    count = 20_000
    u = uniform(torch.arange(count), 10, 7)
    # crop and mirror: told from an image whose pixels are their own coordinates
    row = torch.arange(1, 33, dtype=torch.uint8)
    coordinates = torch.stack([row[:, None].expand(32, 32), row[None].expand(32, 32), row[:, None].expand(32, 32)])
    out = crop_and_flip(coordinates.expand(count, -1, -1, -1), u[:, :3])
    down = out[:, 0, 16, 16].long() - 17
    mirrored = out[:, 1, 16, 17].long() < out[:, 1, 16, 16].long()
    right = torch.where(mirrored, out[:, 1, 16, 15].long() - 17, out[:, 1, 16, 16].long() - 17)
    uniformly(down + 4, 9)
    uniformly(right + 4, 9)
    uniformly(mirrored.long(), 2)
    # the centre of the cutout: any pixel
    holes = cutout(torch.ones(count, 1, 32, 32, dtype=torch.uint8), u[:, 3:5])[:, 0] == 0
    for axis in (1, 2):
        lines = holes.any(dim=3 - axis)
        first, last = lines.float().argmax(1), 31 - lines.flip(1).float().argmax(1)
        centre = torch.where(first > 0, first + 8, last - 7)
        uniformly(centre, 32)
    # which sub-policy, and which operations of RandAugment
    policy = CifarAutoAugment()
    uniformly((u[:, 5] * len(policy.operations)).long(), 25)
    uniformly((u[:, 6] * len(RandAugment.names)).long(), 14)


@pytest.mark.parametrize("name", RECIPES)
def test_a_view_is_a_function_of_keys_and_image_and_moves_nobodys_numbers(name: str) -> None:
    view, image, size = PerImageView(name, 32 if name == "cifar" else 48), picture(32 if name == "cifar" else 80), 48
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    with undisturbed():
        once = view(image, 3, (0, 1))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert states[2] == np.random.get_state()[1].tolist()  # type: ignore[index]
    assert once.dtype == torch.uint8
    assert once.shape == (3, 32, 32) if name == "cifar" else (3, size, size)
    torch.manual_seed(6)
    random.seed(6)
    assert torch.equal(once, view(image, 3, (0, 1)))
    others = [view(image, 4, (0, 1)), view(image, 3, (0, 2))]
    assert all(not torch.equal(once, other) for other in others)


def test_training_sees_what_evaluation_sees(tmp_path: Path) -> None:
    """An image on its side and one of 16 bits: turned and scaled alike in both."""
    from longtail.data.images import to_square
    from longtail.data.pictures import open_image, upright

    deep = tmp_path / "deep.png"
    Image.fromarray(np.full((40, 40), 128 * 257, dtype=np.uint16)).save(deep)
    view = PerImageView("imagenet", 32)
    assert 60 < view(open_image(deep), 0, (0,)).float().mean() < 200
    turned = Image.new("RGB", (40, 20), "red")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert upright(open_image(tmp_path / "turned.jpg")).size == (20, 40)
    assert to_square(open_image(deep), 40).unique().tolist() == [128]


def test_contrast_views_are_grey_one_in_five() -> None:
    view, image = PerImageView("imagenet-contrast", 32), picture(64)
    grey = [bool((view(image, index, (0,)).amax(0) == view(image, index, (0,)).amin(0)).all()) for index in range(300)]
    plain = PerImageView("imagenet", 32)
    without = [bool((plain(image, i, (0,)).amax(0) == plain(image, i, (0,)).amin(0)).all()) for i in range(300)]
    assert 0.12 < sum(grey) / 300 - sum(without) / 300 < 0.28


@pytest.fixture
def files(tmp_path: Path) -> ImageSet:
    names = [save_image(tmp_path / f"{i}.png", (40, 30), seed=i).name for i in range(12)]
    labels = torch.arange(12) % 3
    return ImageSet(FileImages(tmp_path, names, 36, labels=labels, broken_share=0.1), labels, torch.arange(12) * 5)


def loader(files: ImageSet, workers: int) -> TrainLoader:
    views = [PerImageView("imagenet", 32), PerImageView("imagenet-contrast", 32)]
    return TrainLoader(files, 5, views, seed=1, workers=workers)


def test_processes_make_the_batches_of_one(files: ImageSet) -> None:
    here, elsewhere = list(loader(files, 0).epoch(3)), list(loader(files, 2).epoch(3, start=1))
    assert [len(batch.labels) for batch in here] == [4, 4, 4]
    assert len(elsewhere) == 2
    for a, b in zip(here[1:], elsewhere, strict=True):
        assert torch.equal(a.ids, b.ids)
        assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))
    only = next(loader(files, 0).batches([torch.arange(12)], 3, only=[1]))
    place = here[0].ids[0] // 5
    assert torch.equal(only.views[0][place], here[0].views[1][0])


@pytest.mark.parametrize("workers", [0, 2])
def test_what_breaks_in_the_middle_of_an_epoch_is_noted(files: ImageSet, tmp_path: Path, workers: int) -> None:
    (tmp_path / "7.png").write_bytes(b"gone bad")
    batches = list(loader(files, workers).epoch(0))
    assert sum(len(batch.labels) for batch in batches) == 12
    assert list(files.images.broken) == [7]
    (tmp_path / "3.png").write_bytes(b"gone bad")
    with pytest.raises(LongtailError, match=r"2 of 12 images cannot be read, more than data\.broken_share") as caught:
        list(loader(files, workers).epoch(1))
    assert len(str(caught.value).splitlines()) == 1

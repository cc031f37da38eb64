"""Augmentation one image at a time, and that the batched augmentations agree with such ones in distribution."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from longtail.data.dataset import ImageSet
from longtail.data.image_io import open_image, to_rgb
from longtail.data.images import FileImages, to_square
from longtail.data.loader import TrainLoader
from longtail.data.transforms.autoaugment import CifarAutoAugment, RandAugment
from longtail.data.transforms.batched import crop_and_flip, cutout
from longtail.data.transforms.per_image import ImageNetTransform, preserve_rng_state
from longtail.errors import LongtailError
from longtail.randomness import uniform
from tests.conftest import save_image
from tests.data.oracles import CifarTransform
from tests.data.test_batched_transforms import batched, images

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
    reference, image = CifarTransform(32), picture()
    one = torch.stack([reference(image, seed) for seed in range(DRAWS)])
    pixels = images(1).expand(DRAWS, -1, -1, -1)
    other = batched("cifar", 32)(pixels, torch.arange(DRAWS), (3, 4)).mul(255).round()
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
    # crop and mirror: read from an image whose pixels are their own coordinates
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


@pytest.mark.parametrize("contrast", [False, True])
def test_a_view_is_a_function_of_keys_and_image_and_leaves_global_random_states_alone(contrast: bool) -> None:
    transform, image = ImageNetTransform(48, contrast), picture(80)

    def view(image_id: int, keys: tuple[int, ...]) -> Tensor:
        pixels, labels = transform(image, image_id, keys)
        assert labels is None
        return pixels

    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    with preserve_rng_state():
        once = view(3, (0, 1))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert states[2] == np.random.get_state()[1].tolist()  # type: ignore[index]
    assert once.dtype == torch.uint8
    assert once.shape == (3, 48, 48)
    torch.manual_seed(6)
    random.seed(6)
    assert torch.equal(once, view(3, (0, 1)))
    others = [view(4, (0, 1)), view(3, (0, 2))]
    assert all(not torch.equal(once, other) for other in others)


def test_training_sees_what_evaluation_sees(tmp_path: Path) -> None:
    """An image on its side and one of 16 bits: turned and scaled alike in both."""
    deep = tmp_path / "deep.png"
    Image.fromarray(np.full((40, 40), 128 * 257, dtype=np.uint16)).save(deep)
    pixels, _ = ImageNetTransform(32)(open_image(deep), 0, (0,))
    assert 60 < pixels.float().mean() < 200
    turned = Image.new("RGB", (40, 20), "red")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert to_rgb(open_image(tmp_path / "turned.jpg")).size == (20, 40)
    assert to_square(open_image(deep), 40).unique().tolist() == [128]


def test_contrast_views_are_grey_one_in_five() -> None:
    image = picture(64)

    def grey_fraction(transform: ImageNetTransform) -> float:
        views = [transform(image, image_id, (0,))[0] for image_id in range(300)]
        return sum(bool((view.amax(0) == view.amin(0)).all()) for view in views) / 300

    assert 0.12 < grey_fraction(ImageNetTransform(32, contrast=True)) - grey_fraction(ImageNetTransform(32)) < 0.28


@pytest.fixture
def files(tmp_path: Path) -> ImageSet:
    names = [save_image(tmp_path / f"{i}.png", (40, 30), seed=i).name for i in range(12)]
    labels = torch.arange(12) % 3
    images = FileImages(tmp_path, names, 36, labels=labels, max_unreadable_fraction=0.1)
    return ImageSet(images, labels, torch.arange(12) * 5)


def loader(files: ImageSet, workers: int) -> TrainLoader:
    views = [ImageNetTransform(32), ImageNetTransform(32, contrast=True)]
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
def test_what_breaks_in_the_middle_of_an_epoch_is_recorded(files: ImageSet, tmp_path: Path, workers: int) -> None:
    (tmp_path / "7.png").write_bytes(b"gone bad")
    batches = list(loader(files, workers).epoch(0))
    assert sum(len(batch.labels) for batch in batches) == 12
    assert list(files.images.unreadable) == [7]
    (tmp_path / "3.png").write_bytes(b"gone bad")
    message = r"2 of 12 images cannot be read, more than data\.max_unreadable_fraction"
    with pytest.raises(LongtailError, match=message) as caught:
        list(loader(files, workers).epoch(1))
    assert len(str(caught.value).splitlines()) == 1

"""How many views per second does the data pipeline make, and how long does it take to read a long list?

- 32 × 32, one thread: crop, flip, AutoAugment, Cutout, normalise; one image at a time with torchvision's transforms on
  Pillow images, as in the released code, and batched, with random parameters of each image's own.
- 224 × 224 from JPEG files of 500 × 375, one core: decoding and the recipe of ImageNet-LT, and torchvision's own
  pipeline with the same transforms in the same order.
- Decoding JPEG files to squares of 256 and 64: whole and then reduced, and at the size that is needed; one at a time,
  and by the threads of FileImages.take. The files are tiled from a photograph, so that large ones have detail too.
- Loading a folder of 2,000 JPEG files of 640 × 480: without copies, the first time, and the second time.
- Memory: two of these rows with malloc's own settings and with longtail.allocator.reuse_freed_memory, in new processes.
- Waiting: the fraction of a CIFAR-LT training step (ResNet-32 student, ResNet-56 teacher) spent on making its batch.
- Opening: lists as long as ImageNet-LT's and iNaturalist 2018's, in a process of its own.

Command: python benchmarks/data.py [--rounds 5] [--only allocator]
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from step import Step, both_allocators
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor
from torchvision import transforms

from longtail.config import Data
from longtail.data.dataset import CIFAR_MEAN, CIFAR_STD, ImageSet
from longtail.data.image_io import open_image, open_square, resize_center_crop
from longtail.data.images import FileImages
from longtail.data.loader import TrainLoader
from longtail.data.sources import load_data
from longtail.data.transforms import PerImageTransform, build_transform
from longtail.nn.encoder import Normalize

LISTS = {
    "ImageNet-LT": (115_846, 1000, "train/n{0:08}/n{0:08}_{1}.JPEG"),
    "iNat 2018": (437_513, 8142, "train_val2018/Aves/{0}/{1:032x}.jpg"),
}
OPEN = r"""
import re, sys, time
from pathlib import Path
import torch
from longtail.data.listing import read_splits

def resident(field):
    return int(re.search(field + r":\s+(\d+)", Path("/proc/self/status").read_text()).group(1))

before, started = resident("VmRSS"), time.perf_counter()
listing = read_splits({"train": Path(sys.argv[1])}, Path("."))
print(time.perf_counter() - started, (resident("VmHWM") - before) / 1024, len(listing.splits["all"]))
"""


class Cutout:
    """The Cutout of the released code: a mask in NumPy."""

    def __call__(self, image: Tensor) -> Tensor:
        height, width = image.shape[1:]
        mask = np.ones((height, width), np.float32)
        y, x = np.random.randint(height), np.random.randint(width)
        mask[max(0, y - 8) : y + 8, max(0, x - 8) : x + 8] = 0.0
        return image * torch.from_numpy(mask)


def per_second(function: Callable[[], int], seconds: float = 1.0) -> float:
    """Return how many images or views a function that returns their number makes per second."""
    function()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        count += function()
    return count / (time.perf_counter() - started)


def small(rounds: int) -> None:
    pixels = torch.randint(0, 256, (256, 3, 32, 32), dtype=torch.uint8)
    pillow = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    released = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10),
            transforms.ToTensor(),
            transforms.Normalize(CIFAR_MEAN, CIFAR_STD),
            Cutout(),
        ]
    )

    def one_by_one() -> int:
        torch.stack([released(image) for image in pillow])
        return 256

    rows: dict[str, Callable[[], int]] = {"32², an image at a time, Pillow": one_by_one}
    rows |= {f"32², batched, {size} images": small_views(size) for size in (128, 512, 2048)}
    show(rows, rounds, "views/s")


def small_views(size: int) -> Callable[[], int]:
    """Return what makes views of 32 × 32 of ``size`` images."""
    pixels = torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8)
    view, normalize, ids = build_transform("cifar", 32), Normalize(CIFAR_MEAN, CIFAR_STD), torch.arange(size)
    assert not isinstance(view, PerImageTransform)

    def run() -> int:
        normalize(view(pixels, ids, (0, int(time.perf_counter() * 1e6))))
        return size

    return run


def photo_views(folder: Path) -> Callable[[], int]:
    """Return what makes views of 224 × 224 of the 64 files that :func:`save_photographs` wrote."""
    labels = torch.zeros(64, dtype=torch.int64)
    names = [f"{index}.jpg" for index in range(64)]
    images = ImageSet(FileImages(folder, names, 256, labels=labels), labels, torch.arange(64))
    loader = TrainLoader(images, 64, [build_transform("imagenet", 224)], seed=0, workers=0)
    epoch = iter(range(10**9))
    return lambda: sum(len(batch.labels) for batch in loader.epoch(next(epoch)))


def save_photographs(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for index in range(64):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((500, 375), 3)
        coarse.save(folder / f"{index}.jpg", quality=90)


def rate_alone(run: Callable[[], int]) -> None:
    """Print how many views a function makes per second on one thread."""
    torch.set_num_threads(1)
    print(per_second(run, 2.0))


def allocators(folder: Path) -> None:
    save_photographs(folder)
    print(f"{'views/s':44}{'malloc':>12}{'reused':>12}{'× as fast':>12}")
    for name, code in (
        ("32², batched, 2048 images", "small_views(2048)"),
        ("224² from JPEG, ours", f"photo_views(Path({str(folder)!r}))"),
    ):
        imported = "from data import Path, photo_views, rate_alone, small_views"
        (own,), (reused,) = both_allocators(f"{imported}; rate_alone({code})")
        print(f"{name:44}{own:12,.0f}{reused:12,.0f}{reused / own:12.2f}", flush=True)


def photographs(rounds: int, folder: Path) -> None:
    save_photographs(folder)
    names = [f"{index}.jpg" for index in range(64)]
    torchvisions = transforms.Compose(
        [
            transforms.RandomResizedCrop(224, scale=(0.08, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(0.4, 0.4, 0.4, 0.0),
            rand_augment_transform("rand-n2-m10-mstd0.5", {"translate_const": 100, "img_mean": (124, 116, 104)}),
            transforms.ToTensor(),
        ]
    )

    def reference() -> int:
        order = list(range(64))
        random.shuffle(order)
        torch.stack([torchvisions(Image.open(folder / names[index]).convert("RGB")) for index in order])
        return 64

    rows = {"224² from JPEG, torchvision's pipeline": reference, "224² from JPEG, ours": photo_views(folder)}
    show(rows, rounds, "images/s")


def detailed(size: tuple[int, int], offset: int) -> Image.Image:
    """Return a part of a photograph of 640 × 427 that is tiled."""
    photo = np.roll(load_sample_image("china.jpg"), 37 * offset, axis=(0, 1))
    width, height = size
    return Image.fromarray(np.tile(photo, (-(-height // 427), -(-width // 640), 1))[:height, :width])


def decoding(rounds: int, folder: Path) -> None:
    for size, count in (((4000, 3000), 2), ((1024, 768), 16), ((300, 240), 64)):
        names = [f"{size[0]}-{index}.jpg" for index in range(count)]
        for index, name in enumerate(names):
            detailed(size, index).save(folder / name, quality=90)
        for side in (256, 64):
            images, indices = FileImages(folder, names, side), torch.arange(count)

            def whole(names: list[str] = names, side: int = side) -> int:
                return len([resize_center_crop(open_image(folder / name), side) for name in names])

            def needed(names: list[str] = names, side: int = side) -> int:
                return len([open_square(folder / name, side) for name in names])

            def taken(images: FileImages = images, indices: Tensor = indices) -> int:
                return len(images.take(indices))

            text = f"{size[0]} × {size[1]} to {side}²"
            rows: dict[str, Callable[[], int]] = {f"{text}, whole": whole, f"{text}, as needed": needed}
            rows |= {f"{text}, as needed, threads": taken}
            show(rows, rounds, "images/s")
            full, square = (
                np.stack([np.asarray(image, dtype=np.int16) for image in images])
                for images in (
                    [resize_center_crop(open_image(folder / name), side) for name in names],
                    [open_square(folder / name, side) for name in names],
                )
            )
            steps = np.abs(full - square)
            print(f"{'difference of pixel values':44}{steps.mean():12.2f} mean{steps.max():7d} largest")


def loading(rounds: int, folder: Path) -> None:
    for index in range(2000):
        path = folder / "photos" / f"class {index % 2}" / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        detailed((640, 480), index).save(path, quality=90)
    cache = folder / "cache"
    seconds: dict[str, list[float]] = {}

    def load(name: str, setting: str) -> None:
        started = time.perf_counter()
        data = load_data(Data(source="folder", root=str(folder / "photos"), cache=setting), seed=0)
        seconds.setdefault(name, []).append(time.perf_counter() - started)
        started = time.perf_counter()
        for indices in torch.randperm(len(data.train)).split(64):
            data.train.images.take(indices)
        seconds.setdefault(f"{name}, an epoch's batches", []).append(time.perf_counter() - started)

    for _ in range(rounds):
        shutil.rmtree(cache, ignore_errors=True)
        load("2,000 files, no copies", "none")
        load("2,000 files, first time", str(cache))
        load("2,000 files, second time", str(cache))
    for name, values in seconds.items():
        print(f"{name:44}{statistics.median(values):12.2f} s", flush=True)


def show(rows: dict[str, Callable[[], int]], rounds: int, unit: str) -> None:
    """Measure the rows in turn, so that a slow minute of the machine affects all of them."""
    rates: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(rounds):
        for name, function in rows.items():
            rates[name].append(per_second(function))
    first = statistics.median(next(iter(rates.values())))
    for name, values in rates.items():
        median = statistics.median(values)
        print(f"{name:44}{median:12,.0f} {unit:9}{median / first:8.2f} ×", flush=True)


def waiting(rounds: int) -> None:
    torch.set_num_threads(2)
    training = Step()
    shares = []
    for _ in range(3 * rounds):
        started = time.perf_counter()
        batch = training.draw()
        drawn = time.perf_counter()
        training.step(batch)
        shares.append((drawn - started) / (time.perf_counter() - started))
    print(f"{'waiting for data, share of a CIFAR-LT step':44}{100 * statistics.median(shares):12.1f} %")


def opening(folder: Path) -> None:
    for name, (lines, classes, style) in LISTS.items():
        path = folder / f"{name}.txt"
        path.write_text("".join(f"{style.format(i % classes, i)} {i % classes}\n" for i in range(lines)))
        result = subprocess.run([sys.executable, "-c", OPEN, str(path)], capture_output=True, text=True, check=True)
        seconds, mib, read = re.split(r"\s+", result.stdout.strip())
        assert int(read) == lines
        print(f"{f'opening {name}, {lines:,} lines':44}{float(seconds):12.2f} s{float(mib):10.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=5, help="timings of each row, a second each; the median counts")
    parser.add_argument("--only", choices=["allocator"], help="one part; all if not given")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, median of {args.rounds} rounds")
    with tempfile.TemporaryDirectory() as folder:
        allocators(Path(folder))
        if args.only:
            return
    small(args.rounds)
    with tempfile.TemporaryDirectory() as folder:
        photographs(args.rounds, Path(folder))
        decoding(args.rounds, Path(folder))
        loading(args.rounds, Path(folder))
        opening(Path(folder))
    waiting(args.rounds)


if __name__ == "__main__":
    main()

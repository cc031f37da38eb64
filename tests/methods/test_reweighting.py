"""The class weights of the method cb: of images, of pixels, and where they would be none."""

from __future__ import annotations

import pytest

from longtail.config import Config
from longtail.data.sources import load_data
from longtail.errors import LongtailError
from longtail.losses import effective_number_weights
from longtail.methods.reweighting import ClassBalanced
from longtail.registry import METHODS, TASKS
from longtail.tasks.segmentation.pixels import PixelAdapter
from tests.methods.steps import new_encoder

PIXELS = [8_823_560, 175_768, 93_000]  # of three classes of CamVid


def test_pixels_are_counted_in_images(tiny: Config) -> None:
    config = tiny.replace(method="cb")
    # 400 images, the last two classes in a quarter of them, in thousandths
    adapter = PixelAdapter(64, "pixels", [300_000, 50_000, 50_000])
    method = METHODS["cb"](config, new_encoder(), PIXELS, adapter=adapter)
    assert isinstance(method, ClassBalanced)
    images = [400 * pixels / sum(PIXELS) for pixels in PIXELS]
    expected = effective_number_weights(images)
    assert method.weights.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    # nearly the inverse frequency, after which the scores are free of the prior, as predicts_under says
    products = [pixels * float(weight) for pixels, weight in zip(PIXELS, method.weights, strict=True)]
    assert max(products) < 1.05 * min(products)
    assert method.predicts_under(config) == "uniform"


def test_the_number_of_images_is_that_of_the_set(segmenting: Config) -> None:
    config = segmenting.replace(method="cb")
    data = load_data(config.data, 0)
    adapter = TASKS["segmentation"].sample_adapter(config, data)
    method = METHODS["cb"](config, new_encoder(), data.class_counts, adapter=adapter)
    assert isinstance(method, ClassBalanced)
    images = [12 * pixels / sum(data.class_counts) for pixels in data.class_counts]
    assert method.weights.tolist() == pytest.approx(effective_number_weights(images).tolist(), rel=1e-4)


@pytest.mark.parametrize(("beta", "counts", "advice"), [(0.9999, PIXELS, "0.9999999"), (0.5, [900, 30, 9], "0.999")])
def test_equal_weights_of_unequal_classes_are_refused(
    tiny: Config, beta: float, counts: list[int], advice: str
) -> None:
    config = tiny.replace(method="cb", cb={"beta": beta})
    for use in (
        lambda: METHODS["cb"].check(config, counts),
        lambda: METHODS["cb"](config, new_encoder(), counts),
    ):
        with pytest.raises(LongtailError, match=rf"^cb.beta {beta}: weighs all classes alike, .*; use {advice}, or"):
            use()
    METHODS["cb"].check(config.replace(cb={"beta": float(advice)}), counts)
    METHODS["cb"].check(config, [100_000, 101_000])  # where all are equally frequent, it is right


def test_without_overlap_it_is_cross_entropy(tiny: Config) -> None:
    config = tiny.replace(method="cb", cb={"beta": 0.0})
    METHODS["cb"].check(config, [900, 30, 9])
    assert METHODS["cb"].predicts_under(config) == METHODS["ce"].predicts_under(config) == "train"
    balanced = config.replace(data={"sampler": "class"})
    assert METHODS["cb"].predicts_under(balanced) == "uniform"

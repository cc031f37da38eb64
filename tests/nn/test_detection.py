"""Networks of regions: shapes, labels of regions, ignored regions, anchors, and what stays frozen."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.image_list import ImageList

from longtail.box_labels import BACKGROUND_REGION, IGNORED_REGION, IGNORED_TARGET, PADDING_TARGET
from longtail.errors import LongtailError
from longtail.nn.detection import (
    Anchors,
    DetectionNetwork,
    FasterRCNN,
    build_detection_network,
    is_detection_network,
)
from longtail.nn.detection_sampling import split_targets

ENCODER = "test_efficientnet"
BOXES = ("fasterrcnn", "retinanet")


def build(detector: str, size: int = 64) -> DetectionNetwork:
    torch.manual_seed(0)
    network = build_detection_network(f"{detector}:{ENCODER}:8")
    network.set_image_size(size)
    return network


def targets(rows: list[list[list[float]]]) -> Tensor:
    """Return (B, T, 5) targets, rows without objects filled with padding."""
    most = max(map(len, rows))
    return torch.tensor([[*own, *[[0.0, 0.0, 0.0, 0.0, PADDING_TARGET]] * (most - len(own))] for own in rows])


TWO = targets([[[4, 4, 24, 24, 1], [40, 36, 60, 60, 0]], []])


@pytest.mark.parametrize("detector", BOXES)
def test_shapes(detector: str) -> None:
    network = build(detector).train()
    samples = network.sample(torch.randn(2, 3, 64, 64), TWO, 0.5, 16)
    per_feature = network.regions_per_feature
    assert samples.features.shape == (len(samples.labels) // per_feature, network.num_features)
    assert samples.labels.dtype == torch.int64
    assert samples.image_index.shape == samples.labels.shape
    assert {0, 1, BACKGROUND_REGION} <= set(samples.labels.tolist()) <= {0, 1, BACKGROUND_REGION, IGNORED_REGION}
    assert set(samples.labels[samples.image_index == 1].tolist()) == {BACKGROUND_REGION}
    assert all(term.ndim == 0 and torch.isfinite(term) for term in samples.terms.values())
    sum(samples.terms.values(), samples.features.sum()).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    with torch.no_grad():
        regions = network.eval().propose(torch.randn(3, 3, 64, 64))
    assert regions.boxes.shape == (sum(regions.counts), 4)
    assert len(regions.counts) == 3
    assert regions.features.shape == (len(regions.boxes) // per_feature, network.num_features)
    assert (regions.boxes >= 0).all()
    assert (regions.boxes <= 64).all()


@pytest.mark.parametrize("detector", BOXES)
def test_images_of_any_size(detector: str) -> None:
    network = build(detector).eval()
    with torch.no_grad():
        regions = network.propose(torch.randn(1, 3, 50, 90))
    assert (regions.boxes[:, 0::2] <= 90).all()
    assert (regions.boxes[:, 1::2] <= 50).all()


def test_drawn_regions_have_the_number_and_the_fraction_that_are_asked_for() -> None:
    network = build("fasterrcnn").train()
    for regions, objects in ((16, 0.25), (12, 0.5)):
        samples = network.sample(torch.randn(2, 3, 64, 64), TWO, objects, regions)
        for image in range(2):
            own = samples.labels[samples.image_index == image]
            assert len(own) == regions
            assert (own >= 0).sum() <= objects * regions


@pytest.mark.parametrize("detector", BOXES)
def test_nothing_is_background_in_an_ignored_region(detector: str) -> None:
    network = build(detector).train()
    ignored = targets([[[0, 0, 64, 64, IGNORED_TARGET]]])
    samples = network.sample(torch.randn(1, 3, 64, 64), ignored, 0.5, 16)
    # the anchors at the border lie for the most part outside of the region
    inside = samples.labels == IGNORED_REGION
    assert len(samples.labels) == 0 or inside.float().mean() > 0.5
    plain = network.sample(torch.randn(1, 3, 64, 64), targets([[], [[0, 0, 0, 0, PADDING_TARGET]]])[:1], 0.5, 16)
    assert set(plain.labels.tolist()) == {BACKGROUND_REGION}


@pytest.mark.parametrize("detector", BOXES)
def test_a_box_without_area_is_left_out(detector: str) -> None:
    network = build(detector).train()
    samples = network.sample(torch.randn(1, 3, 64, 64), targets([[[8, 8, 8, 20, 0], [4, 4, 30, 30, 1]]]), 0.5, 16)
    assert 0 not in samples.labels
    assert all(torch.isfinite(term) for term in samples.terms.values())


@pytest.mark.parametrize("detector", BOXES)
def test_a_step_repeats_with_the_seed(detector: str) -> None:
    network, images = build(detector).train(), torch.randn(2, 3, 64, 64)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(network.sample(images, TWO, 0.5, 16))
    assert torch.equal(runs[0].labels, runs[1].labels)
    assert torch.equal(runs[0].features, runs[1].features)


def test_encoder_and_pyramid_are_compiled() -> None:
    network, images = build("fasterrcnn").eval(), torch.randn(2, 3, 64, 64)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    with torch.no_grad():
        expected = network.propose(images)
        network.compile(dynamic=False, backend=backend)
        compiled = network.propose(images)
    assert len(graphs) == 2
    assert torch.allclose(compiled.features, expected.features, atol=1e-5)
    assert compiled.counts == expected.counts


def test_targets_are_split_into_objects_and_ignored_boxes() -> None:
    rows = targets([[[0, 0, 9, 9, 2], [1, 1, 5, 5, IGNORED_TARGET], [3, 3, 3, 8, 0]], [], [[2, 2, 4, 4, 0]]])
    first, empty, last = split_targets(rows, first_class=1)
    assert first["boxes"].tolist() == [[0, 0, 9, 9]], "the box without area is left out"
    assert first["labels"].tolist() == [3]
    assert first["ignored"].tolist() == [[1, 1, 5, 5]]
    assert {name: tuple(part.shape) for name, part in empty.items()} == {
        "boxes": (0, 4),
        "labels": (0,),
        "ignored": (0, 4),
    }
    assert last["labels"].tolist() == [1]


def test_anchors_follow_from_the_size_of_the_images() -> None:
    anchors = Anchors(2)
    anchors.base.fill_(10.0)
    anchors.set_cell_anchors(torch.float32, torch.device("cpu"))
    for level, cells in enumerate(anchors.cell_anchors):
        expected = []
        for ratio, scale in itertools.product((0.5, 1.0, 2.0), (1.0, 1.5)):
            side = 10 * scale * 2**level
            width, height = side / ratio**0.5, side * ratio**0.5
            expected.append([-width / 2, -height / 2, width / 2, height / 2])
        assert torch.allclose(cells, torch.tensor(expected))


def test_anchors_are_in_full_precision_beside_maps_of_half_of_it() -> None:
    anchors, images = Anchors(2), ImageList(torch.zeros(1, 3, 640, 640), [(640, 640)])
    anchors.base.fill_(33.0)
    maps = [torch.zeros(1, 8, side, side) for side in (80, 40)]
    (expected,) = anchors(images, maps)
    (got,) = anchors(images, [level.bfloat16() for level in maps])
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)


@pytest.mark.parametrize("detector", BOXES)
def test_the_state_has_the_anchors_and_no_tensor_twice(detector: str) -> None:
    network, other = build(detector, 640), build(detector, 64)
    assert other.anchors.base.item() == 16
    other.load_state_dict(network.state_dict())
    assert other.anchors.base.item() == 32
    addresses = [tensor.data_ptr() for tensor in network.state_dict().values()]
    assert len(addresses) == len(set(addresses))


def test_what_is_frozen() -> None:
    network = build("fasterrcnn")
    network.freeze(batch_norm=False, early=False)
    assert all(parameter.requires_grad for parameter in network.parameters())
    network.freeze(batch_norm=True, early=True)
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert all(name.startswith("encoder.") for name in frozen)
    assert "encoder.conv_stem.weight" in frozen
    names = [name for name, _ in network.encoder.named_parameters() if "bn" not in name]
    last = max(index for index, name in enumerate(names) if f"encoder.{name}" in frozen)
    assert last < len(names) // 2, "the layers from an eighth of the resolution on are trained"


def test_the_features_of_given_boxes() -> None:
    network = build("fasterrcnn").eval()
    assert isinstance(network, FasterRCNN)
    boxes = [torch.tensor([[4.0, 4.0, 40.0, 40.0]]), torch.tensor([[1.0, 1.0, 9.0, 9.0], [0.0, 0.0, 60.0, 20.0]])]
    with torch.no_grad():
        assert network.pool(torch.randn(2, 3, 64, 64), boxes).shape == (3, network.num_features)


@pytest.mark.parametrize("size", [20, 40, 80, 130])
def test_the_features_of_a_box_do_not_depend_on_the_padding(size: int) -> None:
    images, boxes = torch.randn(1, 3, size, size), [torch.tensor([[2.0, 3.0, 14.0, 17.0], [5.0, 0.0, 20.0, 20.0]])]
    features = []
    for padding in (0, -size % 64):  # maps are those of sides that are multiples of 64 anyway
        network = build("fasterrcnn", size).eval()
        assert isinstance(network, FasterRCNN)
        with torch.no_grad():
            features.append(network.pool(F.pad(images, (0, padding, 0, padding)), boxes))
    assert torch.equal(*features)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("yolo:resnet18", r"network 'yolo:resnet18': expected fasterrcnn:ENCODER or retinanet:ENCODER"),
        ("fasterrcnn", r"network 'fasterrcnn': expected fasterrcnn:ENCODER or fasterrcnn:ENCODER:WIDTH"),
        ("fasterrcnn:resnet18:wide", r"expected fasterrcnn:ENCODER or fasterrcnn:ENCODER:WIDTH"),
        ("retinanet:resnet18:20", r"expected a WIDTH that is a multiple of 8, got 20"),
        ("fasterrcnn:resnet19", r"there is no encoder 'resnet19'"),
        ("fasterrcnn:vit_tiny_patch16_224", r"needs features at 1/8, 1/16 and 1/32"),
    ],
)
def test_names_that_are_wrong(name: str, message: str) -> None:
    with pytest.raises(LongtailError, match=message):
        build_detection_network(name)


def test_names() -> None:
    assert is_detection_network("fasterrcnn:resnet18")
    assert not is_detection_network("resnet18")

"""The model that a method leaves: read again it gives the same scores, and a head that could not be is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longtail.config import Config
from longtail.data.sources import load_data
from longtail.errors import LongtailError
from longtail.methods.base import Head, Method
from longtail.methods.gml import GML
from longtail.nn import CosineClassifier, ExpertClassifier, LinearClassifier
from longtail.registry import METHODS
from longtail.tasks.loading import load_model
from longtail.training.trained_model import build_model, check_head, modules_to_save
from longtail.training.trainer import fit
from tests.methods.steps import build_method, new_encoder


class Sharpened(CosineClassifier):
    """Its file would be read as a cosine classifier's, whose scores are others."""

    def forward(self, features: Tensor) -> Tensor:
        """Return other scores."""
        return 2 * super().forward(features)


class Projected(Method):
    """Predicts with a layer that is not its classifier."""

    def build(self) -> None:
        """Add the layer."""
        self.layer = LinearClassifier(self.encoder.num_features, len(self.class_counts))
        nn.init.normal_(self.layer.weight, std=100)

    def head(self, classifier: object) -> Head:
        """Return the layer."""
        return self.layer


def _with(make: Callable[[int, int], Any]) -> type[Method]:
    def build_classifier(self: Method, num_features: int) -> Any:
        return make(num_features, len(self.class_counts))

    return type("Own", (Method,), {"build_classifier": build_classifier})


def _random_linear(num_features: int, num_classes: int) -> LinearClassifier:
    layer = LinearClassifier(num_features, num_classes)
    nn.init.normal_(layer.weight, std=100)
    return layer


METHOD_CLASSES: dict[str, type[Method]] = {
    "cosine": _with(CosineClassifier),
    "another scale": _with(lambda width, classes: CosineClassifier(width, classes, 3.0)),
    "linear": _with(_random_linear),
    "a head that is not the classifier": Projected,
    "experts": METHODS["experts"],
    "mixture": METHODS["gml"],
}


@pytest.mark.parametrize("name", METHOD_CLASSES)
def test_a_head_gives_the_same_scores_when_it_is_read(tiny: Config, name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = tiny.replace(method=name if name == "experts" else "gml" if name == "mixture" else "la")
    config = config.replace(experts={"stages": 0}, gml={"ensemble_weight": 1.0, "keys": "momentum", "queue_size": 64})
    data, method_class = load_data(config.data, 0), METHOD_CLASSES[name]
    method = method_class(config, new_encoder(), data.class_counts)
    check_head(method, config, data)
    if isinstance(method, GML):
        labels = torch.arange(40) % 10
        method.queues.push(torch.rand(40, method.encoder.num_features), labels, labels)
    model = build_model(modules_to_save(method, None), config, data)
    model.save(tmp_path)
    images = torch.rand(5, 1, 8, 8)
    expected = model.scores(images)
    assert expected.std() > 0.1
    torch.testing.assert_close(load_model(tmp_path).scores(images), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Sharpened, "its classifier or head is a Sharpened, which a saved model cannot have; expected one of Cosine"),
        (nn.Linear, "its classifier or head is a Linear, which"),
        (lambda width, _: CosineClassifier(width, 3), r"'weight' of its head is \(3, 12\), expected \(10, 12\)"),
        (lambda width, classes: ExpertClassifier(width, classes), "'contained_log_prior' of its head"),
    ],
)
def test_another_head_is_refused_before_the_first_step(
    tiny: Config, make: Callable[[int, int], Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(METHODS["ce"], "build_classifier", _with(make).build_classifier)
    with pytest.raises(LongtailError, match=f"method ce: {message}"):
        fit(tiny.replace(method="ce"), tmp_path / "run", quiet=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_the_head_is_looked_at_without_random_numbers(tiny: Config) -> None:
    config = tiny.replace(method="la")
    data = load_data(config.data, 0)
    method = build_method(config, data)
    before = torch.get_rng_state()
    check_head(method, config, data)
    assert torch.equal(torch.get_rng_state(), before)

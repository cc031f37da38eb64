"""GML's callback, run in Lightning's Trainer."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from longtail import ClassPrior, CosineClassifier
from longtail.errors import LongtailError
from longtail.integrations.lightning import GMLCallbackMixin
from longtail.integrations.mixture import WithIds
from longtail.losses import posterior_cross_entropy
from tests.integrations.tail import COUNTS, balanced_accuracy, encoder, long_tailed_digits

pl = pytest.importorskip("pytorch_lightning")
# warnings of Lightning about its own use of torch, and about a loader for a few images
pytestmark = [
    pytest.mark.filterwarnings("ignore:::pytorch_lightning"),
    pytest.mark.filterwarnings("ignore:.*num_workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*number of training batches"),
]
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


class GMLCallback(GMLCallbackMixin, pl.Callback):  # type: ignore[misc, name-defined]
    pass


class Lit(pl.LightningModule):  # type: ignore[misc, name-defined]
    def __init__(self, features: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.classifier, self.prior = encoder(32), CosineClassifier(32, 10), ClassPrior(COUNTS)
        self.returns_features, self.losses = features, list[float]()

    def training_step(self, batch: Any, _index: int) -> Any:
        features = self.encoder(batch[0])
        loss = posterior_cross_entropy(self.classifier(features), batch[1], self.prior.log_prior)
        return {"loss": loss, "features": features} if self.returns_features else loss

    def on_train_batch_end(self, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def loader(images: Tensor, labels: Tensor) -> Any:
    torch.manual_seed(0)
    return DataLoader(WithIds(TensorDataset(images, labels)), batch_size=64, shuffle=True)


def teacher() -> nn.Module:
    torch.manual_seed(1)
    return encoder(48)


def callback(**options: Any) -> Any:
    return GMLCallback(COUNTS, teacher(), feature_dim=32, teacher_dim=48, **options)


def test_it_learns_with_the_terms(tmp_path: Path) -> None:
    images, labels, test_images, test_labels = long_tailed_digits()
    module: Any = Lit()
    gml = callback()
    trainer = pl.Trainer(max_epochs=30, callbacks=[gml], default_root_dir=tmp_path, enable_checkpointing=False, **QUIET)
    before = gml.terms.criterion.temperature.item()
    trainer.fit(module, loader(images, labels))
    with torch.no_grad():
        scores = module.classifier(module.encoder(test_images))
    assert balanced_accuracy(scores, test_labels) > 0.8
    assert len(gml.terms.queues) == sum(COUNTS)
    assert abs(gml.terms.criterion.temperature.item() - before) > 1e-3
    assert module.losses[-1] < 0.6 * module.losses[0]
    assert "gml/mixture" in trainer.callback_metrics
    assert "training_step" not in vars(module)  # the module's own is back
    assert not any(parameter.requires_grad for parameter in gml.teacher.parameters())
    assert not any(name.startswith("teacher") for name in module.state_dict())


def test_with_a_weight_of_zero_the_module_trains_as_before() -> None:
    images, labels, *_ = long_tailed_digits()
    weights = []
    for callbacks in ([], [callback(mixture_weight=0.0)]):
        module: Any = Lit()
        trainer = pl.Trainer(max_epochs=1, callbacks=callbacks, enable_checkpointing=False, **QUIET)
        trainer.fit(module, loader(images, labels))
        weights.append(module.encoder[1].weight.detach())
    assert torch.equal(*weights)


def test_a_checkpoint_has_the_queues(tmp_path: Path) -> None:
    images, labels, *_ = long_tailed_digits()
    first = callback()
    trainer = pl.Trainer(max_epochs=2, callbacks=[first], default_root_dir=tmp_path, **QUIET)
    trainer.fit(Lit(), loader(images, labels))
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    module: Any = Lit()
    second = callback()
    again = pl.Trainer(max_epochs=2, callbacks=[second], default_root_dir=tmp_path, **QUIET)
    again.fit(module, loader(images, labels), ckpt_path=path)  # nothing is left to train
    assert module.losses == []
    for name, tensor in first.terms.queues.state_dict().items():
        assert torch.equal(tensor, second.terms.queues.state_dict()[name]), name
    for (name, tensor), other in zip(first.terms.state_dict().items(), second.terms.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
    loaded: Any = Lit.load_from_checkpoint(path, strict=False)
    assert torch.equal(loaded.encoder[1].weight, module.encoder[1].weight)


def test_manual_optimization_raises() -> None:
    images, labels, *_ = long_tailed_digits()
    module: Any = Lit()
    module.automatic_optimization = False
    trainer = pl.Trainer(max_epochs=1, callbacks=[callback()], enable_checkpointing=False, **QUIET)
    with pytest.raises(LongtailError, match="automatic_optimization: expected True"):
        trainer.fit(module, loader(images, labels))


def test_a_step_without_features_raises() -> None:
    images, labels, *_ = long_tailed_digits()
    trainer = pl.Trainer(max_epochs=1, callbacks=[callback()], enable_checkpointing=False, **QUIET)
    with pytest.raises(ValueError, match=r"training_step: expected a dictionary with loss and features.*got Tensor"):
        trainer.fit(Lit(features=False), loader(images, labels))


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_the_teacher_has_the_precision_of_the_training(precision: str) -> None:
    images, labels, *_ = long_tailed_digits()
    module: Any = Lit()
    trainer = pl.Trainer(max_epochs=1, precision=precision, callbacks=[callback()], enable_checkpointing=False, **QUIET)
    trainer.fit(module, loader(images, labels))
    assert all(math.isfinite(loss) for loss in module.losses)


def test_it_can_be_pickled_as_processes_that_are_spawned_need_it() -> None:
    again = pickle.loads(pickle.dumps(callback()))
    assert again.unpack((1, 2, 3, 4)) == (1, 2, 3)


class OfDictionaries(Lit):
    def training_step(self, batch: Any, index: int) -> Any:
        return super().training_step((batch["pixel_values"], batch["labels"]), index)


def test_batches_that_are_dictionaries(tmp_path: Path) -> None:
    images, labels, *_ = long_tailed_digits()
    rows = WithIds([{"pixel_values": image, "labels": int(label)} for image, label in zip(images, labels, strict=True)])
    batches = DataLoader(rows, batch_size=64)
    options = {"max_steps": 2, "default_root_dir": tmp_path, "enable_checkpointing": False, **QUIET}
    with pytest.raises(LongtailError, match="keys pixel_values, labels, ids; give the callback unpack=lambda batch: "):
        pl.Trainer(callbacks=[callback()], **options).fit(OfDictionaries(), batches)
    gml = callback(unpack=lambda batch: (batch["pixel_values"], batch["labels"], batch["ids"]))
    pl.Trainer(callbacks=[gml], **options).fit(OfDictionaries(), batches)
    assert int((gml.terms.queues.slots().labels >= 0).sum()) > 0

"""The bridges to the Trainer of transformers, run in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from longtail.data.samplers import ClassAwareSampler
from longtail.errors import LongtailError
from longtail.integrations.huggingface import TrainSamplerMixin, compute_loss_func, compute_metrics
from longtail.losses import AsymmetricLoss, LDAMLoss, LogitAdjustedLoss
from tests.integrations.tail import COUNTS, encoder, long_tailed_digits

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.classifier = encoder(32), nn.Linear(32, 10)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.classifier(self.encoder(pixel_values))}


class LongTailTrainer(TrainSamplerMixin, transformers.Trainer):  # type: ignore[misc, name-defined]
    pass


def rows(images: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    return [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, labels, strict=True)]


def arguments(folder: Path, **settings: Any) -> Any:
    quiet = {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no"}
    return transformers.TrainingArguments(output_dir=str(folder), **(quiet | settings))


def test_it_learns_the_tail(tmp_path: Path) -> None:
    images, labels, test_images, test_labels = long_tailed_digits()
    trainer = LongTailTrainer(
        model=Net(),
        args=arguments(tmp_path, num_train_epochs=20, per_device_train_batch_size=64, learning_rate=1e-2),
        train_dataset=rows(images, labels),
        eval_dataset=rows(test_images, test_labels),
        compute_loss_func=compute_loss_func(LogitAdjustedLoss(COUNTS)),
        compute_metrics=compute_metrics(COUNTS),
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_balanced_accuracy"] > 80
    assert metrics["eval_few"] > 50
    assert "eval_many" not in metrics  # no class has more than 100 training images
    assert metrics["eval_medium"] > metrics["eval_few"]
    assert metrics["eval_loss"] < 2


def test_accumulated_gradients_are_those_of_one_batch(tmp_path: Path) -> None:
    images, labels, *_ = long_tailed_digits()
    chosen = torch.linspace(0, len(labels) - 1, 30).long()  # four batches, the last one smaller
    steps = []
    for batch_size, accumulated in ((30, 1), (8, 4)):
        settings = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulated}
        trainer = LongTailTrainer(
            model=Net(),
            args=arguments(tmp_path, num_train_epochs=1, optim="sgd", learning_rate=0.1, max_grad_norm=0.0, **settings),
            train_dataset=rows(images[chosen], labels[chosen]),
            compute_loss_func=compute_loss_func(LogitAdjustedLoss(COUNTS)),
        )
        trainer.train()
        assert trainer.state.global_step == 1
        steps.append(trainer.model.classifier.weight.detach().cpu())
    assert torch.allclose(steps[0], steps[1], atol=1e-6)
    assert not torch.allclose(steps[0], Net().classifier.weight, atol=1e-3)


def test_the_loss_is_the_mean_over_the_items() -> None:
    torch.manual_seed(0)
    loss = LogitAdjustedLoss([5, 3, 2])
    compute = compute_loss_func(loss)
    scores, labels = torch.randn(6, 3), torch.tensor([0, 2, 1, -100, 0, 0])
    expected = loss(scores[labels >= 0], labels[labels >= 0])
    for outputs in ({"logits": scores}, SimpleNamespace(logits=scores), (scores,), scores):
        assert torch.allclose(compute(outputs, labels), expected)
        assert torch.allclose(compute(outputs, labels, num_items_in_batch=torch.tensor(5)), expected)
    assert torch.allclose(compute(scores, labels, num_items_in_batch=10), expected / 2)
    # Trainer counts every entry of soft labels
    soft = torch.softmax(torch.randn(6, 3), dim=1)
    assert torch.allclose(compute(scores, soft, num_items_in_batch=18), loss(scores, soft))
    several = AsymmetricLoss()
    for hot in (soft > 0.4, (soft > 0.4).long(), (soft > 0.4).float()):
        assert torch.allclose(compute_loss_func(several)(scores, hot, num_items_in_batch=18), several(scores, hot))
    assert loss.reduction == "mean"
    with pytest.raises(ValueError, match="loss: expected a module with the attribute reduction"):
        compute_loss_func(nn.Linear(1, 1))


class Recorded(Sampler[int]):
    """The last twenty images, from the end; it records the epochs that it is told."""

    def __init__(self, size: int) -> None:
        self.size, self.epochs = size, list[int]()

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.size - 1, self.size - 21, -1))

    def __len__(self) -> int:
        return 20


def test_the_sampler_is_used_and_told_the_epoch(tmp_path: Path) -> None:
    images, labels, *_ = long_tailed_digits()
    seen: list[Tensor] = []
    loss = LogitAdjustedLoss(COUNTS)

    def record(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        seen.append(labels)
        return compute_loss_func(loss)(outputs, labels, num_items_in_batch)

    sampler = Recorded(len(labels))
    trainer = LongTailTrainer(
        model=Net(),
        args=arguments(tmp_path, num_train_epochs=3, per_device_train_batch_size=10),
        train_dataset=rows(images, labels),
        compute_loss_func=record,
        train_sampler=sampler,
    )
    trainer.train()
    assert torch.equal(torch.cat(seen), labels.flip(0)[:20].repeat(3))
    assert sorted(set(sampler.epochs)) == [0, 1, 2]
    plain = LongTailTrainer(model=Net(), args=arguments(tmp_path), train_dataset=rows(images, labels))
    assert len(list(plain.get_train_dataloader().sampler)) == len(labels)


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_class_aware_sampler(replicas: int, tmp_path: Path) -> None:
    images, labels, *_ = long_tailed_digits()
    trainer = LongTailTrainer(
        model=Net(),
        args=arguments(tmp_path, per_device_train_batch_size=10),
        train_dataset=rows(images, labels),
        train_sampler=ClassAwareSampler(labels, "class", num_replicas=replicas, rank=0),
    )
    if replicas == 2:
        with pytest.raises(
            ValueError, match="train_sampler: expected num_replicas=1 and rank=0, since Trainer distributes"
        ):
            trainer.get_train_dataloader()
        return
    shown = torch.bincount(torch.cat([batch["labels"] for batch in trainer.get_train_dataloader()]))
    assert shown.sum() == len(labels)
    assert shown.min() > len(labels) / 20  # where the smallest class has 4 of 319 images


def test_a_label_that_trainer_counts_and_the_loss_leaves_out_raises() -> None:
    compute = compute_loss_func(LogitAdjustedLoss([3, 2]))
    scores = torch.zeros(3, 2)
    assert compute(scores, torch.tensor([0, 1, -100]), 2).isfinite()
    with pytest.raises(ValueError, match=r"labels: expected -100 for a sample to leave out.*got -1"):
        compute(scores, torch.tensor([0, 1, -1]), 3)


class LossConfig(transformers.PretrainedConfig):  # type: ignore[misc, name-defined]
    model_type = "longtail-test"

    def __init__(self, counts: Any = (90, 9, 1), **options: Any) -> None:
        self.counts = list(counts)
        super().__init__(**options)


class WithLosses(transformers.PreTrainedModel):  # type: ignore[misc, name-defined]
    config_class = LossConfig

    def __init__(self, config: LossConfig) -> None:
        super().__init__(config)
        self.layer = nn.Linear(2, 3)
        self.losses = nn.ModuleList([LogitAdjustedLoss(config.counts), LDAMLoss(config.counts)])
        self.post_init()


def test_losses_in_a_model_are_read_with_it(tmp_path: Path) -> None:
    model = WithLosses(LossConfig())
    model.save_pretrained(tmp_path)
    again = WithLosses.from_pretrained(tmp_path)
    scores, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 2])
    for before, after in zip(model.losses, again.losses, strict=True):
        assert torch.equal(before(scores, labels), after(scores, labels))


@pytest.mark.parametrize("shape", [(6, 7), (6, 2), (6,)])
def test_metrics_of_other_classes_raise(shape: tuple[int, ...]) -> None:
    prediction = SimpleNamespace(predictions=np.zeros(shape), label_ids=np.array([0, 1, 2, 0, 1, 2]))
    with pytest.raises(LongtailError, match=r"predictions: expected scores of shape \(N, 3\)"):
        compute_metrics([5, 50, 500])(prediction)

"""Feature transfer: more keys for small classes, spread out as those of large classes are.

Legend: K slots, C classes, F feature width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from longtail.errors import LongtailError
from longtail.memory import Slots, repeat_filled


class FeatureTransfer(nn.Module):
    """Adds keys to classes in few, moved by the within-class differences of classes in many.

    A class with three images has three keys, and a mixture of three narrow components says little about where a fourth
    image would lie. How the images of a class differ is much the same for many classes (Yin et al., *Feature Transfer
    Learning*, CVPR 2019, arXiv 1803.09014), so each key of a small class is joined by copies of itself, each moved by
    the difference between a random key of a large class and the mean of that class.

    Args:
        copies: additional keys per slot of a class in few.
        groups: (C,) many, medium or few.
        sizes: (C,) slots per class.

    Raises:
        LongtailError: no class is in few, or none in many.
    """

    slot_classes: Tensor
    few: Tensor
    many: Tensor

    def __init__(self, copies: int, groups: Sequence[str], sizes: Tensor) -> None:
        super().__init__()
        self.copies = copies
        classes = torch.repeat_interleave(torch.arange(len(sizes)), sizes.cpu())
        few, many = (torch.tensor([group == name for group in groups])[classes] for name in ("few", "many"))
        for name, slots in (("few", few), ("many", many)):
            if not bool(slots.any()):
                raise LongtailError(
                    f"gml.feature_transfer: no class is in the shot group {name}, expected at least one in few and in "
                    "many; set shots.few_below and shots.many_above, or gml.feature_transfer to 0"
                )
        self.num_classes = len(sizes)
        self.register_buffer("slot_classes", classes, persistent=False)
        self.register_buffer("few", few.nonzero()[:, 0], persistent=False)
        self.register_buffer("many", many.nonzero()[:, 0], persistent=False)

    def forward(self, slots: Slots) -> Slots:
        """Return the slots and, after them, the moved copies, each with the label and id of its origin."""
        features = slots.features
        filled = (slots.labels >= 0).to(features.dtype)
        # a mean over the filled slots: the others hold features of any class
        counts = features.new_zeros(self.num_classes).index_add(0, self.slot_classes, filled).clamp(min=1)
        means = features.new_zeros(self.num_classes, features.shape[1])
        means = means.index_add(0, self.slot_classes, features * filled[:, None]) / counts[:, None]
        target = self.few.repeat(self.copies)
        source = self.many[torch.randint(len(self.many), target.shape, device=target.device)]
        moved = (features[source] - means[self.slot_classes[source]]) * filled[source][:, None]
        return repeat_filled(
            Slots(
                torch.cat([features, features[target] + moved]),
                torch.cat([slots.labels, slots.labels[target]]),
                torch.cat([slots.ids, slots.ids[target]]),
            )
        )

"""Networks: encoders and the heads on them."""

from longtail.nn.backbones import Encoder, FrozenEncoder, build_backbone
from longtail.nn.heads import CosineClassifier, ProjectionMLP

__all__ = ["CosineClassifier", "Encoder", "FrozenEncoder", "ProjectionMLP", "build_backbone"]

"""Networks: encoders and the heads on them."""

from longtail.nn.backbones import Encoder, FrozenEncoder, build_backbone
from longtail.nn.heads import CosineClassifier, LinearClassifier, ProjectionMLP

__all__ = ["CosineClassifier", "Encoder", "FrozenEncoder", "LinearClassifier", "ProjectionMLP", "build_backbone"]

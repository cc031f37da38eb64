"""Networks: encoders and the heads on them."""

from longtail.nn.backbones import Encoder, FrozenEncoder, build_backbone
from longtail.nn.heads import CosineClassifier, JoinedClassifier, LinearClassifier, ProjectionMLP

__all__ = [
    "CosineClassifier",
    "Encoder",
    "FrozenEncoder",
    "JoinedClassifier",
    "LinearClassifier",
    "ProjectionMLP",
    "build_backbone",
]

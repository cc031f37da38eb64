"""Networks: encoders and the heads on top of them."""

from longtail.nn.backbones import build_backbone
from longtail.nn.encoder import Encoder, FrozenEncoder
from longtail.nn.heads import CosineClassifier, ExpertClassifier, LinearClassifier, MixtureEnsembleHead, ProjectionMLP

__all__ = [
    "CosineClassifier",
    "Encoder",
    "ExpertClassifier",
    "FrozenEncoder",
    "LinearClassifier",
    "MixtureEnsembleHead",
    "ProjectionMLP",
    "build_backbone",
]

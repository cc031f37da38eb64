"""Networks: encoders and the heads on top of them."""

from longtail.nn.backbones import build_backbone
from longtail.nn.encoder import Encoder, EncoderEnsemble, FrozenEncoder, TeacherEncoder, freeze
from longtail.nn.heads import (
    ClassifierEnsemble,
    CosineClassifier,
    ExpertClassifier,
    LinearClassifier,
    MixtureEnsembleHead,
    ProjectionMLP,
    RegionClassifier,
)

__all__ = [
    "ClassifierEnsemble",
    "CosineClassifier",
    "Encoder",
    "EncoderEnsemble",
    "ExpertClassifier",
    "FrozenEncoder",
    "LinearClassifier",
    "MixtureEnsembleHead",
    "ProjectionMLP",
    "RegionClassifier",
    "TeacherEncoder",
    "build_backbone",
    "freeze",
]

"""A long-tailed classifier on embeddings, with the interface of scikit-learn."""

from longtail.estimator.classifier import LongTailClassifier

__all__ = ["LongTailClassifier"]

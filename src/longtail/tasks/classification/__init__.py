"""One class per image."""

from longtail.registry import TASKS

TASKS.add("classification", "longtail.tasks.classification.task:CLASSIFICATION")

"""Detection: boxes and classes of objects."""

from longtail.registry import METHODS, SOURCES, TASKS

TASKS.add("detection", "longtail.tasks.detection.task:DETECTION")
METHODS.add("seesaw", "longtail.tasks.detection.seesaw:Seesaw")
SOURCES.add("boxes", "longtail.data.detection.source:BOXES")
SOURCES.add("bccd", "longtail.data.detection.source:BCCD")

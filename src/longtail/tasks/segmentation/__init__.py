"""One class per pixel."""

from longtail.registry import METHODS, SOURCES, TASKS

TASKS.add("segmentation", "longtail.tasks.segmentation.task:SEGMENTATION")
METHODS.add("dice", "longtail.tasks.segmentation.region_losses:Dice")
METHODS.add("lovasz", "longtail.tasks.segmentation.region_losses:Lovasz")
SOURCES.add("camvid", "longtail.data.sources.segmentation:CAMVID")
SOURCES.add("ade20k", "longtail.data.sources.segmentation:ADE20K")
SOURCES.add("masks", "longtail.data.sources.segmentation:MASKS")

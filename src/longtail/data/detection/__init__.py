"""Images with objects: annotations, how they come in, and what a detector finds."""

from longtail.data.detection.annotations import (
    DEFAULT_POST_PROCESSING,
    Annotations,
    Detections,
    Mask,
    PostProcessing,
    concatenate,
)
from longtail.data.detection.assemble import AnnotationProblems
from longtail.data.detection.coco import read_coco, to_coco, write_coco
from longtail.data.detection.data import DetectionData
from longtail.data.detection.images import DetectionImages, DetectionSample
from longtail.data.detection.layouts import read_split
from longtail.data.detection.split import split_images
from longtail.data.detection.transform import DetectionTransform
from longtail.data.detection.voc import read_voc
from longtail.data.detection.yolo import read_yolo
from longtail.data.letterbox import letterbox

__all__ = [
    "DEFAULT_POST_PROCESSING",
    "AnnotationProblems",
    "Annotations",
    "DetectionData",
    "DetectionImages",
    "DetectionSample",
    "DetectionTransform",
    "Detections",
    "Mask",
    "PostProcessing",
    "concatenate",
    "letterbox",
    "read_coco",
    "read_split",
    "read_voc",
    "read_yolo",
    "split_images",
    "to_coco",
    "write_coco",
]

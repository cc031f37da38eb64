"""Detectors that were trained elsewhere, corrected for the long tail of their training set, without training."""

from longtail.detector_calibration.calibrate import (
    calibrate_detector,
    choose_power,
    evaluate_corrections,
    logit_statistics,
)
from longtail.detector_calibration.running import DetectorRunner

__all__ = [
    "DetectorRunner",
    "calibrate_detector",
    "choose_power",
    "evaluate_corrections",
    "logit_statistics",
]

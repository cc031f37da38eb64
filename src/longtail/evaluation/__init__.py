"""Metrics of predictions, calibration, and class frequencies under label shift."""

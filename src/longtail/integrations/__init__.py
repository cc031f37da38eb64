"""Bridges to the training loops of other libraries: one file each, which nothing else in the package imports."""

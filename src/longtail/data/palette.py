"""Colours of classes, the same wherever a class is drawn. Imports no torch."""

from __future__ import annotations

import colorsys


def class_colors(classes: int) -> list[tuple[int, int, int]]:
    """Return an RGB colour per class, hues a golden ratio of the circle apart, so that neighbours differ."""
    colors = []
    for index in range(classes):
        lightness = (0.5, 0.7, 0.35)[index % 3]
        rgb = colorsys.hls_to_rgb(index * 0.618034 % 1, lightness, 0.75)
        colors.append((round(255 * rgb[0]), round(255 * rgb[1]), round(255 * rgb[2])))
    return colors

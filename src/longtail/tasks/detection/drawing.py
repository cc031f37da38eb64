"""Drawings of detections: boxes with class names and scores, and translucent masks. Legend: K detections."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from longtail.data.detection import Detections
from longtail.data.palette import class_colors
from longtail.data.paths import printable
from longtail.evaluation.detection_matches import coco_masks, encode_mask

Color = tuple[int, int, int]
Box = Sequence[float]

MIN_SIDE = 640
"""Longer side in pixels to which smaller images are enlarged, so that there is room for names."""
_MASK_OPACITY = 0.4
_CROWDED = 40  # detections of an image from which on the names are smaller


def draw_detections(
    image: Image.Image, detections: Detections, class_names: Sequence[str], min_side: int = MIN_SIDE
) -> Image.Image:
    """Return a copy of an image with its detections, the highest score on top.

    Args:
        image: in RGB.
        detections: in pixels of the image.
        class_names: C names.
        min_side: longer side in pixels to which a smaller image is enlarged, by a whole factor.
    """
    colors = class_colors(len(class_names))
    labels, scores = detections.labels.tolist(), detections.scores.tolist()
    if detections.masks is not None:
        size = (image.height, image.width)
        image = _with_masks(image, [encode_mask(mask, size) for mask in detections.masks], [colors[i] for i in labels])
    factor = max(1, -(-min_side // max(image.size)))
    drawing = image.resize((factor * image.width, factor * image.height), Image.Resampling.BICUBIC)
    boxes = (detections.boxes * factor).tolist()
    canvas, taken = ImageDraw.Draw(drawing), list[Box]()
    width, height = _line_width(drawing), _text_height(drawing, len(labels))
    order = range(len(labels) - 1, -1, -1)
    for index in order:
        draw_box(canvas, boxes[index], colors[labels[index]], width)
    texts = []
    for index in reversed(order):  # of names in each other's way that of the highest score is placed first
        text = f"{printable(class_names[labels[index]])} {scores[index]:.2f}"
        place = _place(canvas, boxes[index], text, height, drawing.size, taken)
        taken.append(place)
        texts.append((place, text, colors[labels[index]]))
    for place, text, color in reversed(texts):
        _write(canvas, place, text, color, height)
    return drawing


def draw_box(canvas: ImageDraw.ImageDraw, box: Box, color: Color, width: int, dashed: bool = False) -> None:
    """Draw the outline of a box, of which both sides of the line are darker, so that it shows on any ground.

    Args:
        canvas: what to draw on.
        box: x1, y1, x2, y2 in pixels of it.
        color: of the line.
        width: of the line in pixels.
        dashed: in dashes.
    """
    x1, y1, x2, y2 = (round(value) for value in box)
    x2, y2 = max(x2 - 1, x1), max(y2 - 1, y1)  # the right and lower sides are outside of a box
    if not dashed:
        canvas.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=_darker(color), width=width + 2)
        canvas.rectangle((x1, y1, x2, y2), outline=color, width=width)
        return
    step = 4 * width
    for begin, end, vertical, fixed in ((x1, x2, 0, y1), (x1, x2, 0, y2), (y1, y2, 1, x1), (y1, y2, 1, x2)):
        for start in range(begin, end, 2 * step):
            stop = min(start + step, end)
            line = ((fixed, start), (fixed, stop)) if vertical else ((start, fixed), (stop, fixed))
            canvas.line(line, fill=_darker(color), width=width + 2)
            canvas.line(line, fill=color, width=width)


def _darker(color: Color) -> Color:
    return (color[0] // 3, color[1] // 3, color[2] // 3)


def _line_width(image: Image.Image) -> int:
    return max(2, round(max(image.size) / 400))


def _text_height(image: Image.Image, count: int) -> int:
    height = max(image.size) / (44 if count <= _CROWDED else 60)
    return max(11, round(height))


@functools.lru_cache(maxsize=16)
def _font(height: int) -> ImageFont.FreeTypeFont:
    # Matplotlib brings it along; it has Greek, Cyrillic, Arabic and Hebrew letters, which Pillow's own does not have
    return ImageFont.truetype(str(Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), height)


def _place(
    canvas: ImageDraw.ImageDraw, box: Box, text: str, height: int, size: tuple[int, int], taken: Sequence[Box]
) -> Box:
    """Return where a name is written: above its box, in it or below, at the first place that is free."""
    pad = max(2, height // 6)
    wide, high = round(canvas.textlength(text, font=_font(height))) + 2 * pad, height + 2 * pad
    left = min(max(0, round(box[0])), max(0, size[0] - wide))
    right = min(max(0, round(box[2]) - wide), max(0, size[0] - wide))
    top, bottom = round(box[1]), round(box[3])
    places = [(x, y) for y in (top - high, top, bottom - high, bottom) for x in (left, right)]
    inside = [(x, y) for x, y in places if 0 <= y <= size[1] - high] or [(left, max(0, min(top, size[1] - high)))]
    boxes = [(x, y, x + wide, y + high) for x, y in inside]
    return next((each for each in boxes if not any(_overlap(each, other) for other in taken)), boxes[0])


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _write(canvas: ImageDraw.ImageDraw, place: Box, text: str, color: Color, height: int) -> None:
    bright = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 140
    canvas.rectangle((place[0], place[1], place[2], place[3]), fill=color)
    middle = ((place[0] + place[2]) / 2, (place[1] + place[3]) / 2)
    canvas.text(middle, text, fill="black" if bright else "white", font=_font(height), anchor="mm")


def _with_masks(image: Image.Image, masks: Sequence[dict[str, object]], colors: Sequence[Color]) -> Image.Image:
    """Return an image with translucent masks, the first on top."""
    pixels = np.asarray(image, dtype=np.float32).copy()
    owner = np.full(pixels.shape[:2], -1, dtype=np.int64)
    for index in range(len(masks) - 1, -1, -1):
        owner[np.asarray(coco_masks().decode(masks[index]), dtype=bool)] = index
    covered = owner >= 0
    tint = np.array(colors, dtype=np.float32).reshape(-1, 3)[owner[covered]]
    pixels[covered] = _MASK_OPACITY * tint + (1 - _MASK_OPACITY) * pixels[covered]
    return Image.fromarray(pixels.round().astype(np.uint8))


def crop_with_boxes(image: Image.Image, focus: Box, boxes: Sequence[tuple[Box, Color, bool]], side: int) -> Image.Image:
    """Return a square of an image around a box, with boxes drawn on it.

    Args:
        image: in RGB.
        focus: x1, y1, x2, y2 of what is in the middle; the square is twice as large, and at least 32 pixels.
        boxes: corners, colour, and whether in dashes; the last on top.
        side: of the square that is returned.
    """
    x, y = (focus[0] + focus[2]) / 2, (focus[1] + focus[3]) / 2
    reach = max(16.0, focus[2] - focus[0], focus[3] - focus[1])
    reach = min(reach, max(image.size) / 2)
    # moved into the image where it can be
    x = min(max(x, reach), max(image.width - reach, image.width / 2))
    y = min(max(y, reach), max(image.height - reach, image.height / 2))
    left, top, factor = x - reach, y - reach, side / (2 * reach)
    corners = (round(left), round(top), round(x + reach), round(y + reach))
    crop = Image.new("RGB", (corners[2] - corners[0], corners[3] - corners[1]), (128, 128, 128))
    crop.paste(image, (-corners[0], -corners[1]))
    crop = crop.resize((side, side), Image.Resampling.BICUBIC)
    canvas = ImageDraw.Draw(crop)
    for box, color, dashed in boxes:
        moved = [(value - start) * factor for value, start in zip(box, (left, top, left, top), strict=True)]
        draw_box(canvas, moved, color, max(2, side // 96), dashed)
    return crop

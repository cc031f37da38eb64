"""Labels of boxes that are no class, of which there are two kinds: rows of the targets of an image, and regions.

Imports nothing, so that data sets and networks share them. Classes are 0 to C − 1.
"""

from __future__ import annotations

PADDING_TARGET = -1
"""In place of a target's class: the row holds no object."""
IGNORED_TARGET = -2
"""In place of a target's class: where nothing is learned, neither that there is an object nor that there is none."""

BACKGROUND_REGION = -2
"""Label of a region without an object."""
IGNORED_REGION = -1
"""Label of a region that is neither an object nor background; losses leave −1 out."""

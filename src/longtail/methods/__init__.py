"""The methods by name. A new one is a file here and a line in the table.

The table holds names, not classes, so that reading it imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longtail.methods.base import Method

METHODS = {
    "ce": ("longtail.methods.classifier", "CrossEntropy"),
    "la": ("longtail.methods.classifier", "LogitAdjustment"),
    "focal": ("longtail.methods.reweighting", "Focal"),
    "cb": ("longtail.methods.reweighting", "ClassBalanced"),
    "ldam": ("longtail.methods.ldam", "LDAM"),
    "supcon": ("longtail.methods.supcon", "SupCon"),
    "paco": ("longtail.methods.paco", "PaCo"),
    "gpaco": ("longtail.methods.paco", "GPaCo"),
    "bcl": ("longtail.methods.bcl", "BCL"),
    "proco": ("longtail.methods.proco", "ProCo"),
    "gml": ("longtail.methods.gml", "GML"),
    "dice": ("longtail.methods.region", "Dice"),
    "lovasz": ("longtail.methods.region", "Lovasz"),
}
FOR_PIXELS = ("ce", "la", "focal", "cb", "gml", "dice", "lovasz")
"""Methods that train networks for segmentation."""
ONLY_FOR_PIXELS = ("dice", "lovasz")
"""Methods that train nothing else."""


def method_class(name: str) -> type[Method]:
    """Return the class of a method named in :data:`METHODS`."""
    module, attribute = METHODS[name]
    kind: type[Method] = getattr(importlib.import_module(module), attribute)
    return kind

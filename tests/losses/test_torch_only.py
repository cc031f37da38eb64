"""Losses in somebody's own training: of the packages that longtail requires they need torch alone."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
MODULES = {
    "scikit-learn": "sklearn",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "lightning-fabric": "lightning_fabric",
    "huggingface-hub": "huggingface_hub",
}
"""Names of modules where they are not those of the distributions."""


def required() -> set[str]:
    """Return the modules of the packages that longtail requires, without torch."""
    text = PYPROJECT.read_text(encoding="utf-8")
    section = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    assert section is not None
    names = re.findall(r'^  "([\w-]+)', section[1], re.MULTILINE)
    assert len(names) > 10
    return {MODULES.get(name, name) for name in names} - {"torch"}


@functools.cache
def imported_by(code: str) -> set[str]:
    """Return the top-level modules that are imported after ``code`` in a new process."""
    script = f"{code}\nimport sys, json\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return set(json.loads(result.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "code",
    [
        "import longtail.losses",
        pytest.param("from longtail import GMLLoss, ClassPrior, ClassQueues", marks=pytest.mark.slow),
    ],
)
def test_nothing_but_torch_is_imported(code: str) -> None:
    with_torch, with_losses = imported_by("import torch"), imported_by(code)
    others = {name for name in with_losses - with_torch if name not in sys.stdlib_module_names}
    assert others == {"longtail"}
    heavy = required() | {"pydantic_core", "tyro", "lightning", "pytorch_lightning", "torchmetrics", "starlette"}
    assert with_losses & heavy <= with_torch
    assert not with_losses & {"pydantic", "tyro", "timm", "lightning_fabric", "PIL", "sklearn", "scipy", "torchvision"}


@pytest.mark.slow
def test_losses_work_where_nothing_else_is_installed() -> None:
    """As after ``pip install --no-deps longtail``: the other packages cannot be imported."""
    absent = sorted(required() - imported_by("import torch"))
    assert {"timm", "pydantic", "sklearn", "PIL"} <= set(absent)
    code = f"""
import sys
for name in {absent}:
    sys.modules[name] = None
import torch
import torch.nn.functional as F
from longtail import ClassQueues, GMLLoss
from longtail.losses import (
    AsymmetricLoss, BalancedContrastiveLoss, ClassBalancedLoss, FocalLoss, LDAMLoss, LogitAdjustedLoss, SupConLoss
)
counts, labels = [30, 8, 2], torch.tensor([0, 1, 2, 0])
scores = torch.randn(4, 3, requires_grad=True)
for loss in (
    AsymmetricLoss(), ClassBalancedLoss(counts), FocalLoss(), LDAMLoss(counts), LogitAdjustedLoss(counts)
):
    loss(scores, labels).backward()
z = F.normalize(torch.randn(4, 8), dim=1)
queues = ClassQueues(counts, size=12, minimum=2, dim=8)
queues.push(z, labels, torch.arange(4))
for loss in (GMLLoss(counts), SupConLoss(), BalancedContrastiveLoss(3)):
    assert loss(z, labels, queues.features, queues.labels, torch.arange(4) + 4, queues.ids) > 0
"""
    subprocess.run([sys.executable, "-c", code], check=True)

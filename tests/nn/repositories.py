"""Models in the layout of the Hugging Face Hub, with random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file


def save_repository(folder: Path, architecture: str, **arguments: Any) -> Path:
    """Write ``config.json`` and ``model.safetensors`` of a timm model, and its weights beside the folder."""
    folder.mkdir(parents=True)
    torch.manual_seed(5)
    weights = timm.create_model(architecture, **arguments).state_dict()
    save_file(weights, folder / "model.safetensors")
    torch.save(weights, folder.parent / "weights.pth")
    settings = {
        "input_size": [3, 160, 160],
        "fixed_input_size": architecture.startswith("test_vit"),
        "interpolation": "bicubic",
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "num_classes": 1000,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    config = {"architecture": architecture, "num_classes": 1000, "model_args": arguments, "pretrained_cfg": settings}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def hub_cache(root: Path, repository: Path, name: str) -> Path:
    """Return a cache of the Hub that holds a folder under a name, ``owner/name``."""
    cache = root / "hub"
    entry = cache / f"models--{name.replace('/', '--')}"
    commit = "0" * 40
    shutil.copytree(repository, entry / "snapshots" / commit)
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text(commit)
    return cache

"""A CLIP model of 2 million random weights, in the layout of the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

TOWERS: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def save_clip(folder: Path) -> Any:
    """Write a model for open_clip and for timm, which read the same file of weights; return open_clip's."""
    import open_clip

    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TOWERS, "preprocess_cfg": {}}))
    torch.manual_seed(7)
    model = open_clip.CLIP(**TOWERS).eval()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    config = {
        "architecture": "vit_base_patch16_clip_224",
        "num_classes": 24,
        "model_args": {"img_size": 32, "embed_dim": 64, "depth": 2, "num_heads": 2},
        "pretrained_cfg": {"input_size": [3, 32, 32], "fixed_input_size": True, "mean": [0.5] * 3, "std": [0.5] * 3},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return model

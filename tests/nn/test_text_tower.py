"""Classifier weights from class names."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from longtail.errors import LongtailError
from longtail.nn import build_backbone
from longtail.nn.text_tower import find_text_tower, text_weights
from tests.nn.clip_model import save_clip

open_clip = pytest.importorskip("open_clip")

NAMES = ["tabby_cat", "dog", "emu"]


@pytest.fixture
def clip(tmp_path: Path) -> tuple[str, Any]:
    model = save_clip(tmp_path / "clip")
    return f"local-dir:{tmp_path / 'clip'}", model


@torch.no_grad()
def test_scores_are_those_of_clip(clip: tuple[str, Any]) -> None:
    network, model = clip
    weights = text_weights(NAMES, network, "timm")
    texts = open_clip.tokenize(["a photo of a tabby cat.", "a photo of a dog.", "a photo of a emu."])
    embeddings = F.normalize(model.encode_text(texts))
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    features = build_backbone(network, 3, "timm").eval()(images)
    # t · P h = (Pᵀ t) · h; the weights have norm 1
    torch.testing.assert_close(weights.norm(dim=1), torch.ones(3))
    lengths = (embeddings @ model.visual.proj.T).norm(dim=1)
    torch.testing.assert_close(features @ weights.T * lengths, model.encode_image(images) @ embeddings.T)


def test_the_random_state_stays(clip: tuple[str, Any]) -> None:
    state = torch.get_rng_state()
    first = text_weights(NAMES, clip[0], "timm")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(text_weights(NAMES, clip[0], "timm"), first)


@pytest.mark.parametrize(
    ("network", "tower"),
    [
        ("vit_base_patch16_clip_224.openai", ("ViT-B-16-quickgelu", "openai")),
        ("vit_base_patch16_clip_224.laion2b", ("ViT-B-16", "laion2b_s34b_b88k")),
        ("vit_base_patch16_clip_224.datacompxl", ("ViT-B-16", "datacomp_xl_s13b_b90k")),
        ("vit_large_patch14_clip_336.openai", ("ViT-L-14-336-quickgelu", "openai")),
        ("vit_base_patch16_siglip_224.webli", ("ViT-B-16-SigLIP", "webli")),
        ("vit_base_patch16_siglip_224.v2_webli", ("ViT-B-16-SigLIP2", "webli")),
        ("vit_base_patch16_siglip_256.webli_i18n", ("ViT-B-16-SigLIP-i18n-256", "webli")),
        ("eva02_base_patch16_clip_224.merged2b", ("EVA02-B-16", "merged2b_s8b_b131k")),
        ("vit_base_patch16_clip_224.openai(drop_path_rate=0.1)", ("ViT-B-16-quickgelu", "openai")),
    ],
)
def test_the_tower_is_that_of_the_same_model(
    network: str, tower: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_clip, "download_pretrained", lambda _: "weights")
    monkeypatch.setattr("longtail.nn.text_tower.is_on_hub", lambda _: True)
    assert find_text_tower(network, "timm") == tower


@pytest.mark.parametrize(
    ("network", "pretrained", "message"),
    [
        ("resnet18", "timm", "network 'resnet18' has no text tower"),
        ("resnet20", "timm", "network 'resnet20' has no text tower"),
        ("vit_base_patch16_clip_224.laion2b_ft_in12k_in1k", "timm", "has no text tower"),
        ("local-dir:.", "timm", "has no text tower"),
        ("upernet:resnet18", "timm", "is for models that classify whole images"),
        ("vit_base_patch16_clip_224.openai", "none", "needs a network with pretrained weights"),
        ("vit_base_patch16_clip_224.openai", "timm", r"ViT-B-16-quickgelu \(openai\) cannot be loaded"),
    ],
)
def test_what_has_no_text_tower_is_one_line(network: str, pretrained: str, message: str) -> None:
    with pytest.raises(LongtailError, match=message) as raised:
        find_text_tower(network, pretrained)
    assert "\n" not in str(raised.value)


def test_without_open_clip_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(LongtailError, match=r"needs the extra clip: pip install 'longtail\[clip\]'"):
        find_text_tower("vit_base_patch16_clip_224.openai", "timm")


@torch.no_grad()
@pytest.mark.parametrize("projection", ["linear", "", "none"])
def test_towers_of_timm_have_their_projection_elsewhere(
    projection: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SigLIP has none, EVA-02 that of its classifier, others a layer after the network."""
    model = open_clip.CustomTextCLIP(
        embed_dim=64,
        vision_cfg={"timm_model_name": "test_vit", "timm_proj": projection, "timm_pool": "token", "image_size": 160},
        text_cfg={"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    ).eval()
    monkeypatch.setattr(open_clip, "create_model", lambda *_, **__: model)
    monkeypatch.setattr(open_clip, "download_pretrained", lambda _: "weights")
    monkeypatch.setattr("longtail.nn.text_tower.is_on_hub", lambda _: True)
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda _: open_clip.tokenize)
    weights = text_weights(NAMES, "vit_base_patch16_siglip_224.webli", "timm")
    images = torch.rand(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    trunk = model.visual.trunk
    features = trunk.forward_head(trunk.forward_features(images), pre_logits=True)
    texts = F.normalize(model.encode_text(open_clip.tokenize([f"a photo of a {n.replace('_', ' ')}." for n in NAMES])))
    bias = trunk.head.bias if isinstance(trunk.head, nn.Linear) else torch.zeros(64)
    expected = (model.encode_image(images) - bias) @ texts.T
    actual = features @ weights.T
    ratio = expected / actual
    torch.testing.assert_close(ratio[0], ratio[1], rtol=1e-3, atol=1e-4)
    assert (ratio > 0).all()

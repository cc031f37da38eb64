"""Networks by name: timm's, the Hub's and those of a folder; their weights, normalisation and sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from longtail.errors import LongtailError
from longtail.nn import Encoder, build_backbone
from longtail.nn.backbones import input_size, is_suited_to_lora, with_input_size
from longtail.nn.encoder import pretrained_encoder
from longtail.nn.network_name import parse_network, resolve_network, timm_settings
from longtail.nn.pretrained import check_pretrained, find_pretrained, load_weights, normalization
from tests.nn.repositories import hub_cache, save_repository

IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def random_weights(network: str, seed: int = 1, **arguments: Any) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    weights: dict[str, Tensor] = timm.create_model(network, **arguments).state_dict()
    return weights


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A folder with a model in the Hub's layout, made for images of 64 × 64 pixels."""
    return save_repository(tmp_path / "repository", "test_vit", img_size=64)


def test_a_folder_in_the_layout_of_the_hub_is_a_network(repository: Path) -> None:
    network = f"local-dir:{repository}"
    backbone = build_backbone(network, 3, "timm").eval()
    expected = timm.create_model("test_vit", img_size=64, num_classes=0).eval()
    expected.load_state_dict(torch.load(repository.parent / "weights.pth", weights_only=True), strict=False)
    torch.testing.assert_close(backbone(IMAGES), expected(IMAGES))
    assert normalization(network, 3) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert [value for values in normalization(network, 1) for value in values] == pytest.approx([0.2, 0.5])
    assert input_size(network) == 64
    assert find_pretrained(network) == "timm"
    assert resolve_network(network) == "test_vit(img_size=64)"
    assert resolve_network(f"{network}(img_size=32)") == "test_vit(img_size=32)"


def test_a_name_on_the_hub_is_read_from_its_cache(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub_cache(tmp_path, repository, "someone/tiny")))
    network = "hf-hub:someone/tiny"
    torch.testing.assert_close(
        build_backbone(network, 3, "timm").eval()(IMAGES),
        build_backbone(f"local-dir:{repository}", 3, "timm").eval()(IMAGES),
    )
    encoder = pretrained_encoder(network, 3)
    assert (encoder.mean, encoder.std, encoder.resize) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 64)
    assert resolve_network(network) == "test_vit(img_size=64)"
    assert find_pretrained(network) == "timm"


def test_the_saved_name_needs_no_hub(repository: Path) -> None:
    backbone = build_backbone(f"local-dir:{repository}", 3, "timm")
    saved = backbone.state_dict()
    name = resolve_network(f"local-dir:{repository}")
    for file in repository.iterdir():
        file.unlink()
    again = build_backbone(name, 3)
    again.load_state_dict(saved)
    torch.testing.assert_close(again.eval()(IMAGES), backbone.eval()(IMAGES))


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("hf-hub:someone/absent", "cannot be read from the Hub or its local cache"),
        ("hf-hub:", "cannot be read from the Hub or its local cache"),
        ("local-dir:no/such/folder", "there is no such folder"),
        ("local-dir:{folder}/empty", "has no config.json"),
        ("local-dir:{folder}/broken", "its config.json is not that of a timm model"),
        ("local-dir:{folder}/foreign", "timm has no architecture 'BertModel'"),
        ("test_vit(img_size)", r"expected NAME or NAME\(argument=value\)"),
        ("test_vit(img_size=64", r"expected NAME or NAME\(argument=value\)"),
        ("test_vit(img_size=open('x'))", r"expected NAME or NAME\(argument=value\)"),
        ("test_vit(checkpoint_path='x.pth')", "the argument checkpoint_path cannot be chosen"),
        ("test_vit(imgsize=64)", "imgsize"),
        ("resnet20(depth=3)", r"resnet20 takes no arguments \(depth\), only timm models do"),
        ("timm/test_vit", "a model on the Hub is hf-hub:timm/test_vit"),
        ("test_vti", "is not known; perhaps you meant .*test_vit"),
        ("test_vit.r160_in1", "perhaps you meant test_vit.r160_in1k"),
    ],
)
def test_names_that_are_none_are_one_line(network: str, message: str, tmp_path: Path) -> None:
    for name, text in (("broken", "{"), ("foreign", json.dumps({"architecture": "BertModel"}))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    (tmp_path / "empty").mkdir()
    with pytest.raises(LongtailError, match=message) as raised:
        build_backbone(network.replace("{folder}", str(tmp_path)), 3)
    assert "\n" not in str(raised.value)


def test_a_config_from_the_hub_cannot_name_files(tmp_path: Path) -> None:
    folder = save_repository(tmp_path / "repository", "test_vit", img_size=64)
    config = json.loads((folder / "config.json").read_text())
    config["model_args"]["checkpoint_path"] = "anything.pth"
    (folder / "config.json").write_text(json.dumps(config))
    assert resolve_network(f"local-dir:{folder}") == "test_vit(img_size=64)"


def test_arguments_are_plain_values() -> None:
    network = "test_vit(depth=2, norm_layer='layernorm2d', x={'a': (1, 2)})"
    name, arguments = parse_network(network)
    assert (name, arguments) == ("test_vit", {"depth": 2, "norm_layer": "layernorm2d", "x": {"a": (1, 2)}})
    assert parse_network("local-dir:/a (b)/c") == ("local-dir:/a (b)/c", {})
    assert parse_network("local-dir:/a (b)/c(img_size=32)") == ("local-dir:/a (b)/c", {"img_size": 32})


def test_position_embeddings_are_resampled_and_load_back_equal(tmp_path: Path) -> None:
    weights = random_weights("test_vit")
    save_file(weights, tmp_path / "vit.safetensors")
    network = with_input_size("test_vit", 64)
    assert network == "test_vit(img_size=64)"
    backbone = build_backbone(network, 3, str(tmp_path / "vit.safetensors")).eval()
    # 10 × 10 patches and a class token become 4 × 4 and the same token
    embedding = backbone.state_dict()["pos_embed"]
    assert embedding.shape == (1, 17, 64)
    torch.testing.assert_close(embedding[:, 0], weights["pos_embed"][:, 0])
    grid = weights["pos_embed"][:, 1:].reshape(1, 10, 10, 64).permute(0, 3, 1, 2)
    smaller = torch.nn.functional.interpolate(grid, size=4, mode="bicubic", antialias=True)
    torch.testing.assert_close(embedding[:, 1:], smaller.permute(0, 2, 3, 1).reshape(1, 16, 64))
    again = build_backbone(network, 3).eval()
    again.load_state_dict(backbone.state_dict())
    assert torch.equal(again(IMAGES), backbone(IMAGES))


@pytest.mark.parametrize(
    "network", ["test_vit", "test_vit2", "test_vit3", "vit_tiny_patch16_224", "deit_tiny_patch16_224"]
)
def test_vision_transformers_take_other_sizes(network: str) -> None:
    assert build_backbone(with_input_size(network, 64), 3).eval()(IMAGES).shape[0] == 2


@pytest.mark.parametrize(
    ("network", "size", "message"),
    [
        ("vit_small_patch14_dinov2.lvd142m", 160, "patches of 14 × 14 pixels.* use --network_size 154 or 168"),
        ("test_vit", 100, "patches of 16 × 16 pixels.* use --network_size 96 or 112"),
        ("test_vit", 8, "use --network_size 16$"),
        ("vit_small_patch16_dinov3.lvd1689m", 200, "patches of 16 × 16"),
        ("vit_base_patch16_siglip_224.webli", 232, "patches of 16 × 16"),
        ("vit_base_patch16_clip_224.openai", 100, "patches of 16 × 16"),
    ],
)
def test_a_size_is_a_multiple_of_the_patches(network: str, size: int, message: str) -> None:
    with pytest.raises(LongtailError, match=message) as raised:
        with_input_size(network, size)
    assert "\n" not in str(raised.value)


def test_networks_that_compute_with_values_while_they_are_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create(*arguments: Any, **options: Any) -> Any:
        torch.linspace(0, 1, 2)[0].item()  # as RegNet does with torch 2.6; without memory there are no values
        return original(*arguments, **options)

    weights, original = random_weights("test_vit"), timm.create_model
    save_file(weights, tmp_path / "w.safetensors")
    monkeypatch.setattr(timm, "create_model", create)
    assert with_input_size("test_vit", 96) == "test_vit(img_size=96)"
    assert is_suited_to_lora("test_vit(img_size=96)")
    assert set(load_weights(tmp_path / "w.safetensors", "test_vit")) <= set(weights)


def test_sizes_of_networks() -> None:
    assert input_size("vit_small_patch14_dinov2.lvd142m") == 518
    assert with_input_size("vit_small_patch14_dinov2.lvd142m", 518) == "vit_small_patch14_dinov2.lvd142m"
    assert with_input_size("vit_small_patch14_dinov2.lvd142m", 224) == "vit_small_patch14_dinov2.lvd142m(img_size=224)"
    assert input_size("test_vit(img_size=64)") == 64
    for any_size in (
        "resnet18",
        "test_efficientnet",
        "resnet20",
        "upernet:resnet18",
        "test_vit(dynamic_img_size=True)",
    ):
        assert input_size(any_size) is None


@pytest.mark.parametrize("network", ["test_vit", "test_efficientnet", "test_convnext", "resnet18", "test_byobnet"])
@pytest.mark.parametrize("channels", [1, 3])
def test_weights_of_a_file_are_all_loaded(network: str, channels: int, tmp_path: Path) -> None:
    weights = random_weights(network)
    torch.save({"state_dict": weights}, tmp_path / "weights.pth")
    backbone = build_backbone(network, channels, str(tmp_path / "weights.pth"))
    loaded = backbone.state_dict()
    same = {name for name, tensor in loaded.items() if torch.equal(tensor, weights.get(name, torch.empty(0)))}
    first = {name for name in loaded if loaded[name].shape != weights[name].shape}
    assert set(loaded) - same == first
    assert len(first) == (channels == 1)  # whose channels are added up


def test_a_classifier_that_timms_own_weights_do_not_have_is_left_out(tmp_path: Path) -> None:
    name = "vit_small_patch14_dinov2(depth=1, img_size=56)"
    weights = random_weights("vit_small_patch14_dinov2", depth=1, img_size=56, num_classes=5)
    assert "head.weight" in weights
    save_file(weights, tmp_path / "finetuned.safetensors")
    backbone = build_backbone(name, 3, str(tmp_path / "finetuned.safetensors"))
    assert torch.equal(backbone.state_dict()["norm.weight"], weights["norm.weight"])


def save_bad_file(path: Path, kind: str) -> None:
    weights = random_weights("test_efficientnet")
    if kind == "folder":
        path.mkdir()
        return
    if kind == "other model":  # with layers of the same name
        weights = random_weights("test_efficientnet_ln")
    elif kind == "wider":
        weights = {name: torch.cat([tensor, tensor]) if tensor.ndim else tensor for name, tensor in weights.items()}
    elif kind == "part":
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("blocks.2")}
    elif kind == "no tensors":
        torch.save({"a": 1}, path)
        return
    save_file(weights, path) if path.suffix == ".safetensors" else torch.save(weights, path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])


BAD_FILES = [
    ("w.safetensors", "truncated", "cannot be read as weights"),
    ("w.pth", "truncated", "cannot be read as weights"),
    ("w.safetensors", "other model", "tensors that are not those of test_efficientnet"),
    ("w.safetensors", "wider", "another model than test_efficientnet"),
    ("w.pth", "part", "are missing, blocks.2"),
    ("w.pth", "no tensors", "holds no weights"),
    ("weights", "folder", "is a folder, expected none, auto, timm, or a file of weights"),
]


@pytest.mark.parametrize(("name", "kind", "message"), BAD_FILES)
def test_files_that_do_not_fit_are_one_line(name: str, kind: str, message: str, tmp_path: Path) -> None:
    save_bad_file(tmp_path / name, kind)
    for check in (load_weights, lambda path, network: check_pretrained(network, str(path))):
        with pytest.raises(LongtailError, match=message) as raised:
            check(tmp_path / name, "test_efficientnet")
        assert "\n" not in str(raised.value)


def test_every_family_has_its_own_normalisation() -> None:
    for network, mean in (
        ("vit_base_patch16_clip_224.openai", 0.481),
        ("vit_base_patch16_siglip_224.webli", 0.5),
        ("vit_small_patch14_dinov2.lvd142m", 0.485),
        ("vit_small_patch16_dinov3.lvd1689m", 0.485),
    ):
        assert normalization(network, 3)[0][0] == pytest.approx(mean, abs=1e-3)
        settings = timm_settings(network)
        assert settings is not None
        assert settings.fixed_input_size


def test_an_encoder_with_arguments() -> None:
    encoder = Encoder("test_vit(img_size=32, adapter=4)", [0.5] * 3, [0.5] * 3, resize=32)
    assert encoder(torch.rand(2, 3, 16, 16)).shape == (2, 64)

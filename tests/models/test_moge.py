"""MoGe's encoder against an independent DINOv2 that works on the published key names directly."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spear_lightning.errors import CheckpointError
from spear_lightning.models import Dinov2Encoder, MogeEncoder

WIDTH, DEPTH, HEADS, SIDE = 32, 6, 4, 5
"""Sizes of the small transformer; its position table has SIDE x SIDE entries."""

SMALL = {"hidden_width": WIDTH, "depth": DEPTH, "heads": HEADS, "image_size": 14 * SIDE}


def dinov2_state() -> dict[str, Tensor]:
    """Random weights under the names of the original DINOv2."""
    shapes = {
        "cls_token": (1, 1, WIDTH),
        "mask_token": (1, WIDTH),
        "pos_embed": (1, SIDE * SIDE + 1, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, 14, 14),
        "patch_embed.proj.bias": (WIDTH,),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
    }
    for block in range(DEPTH):
        for name, rows, columns in (("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc1", 4, 1), ("mlp.fc2", 1, 4)):
            shapes[f"blocks.{block}.{name}.weight"] = (rows * WIDTH, columns * WIDTH)
            shapes[f"blocks.{block}.{name}.bias"] = (rows * WIDTH,)
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
            shapes[f"blocks.{block}.{name}"] = (WIDTH,)
    generator = torch.Generator().manual_seed(0)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def reference_layers(state: dict[str, Tensor], images: Tensor, layers: list[int], offset: float) -> Tensor:
    """Plain DINOv2 as its authors describe it: normed patch tokens of some blocks, concatenated."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)

    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (images / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    rows, columns = images.shape[2] // 14, images.shape[3] // 14
    x = F.conv2d(pixels, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=14)
    x = x.flatten(2).mT
    x = torch.cat([state["cls_token"].expand(len(x), 1, WIDTH), x], dim=1)
    table = state["pos_embed"][:, 1:].view(1, SIDE, SIDE, WIDTH).permute(0, 3, 1, 2)
    if rows * columns != SIDE * SIDE or rows != columns:
        factor = ((rows + offset) / SIDE, (columns + offset) / SIDE)
        table = F.interpolate(table, scale_factor=factor, mode="bicubic", align_corners=False, antialias=False)
    assert table.shape[2:] == (rows, columns)
    x = x + torch.cat([state["pos_embed"][:, :1], table.flatten(2).mT], dim=1)
    kept = []
    for block in range(DEPTH):
        name = f"blocks.{block}"
        packed = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv")
        q, k, v = packed.view(*x.shape[:2], 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.mT / (WIDTH // HEADS) ** 0.5, dim=-1)
        attended = (weights @ v).transpose(1, 2).flatten(2)
        x = x + state[f"{name}.ls1.gamma"] * linear(attended, f"{name}.attn.proj")
        inner = F.gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1"))
        x = x + state[f"{name}.ls2.gamma"] * linear(inner, f"{name}.mlp.fc2")
        if block in layers:
            kept.append(norm(x, "norm")[:, 1:])
    return torch.cat(kept, dim=-1)


def save_v1(folder: Path, state: dict[str, Tensor]) -> str:
    """A file laid out as `Ruicheng/moge-vitl`'s model.pt."""
    model = {f"backbone.{name}": tensor for name, tensor in state.items()}
    model |= {name: torch.zeros(1, 3, 1, 1) for name in ("image_mean", "image_std")}
    model |= {"head.projects.0.weight": torch.zeros(8, WIDTH, 1, 1), "head.output_block.0.0.bias": torch.zeros(8)}
    config = {
        "encoder": "dinov2_vitl14",
        "remap_output": "exp",
        "intermediate_layers": 4,
        "trained_area_range": [1, 2],
    }
    torch.save({"model_config": config, "model": model}, folder / "model.pt")
    return str(folder)


def save_v2(folder: Path, state: dict[str, Tensor], layers: list[int]) -> str:
    """A file laid out as MoGe-2's model.pt."""
    model = {f"encoder.backbone.{name}": tensor for name, tensor in state.items()}
    model |= {name: torch.zeros(1, 3, 1, 1) for name in ("encoder.image_mean", "encoder.image_std")}
    others = (
        "encoder.output_projections.0.weight",
        "neck.input_blocks.0.weight",
        "points_head.res_blocks.1.0.layers.2.bias",
    )
    model |= dict.fromkeys((*others, "mask_head.a", "normal_head.b", "scale_head.0.weight"), torch.zeros(4))
    encoder = {"backbone": "dinov2_vitl14", "intermediate_layers": layers, "dim_out": 1024}
    torch.save({"model_config": {"encoder": encoder, "remap_output": "exp"}, "model": model}, folder / "model.pt")
    return str(folder)


def picture(height: int, width: int) -> Tensor:
    return torch.randint(
        0, 256, (2, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


@pytest.mark.parametrize(("height", "width"), [(210, 280), (112, 112), (70, 70)])
def test_v1_equals_the_reference(tmp_path: Path, height: int, width: int) -> None:
    state = dinov2_state()
    encoder = MogeEncoder(**SMALL, layers=[2, 3, 4, 5], weights=save_v1(tmp_path, state))
    encoder.load_pretrained()
    with torch.no_grad():
        found = encoder(picture(height, width))
    expected = reference_layers(state, picture(height, width), [2, 3, 4, 5], offset=0.1)
    assert found.shape == (2, height * width // 196, 4 * WIDTH)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(210, 280), (112, 112)])
def test_v2_equals_the_reference_and_names_its_layers(tmp_path: Path, height: int, width: int) -> None:
    state, layers = dinov2_state(), [0, 1, 3, 4]
    encoder = MogeEncoder(**SMALL, layers=None, weights=save_v2(tmp_path, state, layers))
    encoder.load_pretrained()
    with torch.no_grad():
        found = encoder(picture(height, width))
    expected = reference_layers(state, picture(height, width), layers, offset=0.1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_layers_from_the_weights_survive_a_checkpoint_of_ours(tmp_path: Path) -> None:
    trained = MogeEncoder(**SMALL, layers=None, weights=save_v2(tmp_path, dinov2_state(), [0, 1, 3, 4]))
    trained.load_pretrained()
    rebuilt = MogeEncoder(**SMALL, layers=None)
    assert rebuilt.layers == (2, 3, 4, 5)
    torch.nn.Sequential(rebuilt).load_state_dict(torch.nn.Sequential(trained).state_dict())
    assert rebuilt.layers == (0, 1, 3, 4)
    assert torch.equal(rebuilt(picture(28, 42)), trained(picture(28, 42)))


def test_v1_names_its_layers_by_their_number(tmp_path: Path) -> None:
    encoder = MogeEncoder(**SMALL, layers=None, weights=save_v1(tmp_path, dinov2_state()))
    encoder.load_pretrained()
    assert encoder.layers == (2, 3, 4, 5)


def test_other_layers_than_the_decoders_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        MogeEncoder(**SMALL, layers=[1, 5], weights=save_v1(tmp_path, dinov2_state())).load_pretrained()
    assert "reads blocks (2, 3, 4, 5), the encoder is set to (1, 5)" in caplog.text


def test_the_published_sizes_are_the_defaults() -> None:
    with torch.device("meta"):
        encoder = MogeEncoder()
    # 304.37 M parameters with the mask token of 1024, which is not kept.
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 304_368_640 - 1024
    assert encoder.layers == (20, 21, 22, 23)
    assert encoder.width == 4096


def test_unused_blocks_are_named() -> None:
    encoder = MogeEncoder(**SMALL, layers=[1, 3])
    assert {name.split(".")[3] for name in encoder.unused_parameters()} == {"4", "5"}
    encoder(picture(28, 28)).sum().backward()
    assert encoder.unused_parameters() == [
        name for name, value in encoder.named_parameters() if value.grad is None
    ]


def test_files_that_are_not_moges_are_refused(tmp_path: Path) -> None:
    state = dinov2_state()
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"not a MoGe checkpoint"):
        MogeEncoder(**SMALL, layers=[5], weights=str(tmp_path)).load_pretrained()
    torch.save({"model_config": {}, "model": {"stem.weight": torch.zeros(1)}}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"1 unknown names \['stem.weight'\]"):
        MogeEncoder(**SMALL, layers=[5], weights=str(tmp_path)).load_pretrained()
    save_v2(tmp_path, state, [1, 5])
    with pytest.raises(CheckpointError, match=r"(?s)intermediate_layers: \[1, 5\].*4 blocks"):
        MogeEncoder(**SMALL, layers=None, weights=str(tmp_path)).load_pretrained()
    save_v1(tmp_path, {**state, "register_tokens": torch.zeros(1, 4, WIDTH)})
    with pytest.raises(CheckpointError, match=r"1 unexpected \['register_tokens'\]"):
        MogeEncoder(**SMALL, layers=[5], weights=str(tmp_path)).load_pretrained()


def test_plain_dinov2_reads_the_original_names_too(tmp_path: Path) -> None:
    state = dinov2_state()
    torch.save(state, tmp_path / "dinov2_pretrain.pth")
    file = str(tmp_path / "dinov2_pretrain.pth")
    encoder = Dinov2Encoder(**SMALL, interpolate_offset=0.1, weights=file)
    encoder.load_pretrained()
    with torch.no_grad():
        found = encoder(picture(42, 56))
    torch.testing.assert_close(found, reference_layers(state, picture(42, 56), [5], 0.1), atol=1e-4, rtol=1e-4)

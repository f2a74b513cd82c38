"""MoGe's networks against straight-line restatements that work on the published names and shapes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from spear_lightning.errors import CheckpointError, ConfigError, ShapeError
from spear_lightning.models import MogeEncoder
from spear_lightning.models.moge import Moge, MogeV1, MogeV2

Shapes = dict[str, tuple[int, ...]]
SMALL = {"width": 32, "depth": 6, "side": 5}
V1_SMALL = {"projection": 24, "upsampled": (64, 32, 16), "blocks": 2, "hidden_ratio": 2, "last": 8}
V1_LARGE = {"projection": 512, "upsampled": (256, 128, 64), "blocks": 2, "hidden_ratio": 2, "last": 32}
V2_SMALL = {"widths": (40, 24, 16, 12, 8), "scale": 20}
V2_LARGE = {"widths": (1024, 256, 128, 64, 32), "scale": 1024}
LAYERS = {MogeV1: [2, 3, 4, 5], MogeV2: [0, 2, 3, 5]}


def transformer_shapes(width: int, depth: int, side: int) -> Shapes:
    shapes: Shapes = {
        "cls_token": (1, 1, width),
        "mask_token": (1, width),
        "pos_embed": (1, side * side + 1, width),
        "patch_embed.proj.weight": (width, 3, 14, 14),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for block in range(depth):
        for name, rows, columns in (("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc1", 4, 1), ("mlp.fc2", 1, 4)):
            shapes[f"blocks.{block}.{name}.weight"] = (rows * width, columns * width)
            shapes[f"blocks.{block}.{name}.bias"] = (rows * width,)
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
            shapes[f"blocks.{block}.{name}"] = (width,)
    return shapes


def convolution(name: str, rows: int, columns: int, size: int) -> Shapes:
    return {f"{name}.weight": (rows, columns, size, size), f"{name}.bias": (rows,)}


def v1_shapes(
    width: int,
    depth: int,
    side: int,
    projection: int,
    upsampled: tuple[int, ...],
    blocks: int,
    hidden_ratio: int,
    last: int,
) -> Shapes:
    shapes: Shapes = dict.fromkeys(("image_mean", "image_std"), (1, 3, 1, 1))
    shapes |= {f"backbone.{name}": shape for name, shape in transformer_shapes(width, depth, side).items()}
    for layer in range(4):
        shapes |= convolution(f"head.projects.{layer}", projection, width, 1)
    below = projection
    for stage, here in enumerate(upsampled):
        name = f"head.upsample_blocks.{stage}"
        shapes |= {f"{name}.0.0.weight": (below + 2, here, 2, 2), f"{name}.0.0.bias": (here,)}
        shapes |= convolution(f"{name}.0.1", here, here, 3)
        hidden = hidden_ratio * here
        for block in range(1, blocks + 1):
            shapes |= {f"{name}.{block}.layers.0.{kind}": (here,) for kind in ("weight", "bias")}
            shapes |= {f"{name}.{block}.layers.3.{kind}": (hidden,) for kind in ("weight", "bias")}
            shapes |= convolution(f"{name}.{block}.layers.2", hidden, here, 3)
            shapes |= convolution(f"{name}.{block}.layers.5", here, hidden, 3)
        below = here
    for branch, channels in enumerate((3, 1)):
        shapes |= convolution(f"head.output_block.{branch}.0", last, below + 2, 3)
        shapes |= convolution(f"head.output_block.{branch}.2", channels, last, 1)
    return shapes


def v2_shapes(
    width: int, depth: int, side: int, widths: tuple[int, ...], scale: int, normals: bool = True
) -> Shapes:
    shapes: Shapes = {f"encoder.{name}": (1, 3, 1, 1) for name in ("image_mean", "image_std")}
    shapes |= {f"encoder.backbone.{name}": shape for name, shape in transformer_shapes(width, depth, side).items()}
    for layer in range(4):
        shapes |= convolution(f"encoder.output_projections.{layer}", widths[0], width, 1)
    outputs = {"neck": None, "points_head": 3, "mask_head": 1, **({"normal_head": 3} if normals else {})}
    for part, output in outputs.items():
        inputs = (widths[0] + 2, 2, 2, 2, 2) if part == "neck" else widths
        for level, here in enumerate(widths):
            shapes |= convolution(f"{part}.input_blocks.{level}", here, inputs[level], 1)
            for block in range((2 if part == "neck" else 1) if level in (1, 2, 3) else 0):
                for layer in (2, 5):
                    shapes |= convolution(f"{part}.res_blocks.{level}.{block}.layers.{layer}", here, here, 3)
        for level in range(3):
            above = widths[level + 1]
            shapes[f"{part}.resamplers.{level}.0.weight"] = (widths[level], above, 2, 2)
            shapes[f"{part}.resamplers.{level}.0.bias"] = (above,)
            shapes |= convolution(f"{part}.resamplers.{level}.1", above, above, 3)
        shapes |= convolution(f"{part}.resamplers.3.1", widths[4], widths[3], 3)
        if output is not None:
            shapes |= convolution(f"{part}.output_blocks.4", output, widths[4], 1)
    for layer, (rows, columns) in zip((0, 2, 4), ((scale, width), (scale, scale), (1, scale)), strict=True):
        shapes |= {f"scale_head.{layer}.weight": (rows, columns), f"scale_head.{layer}.bias": (rows,)}
    return shapes


def random_state(shapes: Shapes) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name in state:
        if name.endswith("image_std"):
            state[name] = torch.rand(state[name].shape, generator=generator) + 0.2
    return state


def transformer_layers(state: dict[str, Tensor], prefix: str, pixels: Tensor, layers: list[int]) -> list[Tensor]:
    """Normed outputs of blocks by transformers' own DINOv2, its interpolation replaced by the original's."""
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    width, depth, side = SMALL["width"], SMALL["depth"], SMALL["side"]
    config = Dinov2Config(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=4, image_size=14 * side, patch_size=14
    )
    model = Dinov2Model(config).eval()
    names = {
        "embeddings.cls_token": own["cls_token"],
        "embeddings.mask_token": own["mask_token"],
        "embeddings.position_embeddings": own["pos_embed"],
        "embeddings.patch_embeddings.projection.weight": own["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": own["patch_embed.proj.bias"],
        "layernorm.weight": own["norm.weight"],
        "layernorm.bias": own["norm.bias"],
    }
    for block in range(depth):
        here, there = f"blocks.{block}", f"encoder.layer.{block}"
        for kind in ("weight", "bias"):
            packed = own[f"{here}.attn.qkv.{kind}"]
            for number, part in enumerate("qkv"):
                names[f"{there}.attention.{part}_proj.{kind}"] = packed[number * width : (number + 1) * width]
            names[f"{there}.attention.o_proj.{kind}"] = own[f"{here}.attn.proj.{kind}"]
            for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                names[f"{there}.{part}.{kind}"] = own[f"{here}.{part}.{kind}"]
        for number in (1, 2):
            names[f"{there}.layer_scale{number}.lambda1"] = own[f"{here}.ls{number}.gamma"]
    model.load_state_dict(names, strict=True)

    def original(embeddings: Tensor, height: int, width_: int) -> Tensor:
        rows, columns = height // 14, width_ // 14
        if rows == columns == side:
            return model.embeddings.position_embeddings
        table = model.embeddings.position_embeddings[:, 1:].view(1, side, side, width).permute(0, 3, 1, 2)
        scale = ((rows + 0.1) / side, (columns + 0.1) / side)
        table = F.interpolate(table, scale_factor=scale, mode="bicubic").flatten(2).mT
        return torch.cat([model.embeddings.position_embeddings[:, :1], table], dim=1)

    model.embeddings.interpolate_pos_encoding = original  # type: ignore[method-assign]
    hidden = model(pixels, output_hidden_states=True).hidden_states
    return [model.layernorm(hidden[layer + 1]) for layer in layers]


def plane(rows: int, columns: int, aspect: float) -> Tensor:
    """u in +-a / sqrt(1 + a^2) (columns - 1) / columns, v likewise, as torch.linspace makes it."""
    right, bottom = aspect / math.sqrt(1 + aspect**2), 1 / math.sqrt(1 + aspect**2)
    right, bottom = right * (columns - 1) / columns, bottom * (rows - 1) / rows
    u, v = torch.linspace(-right, right, columns), torch.linspace(-bottom, bottom, rows)
    return torch.stack(torch.meshgrid(u, v, indexing="xy"))[None]


def conv(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    side = weight.shape[-1] // 2
    return F.conv2d(F.pad(x, (side,) * 4, mode="replicate") if side else x, weight, bias)


def double(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    x = F.conv_transpose2d(x, state[f"{name}.0.weight"], state[f"{name}.0.bias"], stride=2)
    return conv(state, f"{name}.1", x)


def grid(tokens: Tensor, rows: int, columns: int) -> Tensor:
    return tokens[:, 1:].mT.reshape(len(tokens), -1, rows, columns)


def remap(raw: Tensor) -> Tensor:
    x, y, z = raw.unbind(1)
    return torch.stack([x * z.exp(), y * z.exp(), z.exp()], dim=-1)


def reference_v1(state: dict[str, Tensor], images: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    height, width = images.shape[2:]
    factor = math.sqrt(num_tokens * 196 / (height * width))
    inner = (int(height * factor), int(width * factor))
    x = F.interpolate(images / 255, inner, mode="bicubic", antialias=True)
    x = (x - state["image_mean"]) / state["image_std"]
    rows, columns = inner[0] // 14, inner[1] // 14
    x = F.interpolate(x, (14 * rows, 14 * columns), mode="bilinear", antialias=True)
    layers = transformer_layers(state, "backbone.", x, LAYERS[MogeV1])
    x = sum(conv(state, f"head.projects.{i}", grid(layer, rows, columns)) for i, layer in enumerate(layers))
    aspect = inner[1] / inner[0]
    for stage in range(3):
        name = f"head.upsample_blocks.{stage}"
        x = torch.cat([x, plane(*x.shape[2:], aspect).expand(len(x), -1, -1, -1)], dim=1)
        x = double(state, f"{name}.0", x)
        for block in (1, 2):
            layer = f"{name}.{block}.layers"
            h = F.group_norm(x, 1, state[f"{layer}.0.weight"], state[f"{layer}.0.bias"])
            h = conv(state, f"{layer}.2", h.relu())
            h = F.group_norm(h, h.shape[1] // 32, state[f"{layer}.3.weight"], state[f"{layer}.3.bias"])
            x = x + conv(state, f"{layer}.5", h.relu())
    x = F.interpolate(x, inner, mode="bilinear")
    x = torch.cat([x, plane(*inner, aspect).expand(len(x), -1, -1, -1)], dim=1)
    outputs = [
        conv(state, f"head.output_block.{branch}.2", conv(state, f"head.output_block.{branch}.0", x).relu())
        for branch in (0, 1)
    ]
    points, mask = (F.interpolate(output, (height, width), mode="bilinear") for output in outputs)
    return remap(points), mask[:, 0]


def reference_stack(state: dict[str, Tensor], name: str, inputs: list[Tensor]) -> list[Tensor]:
    outputs, x = [], torch.zeros(())
    for level in range(5):
        x = x + conv(state, f"{name}.input_blocks.{level}", inputs[level])
        for block in range(2):
            layer = f"{name}.res_blocks.{level}.{block}.layers"
            if f"{layer}.2.weight" in state:
                x = x + conv(state, f"{layer}.5", conv(state, f"{layer}.2", x.relu()).relu())
        outputs.append(x)
        if level < 3:
            x = double(state, f"{name}.resamplers.{level}", x)
        elif level == 3:
            doubled = F.interpolate(x, scale_factor=2, mode="bilinear")
            x = conv(state, f"{name}.resamplers.3.1", doubled)
    return outputs


def reference_v2(state: dict[str, Tensor], images: Tensor, num_tokens: int) -> dict[str, Tensor]:
    height, width = images.shape[2:]
    aspect = width / height
    rows, columns = round(math.sqrt(num_tokens / aspect)), round(math.sqrt(num_tokens * aspect))
    x = F.interpolate(images / 255, (14 * rows, 14 * columns), mode="bilinear", antialias=True)
    x = (x - state["encoder.image_mean"]) / state["encoder.image_std"]
    layers = transformer_layers(state, "encoder.backbone.", x, LAYERS[MogeV2])
    maps = [grid(layer, rows, columns) for layer in layers]
    x = sum(conv(state, f"encoder.output_projections.{i}", layer) for i, layer in enumerate(maps))
    planes = [plane(rows * 2**k, columns * 2**k, aspect).expand(len(x), -1, -1, -1) for k in range(5)]
    neck = reference_stack(state, "neck", [torch.cat([x, planes[0]], dim=1), *planes[1:]])
    found = {}
    for name in ("points", "mask", "normal"):
        fine = conv(state, f"{name}_head.output_blocks.4", reference_stack(state, f"{name}_head", neck)[4])
        found[name] = F.interpolate(fine, (height, width), mode="bilinear")
    scale = layers[-1][:, 0]
    for layer in (0, 2, 4):
        scale = F.linear(scale, state[f"scale_head.{layer}.weight"], state[f"scale_head.{layer}.bias"])
        scale = scale.relu() if layer < 4 else scale.exp()[:, 0]
    normals = found["normal"] / found["normal"].norm(dim=1, keepdim=True)
    return {
        "points": remap(found["points"]),
        "mask": found["mask"][:, 0].sigmoid(),
        "normals": normals.permute(0, 2, 3, 1),
        "scale": scale,
    }


def saved(folder: Path, state: dict[str, Tensor], **config: Any) -> str:
    config = {"remap_output": "exp", "an_unknown_key": [1], **config}
    torch.save({"model_config": config, "model": state}, folder / "model.pt")
    return str(folder)


def small(version: type[Moge], weights: str | None = None, **options: Any) -> Any:
    encoder = MogeEncoder(
        hidden_width=SMALL["width"],
        depth=SMALL["depth"],
        heads=4,
        layers=LAYERS[version],
        image_size=14 * SMALL["side"],
    )
    if version is MogeV1:
        return MogeV1(encoder, **V1_SMALL, weights=weights, **options)
    return MogeV2(encoder, V2_SMALL["widths"], scale_hidden=V2_SMALL["scale"], weights=weights, **options)


def small_v1(folder: Path, **options: Any) -> tuple[MogeV1, dict[str, Tensor]]:
    state = random_state(v1_shapes(**SMALL, **V1_SMALL))
    weights = saved(folder, state, intermediate_layers=4, trained_area_range=[196 * 10, 196 * 40])
    model = small(MogeV1, weights, **options)
    model.load_pretrained()
    return model.eval(), state


def small_v2(folder: Path, **options: Any) -> tuple[MogeV2, dict[str, Tensor]]:
    state = random_state(v2_shapes(**SMALL, **V2_SMALL))
    encoder = {"backbone": "dinov2_vitl14", "intermediate_layers": LAYERS[MogeV2]}
    model = small(MogeV2, saved(folder, state, encoder=encoder, num_tokens_range=[10, 40]), **options)
    model.load_pretrained()
    return model.eval(), state


def pictures(height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randint(0, 256, (2, 3, height // 14 + 1, width // 14 + 1), generator=generator).float()
    return F.interpolate(coarse, (height, width), mode="bilinear").to(torch.uint8)


SIZES = [(84, 112, 48), (70, 70, 25), (97, 61, 20), (60, 150, 40)]
"""Height, width and number of tokens: no resizing at all, the trained grid, two odd sizes."""


@pytest.mark.parametrize(("height", "width", "tokens"), SIZES)
def test_v1_equals_the_reference(tmp_path: Path, height: int, width: int, tokens: int) -> None:
    model, state = small_v1(tmp_path)
    images = pictures(height, width)
    with torch.no_grad():
        found = model(images, tokens)
        points, mask = reference_v1(state, images, tokens)
    assert found.points.shape == (2, height, width, 3)
    torch.testing.assert_close(found.points, points, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.mask, mask, rtol=1e-4, atol=1e-4)
    assert found.scale is None


@pytest.mark.parametrize(("height", "width", "tokens"), SIZES)
def test_v2_equals_the_reference(tmp_path: Path, height: int, width: int, tokens: int) -> None:
    model, state = small_v2(tmp_path)
    images = pictures(height, width)
    with torch.no_grad():
        found = model(images, tokens)
        expected = reference_v2(state, images, tokens)
    torch.testing.assert_close(found.points, expected["points"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.mask_values(found.mask), expected["mask"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.normals, expected["normals"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.scale, expected["scale"], rtol=1e-4, atol=1e-5)


def test_the_published_files_names_and_shapes() -> None:
    large = {"width": 1024, "depth": 24, "side": 37}
    with torch.device("meta"):
        models = [MogeV1(), MogeV2(), MogeV2(normals=False)]
    expected = [
        v1_shapes(**large, **V1_LARGE),
        v2_shapes(**large, **V2_LARGE),
        v2_shapes(**large, **V2_LARGE, normals=False),
    ]
    for model, shapes in zip(models, expected, strict=True):
        assert {name: tuple(value.shape) for name, value in model.published_state().items()} == shapes
    counts = [len(shapes) for shapes in expected]
    millions = [sum(math.prod(shape) for shape in shapes.values()) / 1e6 for shapes in expected]
    # As counted on the published code.
    assert counts[:2] == [421, 521]
    assert millions == pytest.approx([314.17, 330.9, 326.2], abs=0.05)


@pytest.mark.slow
def test_a_file_of_the_published_size_loads(tmp_path: Path) -> None:
    shapes = v1_shapes(width=1024, depth=24, side=37, **V1_LARGE)
    # One number per tensor on disk.
    state = {name: torch.full((1,), 0.01).expand(shape) for name, shape in shapes.items()}
    model = MogeV1(weights=saved(tmp_path, state, intermediate_layers=4, num_tokens_range=[1200, 2500]))
    model.load_pretrained()
    assert all(bool((value == 0.01).all()) for value in model.parameters())
    assert model.num_tokens == 2500


def test_point_maps_lie_on_the_rays_of_their_cameras(tmp_path: Path) -> None:
    for model, metric in ((small_v1(tmp_path)[0], False), (small_v2(tmp_path)[0], True)):
        # Random weights see almost nothing; any pixel counts here.
        model.mask_values = torch.ones_like  # type: ignore[method-assign]
        with torch.no_grad():
            maps = model.point_maps(pictures(84, 112), torch.tensor([0.8, 0.9]))
        assert maps.metric == metric
        assert maps.valid.any()
        assert maps.intrinsics[:, 0].tolist() == pytest.approx([0.8, 0.9])
        assert maps.intrinsics[:, 1].tolist() == pytest.approx([0.8 * 112 / 84, 0.9 * 112 / 84])
        assert (maps.points.isfinite().all(-1) == maps.valid).all()
        index, row, column = maps.valid.nonzero(as_tuple=True)
        x, y, z = maps.points[maps.valid].unbind(-1)
        fx, fy = maps.intrinsics[index, 0] * 112, maps.intrinsics[index, 1] * 84
        torch.testing.assert_close(fx * x / z + 56, column + 0.5, atol=1e-2, rtol=0)
        torch.testing.assert_close(fy * y / z + 42, row + 0.5, atol=1e-2, rtol=0)
        assert (z > 0).all()


def test_a_file_of_ours_serves_as_the_published_one(tmp_path: Path) -> None:
    for version, make in ((MogeV1, small_v1), (MogeV2, small_v2)):
        model, state = make(tmp_path)
        file = model.save(tmp_path / version.__name__ / "model.safetensors")
        ours = model.published_state()
        assert ours.keys() == state.keys()
        for name in ours:
            if "mask_token" not in name:
                assert torch.equal(ours[name], state[name]), name
        again = small(version, str(file.parent))
        again.load_pretrained()
        encoder = MogeEncoder(
            hidden_width=32, depth=6, heads=4, layers=None, image_size=14 * 5, weights=str(file.parent)
        )
        encoder.load_pretrained()
        assert list(encoder.layers) == LAYERS[version]
        with torch.no_grad():
            assert torch.equal(again(pictures(42, 56)).points, model(pictures(42, 56)).points)
            assert torch.equal(encoder(pictures(42, 56)), model.encoder(pictures(42, 56)))


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    state = random_state(v1_shapes(**SMALL, **V1_SMALL))
    for change, message in (
        ({"head.projects.0.bias": None}, r"1 missing \['head.projects.0.bias'\]"),
        ({"head.projects.4.bias": torch.zeros(1)}, r"1 unexpected \['head.projects.4.bias'\]"),
        ({"head.projects.0.bias": torch.zeros(7)}, r"1 of another shape"),
        ({"image_std": None}, "how pixels are normalised"),
        ({"backbone.norm.bias": None}, r"1 missing"),
    ):
        broken = {name: value for name, value in {**state, **change}.items() if value is not None}
        with pytest.raises(CheckpointError, match=message):
            small(MogeV1, saved(tmp_path, broken, intermediate_layers=4)).load_pretrained()
    with pytest.raises(CheckpointError, match="sinh"):
        small(MogeV1, saved(tmp_path, state, intermediate_layers=4, remap_output="sinh")).load_pretrained()
    with pytest.raises(CheckpointError, match="do not fit MogeDecoder"):
        small(MogeV2, saved(tmp_path, state, intermediate_layers=4)).load_pretrained()


def test_detail_chooses_the_number_of_tokens(tmp_path: Path) -> None:
    assert [small(MogeV1, detail=detail).num_tokens for detail in (0, 3, 9)] == [1200, 1633, 2500]
    model, _ = small_v1(tmp_path, detail=0)
    assert model.num_tokens == 10  # 196 * 10 pixels of the older configuration
    with pytest.raises(ConfigError, match="0 to 9"):
        small(MogeV1, detail=10)
    with pytest.raises(ConfigError, match="fewest"):
        small(MogeV1, num_tokens_range=(5, 4))
    with pytest.raises(ShapeError, match="uint8"):
        model(torch.zeros(1, 3, 28, 28))

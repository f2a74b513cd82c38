"""MoGe v1 and v2 restated in straight lines, on the published names and shapes; for the tests of the networks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

Shapes = dict[str, tuple[int, ...]]
SMALL = {"width": 32, "depth": 6, "side": 5}
V1_SMALL = {"projection": 24, "upsampled": (64, 32, 16), "blocks": 2, "hidden_ratio": 2, "last": 8}
V1_LARGE = {"projection": 512, "upsampled": (256, 128, 64), "blocks": 2, "hidden_ratio": 2, "last": 32}
V2_SMALL = {"widths": (40, 24, 16, 12, 8), "scale": 20}
V2_LARGE = {"widths": (1024, 256, 128, 64, 32), "scale": 1024}
LAYERS_V1, LAYERS_V2 = [2, 3, 4, 5], [0, 2, 3, 5]


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
    layers = transformer_layers(state, "backbone.", x, LAYERS_V1)
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
    layers = transformer_layers(state, "encoder.backbone.", x, LAYERS_V2)
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

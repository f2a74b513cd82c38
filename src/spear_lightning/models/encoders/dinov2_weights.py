"""Names of DINOv2's weights: the original ones and those of transformers (4.x files and 5.x modules)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

QKV = re.compile(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)")

ORIGINAL_NAMES = (
    (re.compile(r"^cls_token$"), "embeddings.cls_token"),
    (re.compile(r"^pos_embed$"), "embeddings.position_embeddings"),
    (re.compile(r"^patch_embed\.proj\."), "embeddings.patch_embeddings.projection."),
    (re.compile(r"^norm\."), "layernorm."),
    (re.compile(r"^blocks\.(\d+)\.attn\.proj\."), r"encoder.layer.\1.attention.o_proj."),
    (re.compile(r"^blocks\.(\d+)\.ls([12])\.gamma$"), r"encoder.layer.\1.layer_scale\2.lambda1"),
    (re.compile(r"^blocks\.(\d+)\.(norm[12]|mlp\.fc[12])\."), r"encoder.layer.\1.\2."),
)
"""Original DINOv2 names -> names in `Dinov2Model`; packed query, key and value are split apart besides."""

HUB_NAMES = (
    # The second: as `PatchNamer` writes the encoder.
    (re.compile(r"^(dinov2|model)\."), ""),
    (re.compile(r"\.attention\.attention\.query\."), ".attention.q_proj."),
    (re.compile(r"\.attention\.attention\.key\."), ".attention.k_proj."),
    (re.compile(r"\.attention\.attention\.value\."), ".attention.v_proj."),
    (re.compile(r"\.attention\.output\.dense\."), ".attention.o_proj."),
)
"""Names in transformers' files -> names in `Dinov2Model`; its own names stay."""

MASK_TOKENS = ("mask_token", "embeddings.mask_token")
"""Replaces hidden patches in DINOv2's own training; no encoder of ours has it."""


def transformers_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """Rename DINOv2 weights to the names in transformers' `Dinov2Model` (without mask token).

    Args:
        state: Original names (`blocks.0.attn.qkv.weight`, ...) or those of transformers' files.

    Returns:
        The renamed weights; names of neither kind stay as they are, for a strict load to refuse.
    """
    table = ORIGINAL_NAMES if "pos_embed" in state else HUB_NAMES
    renamed: dict[str, Any] = {}
    for name, value in state.items():
        packed = QKV.fullmatch(name)
        if packed:
            # Rows are query, key and value, in this order, a third each.
            for part, third in zip("qkv", value.chunk(3), strict=True):
                renamed[f"encoder.layer.{packed[1]}.attention.{part}_proj.{packed[2]}"] = third
            continue
        for pattern, replacement in table:
            name = pattern.sub(replacement, name)
        if name not in MASK_TOKENS:
            renamed[name] = value
    return renamed


RUNTIME_NAMES = (
    (re.compile(r"^embeddings\.cls_token$"), "cls_token"),
    (re.compile(r"^embeddings\.position_embeddings$"), "pos_embed"),
    (re.compile(r"^embeddings\.patch_embeddings\.projection\."), "patch_embed.proj."),
    (re.compile(r"^layernorm\."), "norm."),
    (re.compile(r"^encoder\.layer\.(\d+)\.attention\.o_proj\."), r"blocks.\1.attn.proj."),
    (re.compile(r"^encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1$"), r"blocks.\1.ls\2.gamma"),
    (re.compile(r"^encoder\.layer\.(\d+)\.(norm[12]|mlp\.fc[12])\."), r"blocks.\1.\2."),
)
"""Names in `Dinov2Model` -> original ones; query, key and value are packed besides."""

QUERY = re.compile(r"encoder\.layer\.(\d+)\.attention\.q_proj\.(weight|bias)")


def original_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of `Dinov2Model` to those of the original DINOv2; undoes `transformers_names`.

    Args:
        state: Names of transformers' 5.x modules.

    Returns:
        The renamed weights, with a mask token of zeros, which the original always has.
    """
    renamed = {"mask_token": torch.zeros_like(state["embeddings.cls_token"][0])}
    for name, value in state.items():
        query = QUERY.fullmatch(name)
        if query:
            parts = [state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            renamed[f"blocks.{query[1]}.attn.qkv.{query[2]}"] = torch.cat(parts)
        elif ".k_proj." not in name and ".v_proj." not in name:
            for pattern, replacement in RUNTIME_NAMES:
                name = pattern.sub(replacement, name)
            renamed[name] = value
    return renamed

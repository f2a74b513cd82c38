"""SigLIP So400m/14, the semantic encoder of PaliGemma (spec section 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from spear_lightning.errors import CheckpointError
from spear_lightning.models.encoders.image_row import ATTENTION, by_size, embed_patches, in_one_row
from spear_lightning.models.encoders.positions import interpolate_positions
from spear_lightning.models.encoders.vision_transformer import VisionTransformer
from spear_lightning.models.encoders.weight_files import TRANSFORMERS_FILES, load_exactly, read_state_dict

TOWER_PREFIXES = (
    "model.vision_tower.vision_model.",
    "model.vision_tower.",
    "vision_tower.vision_model.",
    "vision_tower.",
    "vision_model.",
    "model.",
    "",
)
"""Where PaliGemma and SigLIP checkpoints of all ages keep the vision tower; the most specific first."""

POSITION_TABLE = "embeddings.position_embedding.weight"


class LinearThenBias(nn.Linear):
    """A linear layer that adds its bias after the product, so that a compiler can add it in the next kernel.

    cuBLAS adds no bias to a product of So400m's 4,304 columns: torch then writes it over the whole result first.
    """

    @classmethod
    def of(cls, layer: nn.Linear) -> LinearThenBias:
        """Return a layer of this kind with the parameters of another."""
        with torch.device("meta"):
            made = cls(layer.in_features, layer.out_features)
        made.weight, made.bias = layer.weight, layer.bias
        return made

    def forward(self, input: Tensor) -> Tensor:
        """Return the product (..., out_features) and the bias."""
        product = F.linear(input, self.weight)
        return product + self.bias.to(product.dtype)


class SiglipEncoder(VisionTransformer):
    """SigLIP's vision tower without its pooling head; tokens pass the final LayerNorm, as PaliGemma wants.

    The defaults are So400m/14 at 224 pixels, which PaliGemma 3B uses. Position embeddings are interpolated to
    the image's grid in float32.

    Args:
        width: Channels of the transformer and of an output token.
        depth: Blocks.
        heads: Attention heads.
        mlp_width: Channels inside the MLP.
        image_size: Side in pixels of the images the position table was trained on.
        weights: PaliGemma or SigLIP weights: hub id, folder or file; `None` keeps the random ones.
    """

    def __init__(
        self,
        width: int = 1152,
        depth: int = 27,
        heads: int = 16,
        mlp_width: int = 4304,
        image_size: int = 224,
        weights: str | None = None,
    ) -> None:
        super().__init__(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), weights=weights)
        config = SiglipVisionConfig(
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=mlp_width,
            image_size=image_size,
            patch_size=self.patch_size,
            vision_use_head=False,
        )
        self.model = SiglipVisionModel(config)
        self.model.set_attn_implementation(ATTENTION)
        for block in self.model.encoder.layers:
            block.mlp.fc1 = LinearThenBias.of(block.mlp.fc1)

    @property
    def width(self) -> int:
        """Channels of an output token."""
        return int(self.model.config.hidden_size)

    def encode_pixels(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        """Return tokens (X, N, width) of each size after the final LayerNorm."""
        embeddings = self.model.embeddings
        table_ND = embeddings.position_embedding.weight
        embedded = []
        for part, patches_XND in zip(pixels, embed_patches(pixels, embeddings.patch_embedding), strict=True):
            positions_ND = interpolate_positions(table_ND, *self.grid(*part.shape[2:]))
            embedded.append(patches_XND + positions_ND.to(patches_XND.dtype))
        row_1TD, groups = in_one_row(embedded)
        for block in self.model.encoder.layers:
            row_1TD = block(row_1TD, groups)
        return by_size(self.model.post_layernorm(row_1TD), groups)

    def load_pretrained(self) -> None:
        """Load `weights`; see `VisionEncoder.load_pretrained`."""
        if self.weights is not None:
            state, where = read_state_dict(self.weights, TRANSFORMERS_FILES)
            self.load_tower(state, where)

    def load_tower(self, state: Mapping[str, Any], where: object) -> None:
        """Load the vision tower out of a PaliGemma or SigLIP state dict.

        Args:
            state: All of the checkpoint's tensors.
            where: Their origin, for errors.

        Raises:
            CheckpointError: If there is no vision tower, or it has another architecture.
        """
        load_exactly(self.model, vision_tower(state, where), where)


def vision_tower(state: Mapping[str, Any], where: object) -> dict[str, Any]:
    """Return the vision tower's tensors under transformers' names, without the pooling head.

    Args:
        state: Tensors of a PaliGemma or SigLIP checkpoint.
        where: Their origin, for errors.

    Raises:
        CheckpointError: If there is no vision tower.
    """
    prefix = next((prefix for prefix in TOWER_PREFIXES if prefix + POSITION_TABLE in state), None)
    if prefix is None:
        raise CheckpointError(
            "The weights contain no SigLIP vision tower",
            where=where,
            found=sorted(state)[:3],
            expected=f"a tensor named `...{POSITION_TABLE}`",
        )
    tower = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
    parts = ("embeddings.", "encoder.", "post_layernorm.")
    # Old files also store the row numbers 0..N-1.
    return {
        name: value
        for name, value in tower.items()
        if name.startswith(parts) and name != "embeddings.position_ids"
    }

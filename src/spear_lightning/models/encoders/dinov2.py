"""DINOv2: features of chosen blocks of the vision transformer that MoGe builds on (spec section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from spear_lightning.errors import ConfigError
from spear_lightning.models.encoders.dinov2_weights import transformers_names
from spear_lightning.models.encoders.image_row import ATTENTION, by_size, embed_patches, in_one_row
from spear_lightning.models.encoders.positions import interpolate_positions
from spear_lightning.models.encoders.vision_transformer import VisionTransformer
from spear_lightning.models.encoders.weight_files import TRANSFORMERS_FILES, load_exactly, read_state_dict

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Dinov2Encoder(VisionTransformer):
    """DINOv2 without registers; tokens are the outputs of chosen blocks, concatenated along channels.

    The class token is dropped. The defaults are ViT-L/14.

    Args:
        hidden_width: Channels of the transformer. A token has `hidden_width * len(layers)`.
        depth: Blocks.
        heads: Attention heads.
        layers: 0-based blocks whose outputs make up a token, shallow to deep; `None` takes the last one.
        apply_norm: Apply the final LayerNorm to each of them, as DINOv2's `get_intermediate_layers` does.
        image_size: Side in pixels of the images the position table was trained on.
        interpolate_offset: See `interpolate_positions`. transformers leaves it out (0), the original DINOv2
            code adds 0.1; take what the weights were trained with.
        weights: DINOv2 weights under transformers' or the original names: hub id, folder or file; `None`
            keeps the random ones.
    """

    def __init__(
        self,
        hidden_width: int = 1024,
        depth: int = 24,
        heads: int = 16,
        layers: Sequence[int] | None = None,
        apply_norm: bool = True,
        image_size: int = 518,
        interpolate_offset: float = 0.0,
        weights: str | None = None,
    ) -> None:
        super().__init__(mean=IMAGENET_MEAN, std=IMAGENET_STD, weights=weights)
        self.depth = depth
        self.layers = self.checked_layers([depth - 1] if layers is None else layers)
        self.apply_norm = apply_norm
        self.interpolate_offset = interpolate_offset
        config = Dinov2Config(
            hidden_size=hidden_width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            image_size=image_size,
            patch_size=self.patch_size,
            use_mask_token=False,
        )
        self.model = Dinov2Model(config)
        self.model.set_attn_implementation(ATTENTION)

    @property
    def width(self) -> int:
        """Channels of an output token."""
        return int(self.model.config.hidden_size) * len(self.layers)

    def checked_layers(self, layers: Sequence[int]) -> tuple[int, ...]:
        """Return block numbers as a tuple.

        Raises:
            ConfigError: If they are none, not increasing, or not blocks of this transformer.
        """
        chosen = tuple(layers)
        if not chosen or list(chosen) != sorted(set(chosen)) or chosen[0] < 0 or chosen[-1] >= self.depth:
            raise ConfigError(
                "The encoder's layers are not blocks of its transformer",
                where=f"{type(self).__name__}.layers",
                found=list(chosen),
                expected=f"increasing numbers from 0 to {self.depth - 1}, at least one",
            )
        return chosen

    def encode_pixels(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        """Return tokens (X, N, hidden_width * len(layers)) of each size."""
        return [torch.cat([layer[:, 1:] for layer in layers], dim=-1) for layers in self._layer_outputs(pixels)]

    def layer_outputs(self, pixels_B3HW: Tensor) -> list[Tensor]:
        """Return the outputs (B, 1 + N, hidden_width) of each chosen block, shallow to deep; class token first.

        Args:
            pixels_B3HW: Normalised float pixels; H and W multiples of the patch size.
        """
        return self._layer_outputs([pixels_B3HW])[0]

    def _layer_outputs(self, pixels: Sequence[Tensor]) -> list[list[Tensor]]:
        row_1TD, groups = in_one_row(self._embedded(pixels))
        chosen = []
        for index, block in enumerate(self.model.encoder.layer[: self.layers[-1] + 1]):
            row_1TD = block(row_1TD, groups)
            if index in self.layers:
                chosen.append(by_size(self.model.layernorm(row_1TD) if self.apply_norm else row_1TD, groups))
        return [list(layers) for layers in zip(*chosen, strict=True)]

    def _embedded(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        """Return embedded tokens (X, 1 + N, hidden_width) of each size, class token first."""
        embeddings = self.model.embeddings
        class_position_1D, table_ND = embeddings.position_embeddings[0].split(
            [1, embeddings.position_embeddings.shape[1] - 1]
        )
        embedded = []
        patches = embed_patches(pixels, embeddings.patch_embeddings.projection)
        for part, patches_XND in zip(pixels, patches, strict=True):
            grid = self.grid(*part.shape[2:])
            positions_ND = interpolate_positions(table_ND, *grid, self.interpolate_offset)
            patches_XND = patches_XND + positions_ND.to(patches_XND.dtype)
            class_11D = (embeddings.cls_token + class_position_1D).to(patches_XND.dtype)
            embedded.append(torch.cat([class_11D.expand(len(patches_XND), -1, -1), patches_XND], dim=1))
        return embedded

    def unused_parameters(self) -> list[str]:
        """Names of parameters of blocks after the last chosen one, and of an unused final LayerNorm."""
        unused = tuple(f"model.encoder.layer.{index}." for index in range(self.layers[-1] + 1, self.depth))
        if not self.apply_norm:
            unused = (*unused, "model.layernorm.")
        return [name for name, _ in self.named_parameters() if name.startswith(unused)]

    def load_pretrained(self) -> None:
        """Load `weights`; see `VisionEncoder.load_pretrained`."""
        if self.weights is not None:
            state, where = read_state_dict(self.weights, TRANSFORMERS_FILES)
            load_exactly(self.model, transformers_names(state), where)

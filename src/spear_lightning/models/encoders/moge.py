"""MoGe's encoder: the geometry features that its decoder reads (spec section 3)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from spear_lightning.errors import CheckpointError
from spear_lightning.models.encoders.dinov2 import Dinov2Encoder
from spear_lightning.models.encoders.dinov2_weights import transformers_names
from spear_lightning.models.encoders.weight_files import load_exactly, read_state_dict

log = logging.getLogger(__name__)

BACKBONE_PREFIXES = ("backbone.", "encoder.backbone.")
"""Where MoGe v1 and v2 keep the vision transformer."""

DECODER_PREFIXES = (
    "image_mean",
    "image_std",
    "head.",
    "encoder.image_mean",
    "encoder.image_std",
    "encoder.output_projections.",
    "neck.",
    "points_head.",
    "mask_head.",
    "normal_head.",
    "scale_head.",
)
"""Everything else in MoGe's files: it turns features into points, which a policy does not need."""

DECODER_INPUTS = 4
"""Blocks that the decoder of every published MoGe reads."""


class MogeEncoder(Dinov2Encoder):
    """The vision transformer of MoGe, read where MoGe's decoder reads it.

    A DINOv2 of the original code (its interpolation adds 0.1 to the grid's sides), each chosen block's output
    after the final LayerNorm. The defaults are ViT-L/14 and MoGe v1 (`Ruicheng/moge-vitl`).

    Args:
        hidden_width: Channels of the transformer. A token has `hidden_width * len(layers)`.
        depth: Blocks.
        heads: Attention heads.
        layers: 0-based blocks that the decoder reads: 20, 21, 22, 23 in v1; 5, 11, 17, 23 in v2. `None` takes
            the four that the weights' own configuration names (until they are loaded: the last four) and
            keeps them in checkpoints.
        image_size: Side in pixels of the images the position table was trained on.
        weights: MoGe's `model.pt`: hub id, folder or file; `None` keeps the random ones.
    """

    layer_numbers: torch.Tensor

    def __init__(
        self,
        hidden_width: int = 1024,
        depth: int = 24,
        heads: int = 16,
        layers: Sequence[int] | None = (20, 21, 22, 23),
        image_size: int = 518,
        weights: str | None = None,
    ) -> None:
        super().__init__(
            hidden_width=hidden_width,
            depth=depth,
            heads=heads,
            layers=range(depth - DECODER_INPUTS, depth) if layers is None else layers,
            image_size=image_size,
            interpolate_offset=0.1,
            weights=weights,
        )
        self.layers_from_weights = layers is None
        if self.layers_from_weights:
            self.register_buffer("layer_numbers", torch.tensor(self.layers))
            self.register_load_state_dict_post_hook(MogeEncoder._take_layer_numbers)

    def _take_layer_numbers(self, _: object = None) -> None:
        self.layers = self.checked_layers(self.layer_numbers.tolist())

    def load_pretrained(self) -> None:
        """Load `weights`; see `VisionEncoder.load_pretrained`."""
        if self.weights is None:
            return
        file, where = read_state_dict(self.weights, ("model.pt",))
        state, config = file.get("model"), file.get("model_config")
        if not isinstance(state, Mapping) or not isinstance(config, Mapping):
            raise CheckpointError(
                "The file is not a MoGe checkpoint",
                where=where,
                found=sorted(map(str, file))[:5],
                expected="entries `model` and `model_config`",
            )
        load_exactly(self.model, transformers_names(backbone(state, where)), where)
        published = self.published_layers(config)
        if self.layers_from_weights:
            self._keep_layers(published, where)
        elif published != self.layers:
            log.warning(
                "%s: MoGe's decoder reads blocks %s, the encoder is set to %s", where, published, self.layers
            )

    def published_layers(self, config: Mapping[str, Any]) -> tuple[int, ...]:
        """Return the blocks that MoGe's decoder reads; none if the configuration does not say.

        Args:
            config: The checkpoint's `model_config`; v1 keeps the entry at the top, v2 under `encoder`. A
                number means that many last blocks.
        """
        encoder = config.get("encoder")
        layers = (encoder if isinstance(encoder, Mapping) else config).get("intermediate_layers", ())
        return tuple(range(self.depth - layers, self.depth) if isinstance(layers, int) else layers)

    def _keep_layers(self, published: tuple[int, ...], where: object) -> None:
        if len(published) != DECODER_INPUTS:
            raise CheckpointError(
                "The MoGe checkpoint does not name the blocks that its decoder reads",
                where=where,
                found=f"intermediate_layers: {list(published)}",
                expected=f"{DECODER_INPUTS} blocks",
                remedy="set the encoder's `layers`",
            )
        self.layer_numbers.copy_(torch.tensor(published))
        self._take_layer_numbers()


def backbone(state: Mapping[str, Any], where: object) -> dict[str, Any]:
    """Return the vision transformer's tensors out of those of MoGe, under DINOv2's original names.

    Args:
        state: Tensors of MoGe v1 or v2.
        where: Their origin, for errors.

    Raises:
        CheckpointError: If there is no transformer, or a tensor belongs to neither it nor the decoder.
    """
    prefix = next((prefix for prefix in BACKBONE_PREFIXES if f"{prefix}pos_embed" in state), None)
    unknown = [name for name in state if not name.startswith((*BACKBONE_PREFIXES, *DECODER_PREFIXES))]
    if prefix is None or unknown:
        raise CheckpointError(
            "The weights are not laid out as MoGe's",
            where=where,
            found=f"{len(unknown)} unknown names {sorted(unknown)[:3]}" if unknown else "no `pos_embed`",
            expected=f"tensors under one of {list(BACKBONE_PREFIXES)}, besides those of the decoder",
        )
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}

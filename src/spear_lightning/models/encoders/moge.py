"""MoGe's encoder: the geometry features that its decoder reads (spec section 3)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from spear_lightning.errors import CheckpointError
from spear_lightning.models.encoders.dinov2 import Dinov2Encoder
from spear_lightning.models.encoders.dinov2_weights import transformers_names
from spear_lightning.models.encoders.moge_weights import MogeFile, read_moge
from spear_lightning.models.encoders.weight_files import load_exactly

log = logging.getLogger(__name__)

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
        weights: MoGe's weights, published or ours: hub id, folder or file; `None` keeps the random ones.
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
        if self.layer_numbers.is_meta:
            return  # another process has the values
        self.layers = self.checked_layers(self.layer_numbers.tolist())

    def load_pretrained(self) -> None:
        """Load `weights`; see `VisionEncoder.load_pretrained`."""
        if self.weights is None:
            return
        self.take(read_moge(self.weights))

    def take(self, file: MogeFile) -> None:
        """Load the transformer out of a MoGe file, and the numbers of the layers where they are taken from it.

        Args:
            file: The file; its decoder is left alone.

        Raises:
            CheckpointError: If it does not fit.
        """
        load_exactly(self.model, transformers_names(file.backbone()), file.where)
        published = self.published_layers(file.config)
        if self.layers_from_weights:
            self._keep_layers(published, file.where)
        elif published != self.layers:
            log.warning(
                "%s: MoGe's decoder reads blocks %s, the encoder is set to %s", file.where, published, self.layers
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

"""MoGe's files: a transformer and a decoder under published names, and the configuration they were built with.

Published files are torch dictionaries (`model.pt`) with the entries `model` and `model_config`. Ours are
safetensors with the same names, and the configuration as JSON in the header, so that either can stand in for the
other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from spear_lightning.errors import CheckpointError
from spear_lightning.models.encoders.weight_files import read_state_dict, write_weights

MOGE_FILES = ("model.pt", "model.safetensors")
"""Names of MoGe's files in a folder or on the hub, in the order they are looked for."""

CONFIG_ENTRY = "model_config"
"""Where both kinds of file keep the configuration."""

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


@dataclass(frozen=True)
class MogeFile:
    """What a MoGe file holds.

    Attributes:
        state: Name -> tensor, under the published names.
        config: The constructor arguments of the published code; may hold more than we know of.
        where: The file, for errors.
    """

    state: Mapping[str, Any]
    config: Mapping[str, Any]
    where: str

    def backbone(self) -> dict[str, Any]:
        """Return the vision transformer's tensors under DINOv2's original names.

        Raises:
            CheckpointError: If there is no transformer, or a tensor belongs to neither it nor the decoder.
        """
        prefix = next((prefix for prefix in BACKBONE_PREFIXES if f"{prefix}pos_embed" in self.state), None)
        unknown = [name for name in self.state if not name.startswith((*BACKBONE_PREFIXES, *DECODER_PREFIXES))]
        if prefix is None or unknown:
            raise CheckpointError(
                "The weights are not laid out as MoGe's",
                where=self.where,
                found=f"{len(unknown)} unknown names {sorted(unknown)[:3]}" if unknown else "no `pos_embed`",
                expected=f"tensors under one of {list(BACKBONE_PREFIXES)}, besides those of the decoder",
            )
        return {name[len(prefix) :]: value for name, value in self.state.items() if name.startswith(prefix)}

    def decoder(self) -> dict[str, Any]:
        """Return all other tensors, under their published names."""
        return {name: value for name, value in self.state.items() if not name.startswith(BACKBONE_PREFIXES)}


def read_moge(weights: str) -> MogeFile:
    """Read MoGe's weights.

    Args:
        weights: A hub id such as `Ruicheng/moge-vitl`, a folder, or a file, published or ours.

    Raises:
        CheckpointError: If there is no such file, or it is not laid out as MoGe's.
    """
    file, where = read_state_dict(weights, MOGE_FILES)
    if where.endswith(".safetensors"):
        file = {"model": file, CONFIG_ENTRY: _config_in_header(where)}
    state, config = file.get("model"), file.get(CONFIG_ENTRY)
    if not isinstance(state, Mapping) or not isinstance(config, Mapping):
        raise CheckpointError(
            "The file is not a MoGe checkpoint",
            where=where,
            found=sorted(map(str, file))[:5],
            expected="entries `model` and `model_config`",
        )
    return MogeFile(state, config, where)


def write_moge(path: str | Path, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Path:
    """Write a MoGe file of ours, whole or not at all.

    Args:
        path: A file name that ends in .safetensors.
        state: Name -> tensor, under the published names.
        config: The configuration, as in published files; plain values.

    Returns:
        The file.
    """
    return write_weights(path, state, {CONFIG_ENTRY: json.dumps(dict(config))})


def _config_in_header(where: str) -> Any:
    from safetensors import safe_open

    with safe_open(where, framework="pt") as file:
        header = file.metadata() or {}
    try:
        return json.loads(header[CONFIG_ENTRY])
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            "The file is not a MoGe checkpoint",
            where=where,
            found=f"header entries {sorted(header)}",
            expected=f"`{CONFIG_ENTRY}` as JSON in the header",
            remedy="write it with `Moge.save` (`spear_lightning.models.moge`)",
        ) from error

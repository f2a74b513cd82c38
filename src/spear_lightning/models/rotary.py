"""Rotary position embeddings (RoPE) as Gemma uses them, always in float32.

transformers keeps the frequencies in a buffer, which a cast of the model to bfloat16 rounds to 3 digits; here
they are computed where they are needed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers.models.gemma.modeling_gemma import rotate_half

THETA = 10000.0
"""Base of the geometric series of wavelengths."""


class Rotation(NamedTuple):
    """Cosine and sine of the angles of all positions: float32 (B, 1, L, head_dim) each."""

    cosine: Tensor
    sine: Tensor


def rotation_at(positions_BL: Tensor, head_dim: int) -> Rotation:
    """Return the rotation of every position.

    Args:
        positions_BL: int64 (B, L).
        head_dim: Channels of an attention head; even.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions_BL.device, dtype=torch.float32) / head_dim
    angles_BLh = positions_BL[..., None].float() * THETA**-exponents
    angles_B1Ld = torch.cat([angles_BLh, angles_BLh], dim=-1)[:, None]
    return Rotation(angles_B1Ld.cos(), angles_B1Ld.sin())


def rotate(heads_BHLd: Tensor, rotation: Rotation) -> Tensor:
    """Rotate queries or keys (B, heads, L, head_dim); computed in float32, returned in their own type."""
    wide = heads_BHLd.float()
    return (wide * rotation.cosine + rotate_half(wide) * rotation.sine).to(heads_BHLd.dtype)

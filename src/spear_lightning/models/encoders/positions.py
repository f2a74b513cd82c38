"""Interpolation of learned position tables to another token grid."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def interpolate_positions(table_ND: Tensor, rows: int, columns: int, offset: float = 0.0) -> Tensor:
    """Resample a square table of position embeddings to a token grid, in float32.

    Bicubic, corners not aligned, no antialiasing: as SigLIP in transformers and as the original DINOv2.

    Args:
        table_ND: (side * side, D) embeddings of the grid the model was trained on, row by row.
        rows: Rows of the wanted grid.
        columns: Columns of the wanted grid.
        offset: What the original DINOv2 adds to the wanted sides before it divides by the trained ones (0.1).
            It was meant against rounding and shifts every sample a little: weights trained with it want it.

    Returns:
        (rows * columns, D) in the table's type, row by row.
    """
    side = math.isqrt(table_ND.shape[0])
    if rows == columns == side:
        return table_ND
    # The resampling of one column of the table is a small matrix. CUDA's own kernel has a thread for each of a few
    # hundred places, which works through all channels: milliseconds, and as many again backward.
    with torch.autocast(table_ND.device.type, enabled=False):
        down_Rs, across_Ct = (_resampling(side, size, offset, table_ND.device) for size in (rows, columns))
        resized_RtD = (down_Rs @ table_ND.float().reshape(side, -1)).unflatten(1, (side, -1))
        return (across_Ct @ resized_RtD).flatten(0, 1).to(table_ND.dtype)


def _resampling(side: int, size: int, offset: float, device: torch.device) -> Tensor:
    """Return the weights (size, side) of a row's places for the places of a resampled row."""
    unit_1sh1 = torch.eye(side, device=device)[None, :, :, None]
    if offset:
        scale = ((size + offset) / side, 1.0)
        resized_1sR1 = F.interpolate(unit_1sh1, scale_factor=scale, mode="bicubic")
    else:
        resized_1sR1 = F.interpolate(unit_1sh1, size=(size, 1), mode="bicubic")
    return resized_1sR1[0, :, :, 0].T

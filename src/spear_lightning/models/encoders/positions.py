"""Interpolation of learned position tables to another token grid."""

from __future__ import annotations

import math

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
    square_1Dhw = table_ND.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    if offset:
        scale = ((rows + offset) / side, (columns + offset) / side)
        resized_1Dhw = F.interpolate(square_1Dhw, scale_factor=scale, mode="bicubic")
    else:
        resized_1Dhw = F.interpolate(square_1Dhw, size=(rows, columns), mode="bicubic")
    return resized_1Dhw.flatten(2).transpose(1, 2)[0].to(table_ND.dtype)

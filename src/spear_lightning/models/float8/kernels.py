"""What `rounding` describes, computed by `tiles`, which read and write every number once."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from spear_lightning.errors import ShapeError
from spear_lightning.models.float8 import tiles
from spear_lightning.models.float8.rounding import FORWARD, GRADIENT, MULTIPLE, HiddenGradients, Largest

_TURNED = {"ROWS": 128, "COLUMNS": 64, "num_warps": 8}
"""A tile that is turned, and the groups of 32 threads that do it."""

_GRADIENTS = {"ROWS": 64, "COLUMNS": 64, "num_warps": 4}
"""The same where five tiles are in registers at once."""

_FLAT = {"ROWS": 16, "COLUMNS": 256, "num_warps": 4}
"""A tile that is not turned."""

ASSEMBLY = True
"""Whether bytes are put together by instructions of NVIDIA's, which Triton's interpreter does not know."""


def _end(kind: torch.dtype) -> float:
    return torch.finfo(kind).max


def _grid(rows: int, columns: int, tile: dict[str, int]) -> tuple[int, int]:
    return triton.cdiv(columns, tile["COLUMNS"]), triton.cdiv(rows, tile["ROWS"])


def _empty_turned(rows: int, columns: int, like: Tensor, kind: torch.dtype) -> Tensor:
    """Return room for a turned matrix.

    Raises:
        ShapeError: If the number of rows is no multiple of 16.
    """
    if rows % MULTIPLE:
        raise ShapeError("A matrix that is turned needs rows that are a multiple of 16", found=rows)
    return torch.empty(columns, rows, dtype=kind, device=like.device)


def round_both_ways(values_MN: Tensor, unit: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """See `rounding.round_both_ways`."""
    rows, columns = values_MN.shape
    small = torch.empty(rows, columns, dtype=kind, device=values_MN.device)
    turned = _empty_turned(rows, columns, values_MN, kind)
    tiles.round_both_ways[_grid(rows, columns, _TURNED)](
        values_MN.contiguous(), unit, small, turned, rows, columns, END=_end(kind), ASSEMBLY=ASSEMBLY, **_TURNED
    )
    return small, turned


def largest_of_hidden(gate_TF: Tensor, up_TF: Tensor | None, bias_F: Tensor | None) -> Largest:
    """See `rounding.largest_of_hidden`."""
    rows, columns = gate_TF.shape
    _, programs = _grid(rows, columns, _FLAT)
    largest = torch.empty(3, programs, dtype=torch.float32, device=gate_TF.device)
    gated = up_TF is not None
    tiles.largest_of_hidden[(programs,)](gate_TF, up_TF, bias_F, largest, rows, columns, GATED=gated, **_FLAT)
    # Not views of one tensor: a compiler may let units take their place, and cuBLAS wants those at multiples of 16
    # bytes.
    hidden, gate, up = (row.amax() for row in largest)
    return Largest(hidden, gate, up if gated else torch.ones_like(up))


def round_hidden(gate_TF: Tensor, up_TF: Tensor | None, bias_F: Tensor | None, unit: Tensor) -> Tensor:
    """See `rounding.round_hidden`."""
    rows, columns = gate_TF.shape
    small = torch.empty(rows, columns, dtype=FORWARD, device=gate_TF.device)
    gated = up_TF is not None
    tiles.round_hidden[_grid(rows, columns, _FLAT)](
        gate_TF, up_TF, bias_F, unit, small, rows, columns, GATED=gated, END=_end(FORWARD), **_FLAT
    )
    return small


def round_gradients(
    gradient_TF: Tensor,
    gate_TF: Tensor,
    up_TF: Tensor | None,
    bias_F: Tensor | None,
    unit: Tensor,
    gate_unit: Tensor,
    up_unit: Tensor,
) -> HiddenGradients:
    """See `rounding.round_gradients`."""
    rows, columns = gate_TF.shape
    gated = up_TF is not None
    grid = _grid(rows, columns, _GRADIENTS)
    hidden_FT = _empty_turned(rows, columns, gate_TF, FORWARD)
    gate_FT = _empty_turned(rows, columns, gate_TF, GRADIENT)
    up_FT = _empty_turned(rows, columns, gate_TF, GRADIENT) if gated else None
    gate_small = torch.empty(rows, columns, dtype=GRADIENT, device=gate_TF.device)
    up_small = torch.empty_like(gate_small) if gated else None
    sums = None if gated else torch.empty(grid[1], columns, device=gate_TF.device)
    tiles.round_gradients[grid](
        *(gradient_TF.contiguous(), gate_TF, up_TF, bias_F, unit, gate_unit, up_unit),
        *(gate_small, up_small, hidden_FT, gate_FT, up_FT, sums, rows, columns),
        GATED=gated,
        FORWARD_END=_end(FORWARD),
        GRADIENT_END=_end(GRADIENT),
        ASSEMBLY=ASSEMBLY,
        **_GRADIENTS,
    )
    bias = None if sums is None else sums.sum(0)
    return HiddenGradients(hidden_FT, gate_small, gate_FT, up_small, up_FT, bias)


def product(
    a_MK: Tensor, b_NK: Tensor, a_unit: Tensor, b_unit: Tensor, kind: torch.dtype, fast: bool = False
) -> Tensor:
    """See `rounding.product`; `fast` adds up in fewer bits."""
    return torch._scaled_mm(a_MK, b_NK.t(), a_unit, b_unit, out_dtype=kind, use_fast_accum=fast)

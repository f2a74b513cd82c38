"""Masks as run lengths, as COCO counts them: column by column, beginning with a (possibly empty) run of zeros."""

from __future__ import annotations

import numpy as np

from spear_lightning.errors import DataError


def encode_mask(mask_HW: np.ndarray) -> np.ndarray:
    """Return the run lengths of a mask.

    Args:
        mask_HW: bool (H, W).

    Returns:
        int64 (R,): lengths of alternating runs of False and True in column-major order; the first may be 0.
    """
    mask_HW = np.asarray(mask_HW, bool)
    if mask_HW.size == 0:
        return np.zeros(0, np.int64)
    columns = np.flatnonzero(mask_HW.any(0))
    if not len(columns):
        return np.array([mask_HW.size])
    # Only the columns that the mask touches are looked at: zeros to their sides belong to the outermost runs.
    first, stop = columns[0], columns[-1] + 1
    flat = mask_HW[:, first:stop].ravel(order="F")
    changes = np.flatnonzero(np.diff(flat, prepend=False, append=False))
    counts = np.diff(changes + first * len(mask_HW), prepend=0, append=mask_HW.size)
    return counts if counts[-1] else counts[:-1]


def decode_mask(counts_R: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the mask of run lengths (see `encode_mask`).

    Args:
        counts_R: (R,) run lengths.
        height: Rows.
        width: Columns.

    Returns:
        bool (height, width).

    Raises:
        DataError: If the runs do not cover exactly the image.
    """
    counts = np.asarray(counts_R, np.int64)
    total = int(counts.sum())
    if total != height * width or (counts < 0).any():
        raise DataError(
            "The run lengths of a mask do not fit its image",
            where="decode_mask",
            found=f"{total} pixels",
            expected=f"{height} x {width} = {height * width} pixels",
        )
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape((height, width), order="F")

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
    flat = np.asarray(mask_HW, bool).ravel(order="F")
    if flat.size == 0:
        return np.zeros(0, np.int64)
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    starts = (
        np.concatenate([[0], changes, [flat.size]])
        if not flat[0]
        else np.concatenate([[0, 0], changes, [flat.size]])
    )
    return np.diff(starts)


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

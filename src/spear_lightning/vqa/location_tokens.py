"""PaliGemma's own tokens for image positions, `<loc0000>` ... `<loc1023>`: a position is two, y first, then x.

The image's height and width are each divided into 1024 equal bins; a token means the middle of its bin.
"""

from __future__ import annotations

import re

import numpy as np

from spear_lightning.errors import DataError

BINS = 1024

TOKEN = re.compile(r"<loc(\d{4})>")


def token_names() -> list[str]:
    """Return the names of all location tokens, in order."""
    return [f"<loc{index:04d}>" for index in range(BINS)]


def location_text(pixels_N2: np.ndarray, height: int, width: int) -> str:
    """Return image positions as tokens, y before x.

    Args:
        pixels_N2: (N, 2) pixel coordinates (u, v), inside the image.
        height: Rows of the image.
        width: Columns of the image.

    Raises:
        DataError: If a position is outside the image: its tokens would be those of another place.
    """
    share = np.asarray(pixels_N2, np.float64)[:, ::-1] / [height, width]
    if not ((share >= 0) & (share <= 1)).all():
        raise DataError(
            "A position lies outside the image",
            where="location_text",
            found=np.asarray(pixels_N2).tolist(),
            expected=f"(u, v) within {width} x {height}",
        )
    bins = np.minimum(share * BINS, BINS - 1).astype(np.int64)
    return "".join(f"<loc{index:04d}>" for index in bins.ravel().tolist())


def locations(text: str, height: int, width: int) -> np.ndarray | None:
    """Return the positions (N, 2), (u, v) in pixels, of a text of nothing but location tokens, else None."""
    bins = np.array(TOKEN.findall(text), dtype=np.int64)
    if TOKEN.sub("", text).strip() or len(bins) % 2 or (bins >= BINS).any():
        return None
    return ((bins.reshape(-1, 2) + 0.5) / BINS * [height, width])[:, ::-1]

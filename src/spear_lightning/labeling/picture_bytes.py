"""Encoded pictures as labels need them: upright, and red first.

A label's image is read by many: detectors, also those of others who are sent its bytes, training, reports. What a
tag or a registry says of the pixels is therefore done once, before all steps, so that all see the same.
"""

from __future__ import annotations

import io
import struct

import numpy as np
import simplejpeg

from spear_lightning.robot_data.images import PNG_START, decode_image

QUALITY = 95
"""Of JPEGs that are encoded anew, with colours in full resolution."""


def upright(data: bytes) -> bytes:
    """Return a picture as its orientation tag (EXIF) says that it is to be seen.

    Args:
        data: JPEG or PNG bytes.

    Returns:
        The same bytes where there is no such tag or they cannot be read; else new ones without it.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as picture:
            # Pillow's own way writes all other tags anew, and breaks on the odd ones that cameras leave behind.
            turn = _TURNS.get(picture.getexif().get(_ORIENTATION, 1))
            if turn is None:
                return data
            turned_HW3 = np.asarray(picture.convert("RGB").transpose(Image.Transpose[turn]))
    except (OSError, ValueError, TypeError, LookupError, SyntaxError, struct.error, Image.DecompressionBombError):
        # The step that decodes says what is wrong.
        return data
    return _encoded_like(data, turned_HW3)


_ORIENTATION = 0x0112

_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
"""Value of the tag -> what turns the stored pixels upright."""


def red_first(data: bytes, where: object) -> bytes:
    """Return a picture that was encoded with red and blue exchanged as one that shows its colours.

    Args:
        data: JPEG or PNG bytes.
        where: What to name in an error.

    Raises:
        BrokenImage: If the bytes are neither, or damaged.
    """
    return _encoded_like(data, decode_image(data, where, blue_first=True))


def _encoded_like(data: bytes, pixels_HW3: np.ndarray) -> bytes:
    """Return pixels in the format of a picture."""
    pixels_HW3 = np.ascontiguousarray(pixels_HW3)
    if not data.startswith(PNG_START):
        return simplejpeg.encode_jpeg(pixels_HW3, quality=QUALITY, colorspace="RGB", colorsubsampling="444")
    from PIL import Image

    encoded = io.BytesIO()
    Image.fromarray(pixels_HW3).save(encoded, "PNG")
    return encoded.getvalue()

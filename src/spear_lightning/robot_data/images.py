"""Encoded camera frames -> uint8 pixels at the size the model sees: cropped or padded, never stretched."""

from __future__ import annotations

import io
import logging
from dataclasses import dataclass
from typing import Literal

import numpy as np
import simplejpeg
import torch
from torch import Tensor

from spear_lightning.errors import DataError
from spear_lightning.geometry.cameras import check_divisible, fit_window

JPEG_START, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
PNG_START = b"\x89PNG\r\n\x1a\n"

BLANK_SPREAD = 8
"""A picture whose values all lie within this many of 255 levels shows nothing."""


@dataclass(frozen=True)
class CameraSpec:
    """The size at which the model sees a camera.

    Attributes:
        width: Pixels, a multiple of 14 (SPEAR-1: 280 for external cameras, 112 for the wrist).
        height: Pixels, a multiple of 14 (SPEAR-1: 210 and 112).
        fit: How other aspect ratios are met: "crop" cuts the centre out, "pad" adds black bars. Never
            stretched: depth depends on the aspect ratio.
        source: Camera of the data set's registry entry; default: the camera of the same name.
    """

    width: int
    height: int
    fit: Literal["crop", "pad"] = "crop"
    source: str | None = None

    def __post_init__(self) -> None:
        check_divisible(self.height, self.width, where="camera size")


def image_format(data: bytes) -> Literal["jpeg", "png", "broken"]:
    """Return the format by the first and last bytes: cheap enough for every frame of a data set."""
    if data.startswith(JPEG_START):
        # Some encoders pad the end with zeros.
        return "jpeg" if JPEG_END in data[-64:] else "broken"
    if data.startswith(PNG_START):
        return "png" if b"IEND" in data[-12:] else "broken"
    return "broken"


def decode_image(
    data: bytes, where: object, camera: CameraSpec | None = None, blue_first: bool = False
) -> np.ndarray:
    """Decode JPEG (libjpeg-turbo) or PNG.

    Args:
        data: The encoded image.
        where: What to name in an error.
        camera: If given, a JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that is still enough for this
            camera (see `reduction`): less work, and pixels that differ a little.
        blue_first: Whether the picture was encoded with red and blue exchanged.

    Returns:
        uint8 RGB (height, width, 3).

    Raises:
        BrokenImage: If the bytes are neither, or damaged.
    """
    try:
        if data.startswith(JPEG_START):
            colours = "BGR" if blue_first else "RGB"
            if camera is None:
                return simplejpeg.decode_jpeg(data, colorspace=colours)
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
            factor = reduction(height, width, camera)
            smallest = {"min_height": -(-height // factor), "min_width": -(-width // factor)}
            return simplejpeg.decode_jpeg(data, colorspace=colours, min_factor=factor, **smallest)
        if data.startswith(PNG_START):
            pixels_HW3 = _decode_png(data)
            return np.ascontiguousarray(pixels_HW3[..., ::-1]) if blue_first else pixels_HW3
    except (ValueError, OSError, SyntaxError) as error:
        raise _broken(where, error) from error
    raise _broken(where, f"{len(data)} bytes that start with {data[:8]!r}")


def _decode_png(data: bytes) -> np.ndarray:
    from PIL import Image

    try:
        return np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    except Image.DecompressionBombError as error:
        raise OSError(error) from None


class BrokenImage(DataError):
    """A camera frame that cannot be decoded, in a shard that is whole."""


class BrokenImages:
    """Counts the pictures of this process that could not be decoded, and says the first one aloud.

    Args:
        log: Where to say it.
        consequence: What happens to such a sample.

    Attributes:
        count: How many there were so far.
    """

    def __init__(self, log: logging.Logger, consequence: str) -> None:
        self._log, self._consequence = log, consequence
        self.count = 0

    def note(self, error: BrokenImage) -> None:
        """Count one."""
        self.count += 1
        if self.count == 1:
            self._log.warning("%s\n  %s; further ones are not reported.", error, self._consequence)


def _broken(where: object, found: object) -> BrokenImage:
    return BrokenImage(
        "A camera frame cannot be decoded",
        where=where,
        found=found,
        expected="a whole JPEG or PNG",
        remedy="index the data set again with --verify_images, which leaves such frames out",
    )


def is_blank(image_HW3: np.ndarray) -> bool:
    """Return whether a picture shows nothing: data sets store such dummies for cameras that were not there."""
    return int(image_HW3.max()) - int(image_HW3.min()) <= BLANK_SPREAD


def reduction(height: int, width: int, camera: CameraSpec) -> int:
    """Return the largest of 1, 2, 4, 8 by which a picture may shrink without losing what a camera shows.

    JPEG stores 8x8 blocks of frequencies; leaving the high ones out decodes at a fraction of the size, with less
    work than decoding all and averaging. What is left to do is then resized with antialiasing as ever.

    Args:
        height: Rows of the picture.
        width: Columns.
        camera: What it becomes: the part that is shown keeps at least the pixels of the target.
    """
    window = fit_window(height, width, camera.height, camera.width, camera.fit)
    source, target = window.source, window.destination
    room = min(source.height / target.height, source.width / target.width)
    return max(factor for factor in (1, 2, 4, 8) if factor <= max(room, 1))


def fit_image(image_HW3: np.ndarray, camera: CameraSpec) -> Tensor:
    """Crop or pad a picture to the camera's aspect ratio and resize it with antialiasing.

    Args:
        image_HW3: uint8 RGB (height, width, 3), any size.
        camera: Target size and fit.

    Returns:
        uint8 (3, camera.height, camera.width).
    """
    fitted = torch.empty((camera.height, camera.width, 3), dtype=torch.uint8).permute(2, 0, 1)
    fit_image_into(image_HW3, camera, fitted)
    return fitted


def fit_image_into(image_HW3: np.ndarray, camera: CameraSpec, out_3HW: Tensor) -> None:
    """Do as `fit_image`, into memory that is there, such as a picture's place in a batch.

    Args:
        image_HW3: uint8 RGB (height, width, 3), any size.
        camera: Target size and fit.
        out_3HW: uint8 (3, camera.height, camera.width), channels-last.
    """
    height, width = image_HW3.shape[:2]
    window = fit_window(height, width, camera.height, camera.width, camera.fit)
    source, target = window.source, window.destination
    cut = image_HW3[source.top : source.top + source.height, source.left : source.left + source.width]
    # torch resizes channels-last uint8 about three times as fast as planes, if it recognises it: rows must follow
    # one another, and the stride of the batch dimension must say so too.
    pixels = torch.from_numpy(np.ascontiguousarray(cut)).unsqueeze(0).permute(0, 3, 1, 2)
    # Taking the batch dimension before the permutation gives it the stride of a whole picture.
    out = out_3HW.permute(1, 2, 0).unsqueeze(0).permute(0, 3, 1, 2)
    whole = (target.height, target.width) == (camera.height, camera.width)
    if not whole:
        out.zero_()
    size = [target.height, target.width]
    if (source.height, source.width) == (target.height, target.width):
        resized = pixels
    elif whole:
        torch.ops.aten._upsample_bilinear2d_aa.out(pixels, size, False, None, None, out=out)
        return
    else:
        resized = torch.ops.aten._upsample_bilinear2d_aa(pixels, size, False, None, None)
    rows, columns = (
        slice(target.top, target.top + target.height),
        slice(target.left, target.left + target.width),
    )
    out[:, :, rows, columns] = resized

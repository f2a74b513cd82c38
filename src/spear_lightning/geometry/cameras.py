"""How images are cut or padded to the size a model sees, and what that does to camera intrinsics.

Pixel coordinates are (u, v), u to the right and v down, with the origin at the top-left corner of the
top-left pixel, so that pixel centres are at +0.5. The camera frame is OpenCV's: x right, y down, z forward
(spec section 2). Images are never stretched: the geometry encoder reads depth off the aspect ratio (spec
section 3).

torch is imported where it is called: a process that simulates needs its cameras, and no tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from spear_lightning.errors import ConfigError, ShapeError

if TYPE_CHECKING:
    from torch import Tensor

Fit = Literal["crop", "pad"]
"""How an image of another aspect ratio is made to fit: cut at the sides, or surrounded by black bars."""


class Rectangle(NamedTuple):
    """A rectangle of whole pixels.

    Attributes:
        top: First row.
        left: First column.
        height: Rows.
        width: Columns.
    """

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Window:
    """Which part of a source image goes where in the output image.

    Attributes:
        source: The part that is read, in source pixels.
        destination: Where it is written after resizing, in output pixels; the rest of the output is black.
    """

    source: Rectangle
    destination: Rectangle

    @property
    def scale(self) -> tuple[float, float]:
        """Output pixels per source pixel along (u, v); equal up to the rounding to whole pixels."""
        return self.destination.width / self.source.width, self.destination.height / self.source.height

    def to_output(self, points: Tensor) -> Tensor:
        """Map pixel coordinates (..., 2) of the source to pixel coordinates of the output."""
        points = points if points.is_floating_point() else points.float()
        scale = points.new_tensor(self.scale)
        return (points - _corner(self.source, points)) * scale + _corner(self.destination, points)

    def to_source(self, points: Tensor) -> Tensor:
        """Map pixel coordinates (..., 2) of the output to pixel coordinates of the source."""
        points = points if points.is_floating_point() else points.float()
        scale = points.new_tensor(self.scale)
        return (points - _corner(self.destination, points)) / scale + _corner(self.source, points)


def _corner(rectangle: Rectangle, like: Tensor) -> Tensor:
    return like.new_tensor([rectangle.left, rectangle.top])


def fit_window(source_height: int, source_width: int, height: int, width: int, fit: Fit) -> Window:
    """Decide how an image is fitted into another size; it is not stretched but for rounding to pixels.

    Args:
        source_height: Rows of the source image.
        source_width: Columns of the source image.
        height: Rows of the output image.
        width: Columns of the output image.
        fit: "crop": the largest centred part of the output's aspect ratio fills the output; "pad": the whole
            image, centred, with black bars.

    Returns:
        The source and destination rectangles.

    Raises:
        ShapeError: If a size is not positive.
        ConfigError: If the fit is neither.
    """
    sizes = (source_height, source_width, height, width)
    if min(sizes) < 1:
        raise ShapeError("An image must have at least one pixel", where="fit_window", found=sizes)
    if fit not in _FITS:
        raise ConfigError("Unknown way to fit an image", where="fit", found=fit, expected=" or ".join(_FITS))
    return _FITS[fit](*sizes)


def _crop(source_height: int, source_width: int, height: int, width: int) -> Window:
    return Window(_inscribed(height, width, source_height, source_width), Rectangle(0, 0, height, width))


def _pad(source_height: int, source_width: int, height: int, width: int) -> Window:
    return Window(
        Rectangle(0, 0, source_height, source_width), _inscribed(source_height, source_width, height, width)
    )


def _inscribed(height: int, width: int, outer_height: int, outer_width: int) -> Rectangle:
    # The largest centred rectangle of the aspect ratio height : width inside the outer one.
    scale = min(outer_height / height, outer_width / width)
    inner_height = min(max(round(height * scale), 1), outer_height)
    inner_width = min(max(round(width * scale), 1), outer_width)
    return Rectangle(
        (outer_height - inner_height) // 2, (outer_width - inner_width) // 2, inner_height, inner_width
    )


_FITS: dict[str, Callable[[int, int, int, int], Window]] = {"crop": _crop, "pad": _pad}


@dataclass(frozen=True)
class PixelIntrinsics:
    """A pinhole camera in pixels of one image size.

    Attributes:
        fx: Focal length along u, pixels.
        fy: Focal length along v, pixels.
        cx: u of the principal point, pixels.
        cy: v of the principal point, pixels.
        width: Image width, pixels.
        height: Image height, pixels.
    """

    fx: float
    fy: float
    cx: float
    cy: float
    width: int
    height: int

    def normalized(self) -> NormalizedIntrinsics:
        """Return the same camera in units of the image's width and height."""
        return NormalizedIntrinsics(
            self.fx / self.width, self.fy / self.height, self.cx / self.width, self.cy / self.height
        )

    def through(self, window: Window, height: int, width: int) -> PixelIntrinsics:
        """Return the camera that takes the output image of `fit_window`.

        Args:
            window: How the image was cut or padded and resized.
            height: Rows of the output image.
            width: Columns of the output image.

        Raises:
            ShapeError: If the window reads outside this camera's image or writes outside the output.
        """
        _check_inside(window.source, self.height, self.width, "window.source")
        _check_inside(window.destination, height, width, "window.destination")
        scale_u, scale_v = window.scale
        return PixelIntrinsics(
            fx=self.fx * scale_u,
            fy=self.fy * scale_v,
            cx=(self.cx - window.source.left) * scale_u + window.destination.left,
            cy=(self.cy - window.source.top) * scale_v + window.destination.top,
            width=width,
            height=height,
        )

    def project(self, points: Tensor) -> Tensor:
        """Project points to pixel coordinates.

        Args:
            points: (..., 3) in the camera frame, z > 0, any unit of length.

        Returns:
            (..., 2) pixel coordinates (u, v), which may lie outside the image. Points with z <= 0 have no
            image: their coordinates are NaN.
        """
        import torch

        x, y, z = points.unbind(-1)
        depth = torch.where(z > 0, z, torch.full_like(z, torch.nan))
        return torch.stack([self.fx * x / depth + self.cx, self.fy * y / depth + self.cy], dim=-1)

    def unproject(self, pixels: Tensor, depth: Tensor) -> Tensor:
        """Return the points seen at pixel coordinates.

        Args:
            pixels: (..., 2) pixel coordinates (u, v).
            depth: (...) z coordinates in the camera frame (not distances from the camera).

        Returns:
            (..., 3) points in the camera frame, in the unit of `depth`.
        """
        import torch

        u, v = pixels.unbind(-1)
        x, y = (u - self.cx) / self.fx * depth, (v - self.cy) / self.fy * depth
        return torch.stack([x, y, depth.expand_as(x)], dim=-1)


@dataclass(frozen=True)
class NormalizedIntrinsics:
    """A pinhole camera in units of the image's width and height, as MoGe gives it; valid for any resolution.

    Attributes:
        fx: Focal length along u, image widths.
        fy: Focal length along v, image heights.
        cx: u of the principal point, image widths.
        cy: v of the principal point, image heights.
    """

    fx: float
    fy: float
    cx: float
    cy: float

    def pixels(self, height: int, width: int) -> PixelIntrinsics:
        """Return the same camera in pixels of an image of a given size."""
        return PixelIntrinsics(
            self.fx * width, self.fy * height, self.cx * width, self.cy * height, width=width, height=height
        )


def _check_inside(rectangle: Rectangle, height: int, width: int, where: str) -> None:
    top, left, rows, columns = rectangle
    if min(top, left) < 0 or top + rows > height or left + columns > width:
        raise ShapeError(
            "The window does not lie inside the image",
            where=where,
            found=rectangle,
            expected=f"inside {height} rows x {width} columns",
        )


def check_divisible(height: int, width: int, patch: int = 14, where: object = None) -> None:
    """Check that an image divides into whole patches.

    Args:
        height: Rows.
        width: Columns.
        patch: Side of a patch, pixels (SigLIP So400m and DINOv2: 14).
        where: The configuration key to name in the error.

    Raises:
        ConfigError: If a size is not a positive multiple of the patch, naming the nearest sizes that are.
    """
    if min(height, width) >= 1 and height % patch == 0 and width % patch == 0:
        return
    nearest_height, nearest_width = (max(1, round(size / patch)) * patch for size in (height, width))
    raise ConfigError(
        f"The image does not divide into patches of {patch} x {patch} pixels",
        where=where,
        found=f"height {height}, width {width}",
        expected=f"positive multiples of {patch}",
        remedy=f"the nearest valid size is height {nearest_height}, width {nearest_width}",
    )

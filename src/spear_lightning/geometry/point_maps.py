"""What a network that sees geometry finds in a batch of images: points, where they are known, and the camera."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from spear_lightning.errors import ShapeError


@dataclass(frozen=True, eq=False)
class PointMaps:
    """The surface points that the pixels of B images see, in each image's OpenCV camera frame.

    Attributes:
        points: float32 (B, H, W, 3); inf where nothing is known. Metres if `metric`, otherwise each image has its
            own unknown unit.
        valid: bool (B, H, W), where points are known; they have z > 0 there.
        intrinsics: float32 (B, 4), fx, fy, cx, cy in units of the image's width (fx, cx) and height (fy, cy).
        metric: Whether lengths are metres.
    """

    points: Tensor
    valid: Tensor
    intrinsics: Tensor
    metric: bool

    def __post_init__(self) -> None:
        found = tuple(tuple(part.shape) for part in (self.points, self.valid, self.intrinsics))
        images = self.valid.shape
        if len(images) != 3 or found != ((*images, 3), images, (images[0], 4)):
            raise ShapeError(
                "Point maps are points, a mask and intrinsics",
                where="PointMaps",
                found=found,
                expected="(B, H, W, 3), (B, H, W), (B, 4)",
            )

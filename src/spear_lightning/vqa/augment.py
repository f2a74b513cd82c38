"""What a model sees of a labelled image: cut, padded, mirrored and recoloured, never stretched; the label follows.

Points stay in the camera frame, since cutting and resizing an image changes its intrinsics alone. Mirroring does
change them: x becomes -x, left and right change places in names, and the vertices of boxes keep their canonical
order (`geometry.oriented_boxes`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from spear_lightning.errors import ConfigError
from spear_lightning.geometry.cameras import PixelIntrinsics, Rectangle, Window, fit_window
from spear_lightning.geometry.oriented_boxes import MIRRORED_VERTEX
from spear_lightning.labeling.records import ImageLabel, ObjectLabel
from spear_lightning.labeling.run_lengths import decode_mask, encode_mask
from spear_lightning.robot_data.images import CameraSpec, fit_image

Record = TypeVar("Record", ImageLabel, ObjectLabel)

SIDES = {"left": "right", "right": "left"}
SIDE = re.compile(r"\b(left|right)(?=(?:most|-?hand(?:ed)?|-side|wards?)?\b)", re.IGNORECASE)

MIN_PIXELS = 8
"""Stored pixels inside a cut from which the change of the median depth is estimated; with fewer it is kept."""

GREY = np.array([0.299, 0.587, 0.114], np.float32)
"""Weights of red, green and blue in brightness (ITU-R BT.601)."""

MIRROR = np.array([-1, 1, 1], np.float32)
"""Factors of x, y, z when an image is flipped left to right."""

MIRRORED_SIGNS = np.array([1, -1, -1, 1], np.float32)
"""Factors of a box's quaternion xyzw then (`OrientedBox.mirrored`)."""

MIRRORED_VERTICES = list(MIRRORED_VERTEX)


@dataclass(frozen=True)
class ViewRecipe:
    """How images are varied; the defaults of `plain` vary nothing.

    Attributes:
        smallest_cut: Least side of the cut, as a share of the image's; 1 takes the whole image.
        pad: Probability that what is cut is shown whole with black bars instead of filling the output.
        flip: Probability of mirroring.
        brightness: Greatest relative change of brightness.
        contrast: Greatest relative change of contrast.
        saturation: Greatest relative change of saturation.
        keep: Objects of which less than this share of the 2D box is left in the image are left out.
    """

    smallest_cut: float = 0.75
    pad: float = 0.2
    flip: float = 0.5
    brightness: float = 0.3
    contrast: float = 0.3
    saturation: float = 0.3
    keep: float = 0.8

    def __post_init__(self) -> None:
        shares = (
            self.smallest_cut,
            self.pad,
            self.flip,
            self.brightness,
            self.contrast,
            self.saturation,
            self.keep,
        )
        if not all(0 <= share <= 1 for share in shares) or self.smallest_cut == 0:
            raise ConfigError(
                "The variation of images is out of range",
                where="data.views",
                found=self,
                expected="shares and probabilities in [0, 1], smallest_cut > 0",
            )

    @classmethod
    def plain(cls) -> ViewRecipe:
        """Return the recipe for validation: the image as it is."""
        return cls(smallest_cut=1, pad=0, flip=0, brightness=0, contrast=0, saturation=0)


def make_view(
    label: ImageLabel, image_HW3: np.ndarray, camera: CameraSpec, recipe: ViewRecipe, rng: np.random.Generator
) -> tuple[ImageLabel, Tensor]:
    """Draw one view of a labelled image.

    Args:
        label: Its label.
        image_HW3: uint8 RGB (H, W, 3), of the label's size.
        camera: Size the model sees, and how other aspect ratios are met.
        recipe: What may vary.
        rng: Source of randomness; as many numbers are drawn whatever happens.

    Returns:
        The label of the view (objects that are cut off left out), and its pixels, uint8 (3, height, width).
    """
    scale, across, down, padded, flipped = rng.random(5).tolist()
    change = rng.uniform(-1, 1, 3)
    if padded < recipe.pad:
        camera = replace(camera, fit="pad")
    cut = _cut(label, recipe.smallest_cut + (1 - recipe.smallest_cut) * scale, across, down)
    inner = fit_window(cut.height, cut.width, camera.height, camera.width, camera.fit)
    top, left, height, width = inner.source
    window = Window(Rectangle(cut.top + top, cut.left + left, height, width), inner.destination)
    part_HW3 = image_HW3[cut.top : cut.top + cut.height, cut.left : cut.left + cut.width]
    pixels = fit_image(part_HW3, camera)
    view = through_window(label, window, camera.height, camera.width, recipe.keep)
    if flipped < recipe.flip:
        view, pixels = mirror_label(view), pixels.flip(-1)
    factors = 1 + change * (recipe.brightness, recipe.contrast, recipe.saturation)
    return view, recolour(pixels, *factors.tolist())


def _cut(label: ImageLabel, share: float, across: float, down: float) -> Rectangle:
    height, width = (max(1, round(side * share)) for side in (label.height, label.width))
    return Rectangle(round((label.height - height) * down), round((label.width - width) * across), height, width)


def through_window(label: ImageLabel, window: Window, height: int, width: int, keep: float) -> ImageLabel:
    """Return the label of the image that a window makes of a labelled one; masks are dropped.

    Args:
        label: The label.
        window: Which part goes where.
        height: Rows of the output image.
        width: Columns of the output image.
        keep: Objects of which less than this share of the 2D box is left are left out.
    """
    shown = window.destination
    low = np.array([shown.left, shown.top], np.float32)
    high = low + np.array([shown.width, shown.height], np.float32)
    # Corners of all 2D boxes and pixels at once: each call costs more than the numbers of an object.
    places = [*(item.box_2d.reshape(2, 2) for item in label.objects), label.pixels]
    moved = window.to_output(torch.from_numpy(np.concatenate(places))).numpy()
    corners_N22, pixels = moved[: 2 * len(label.objects)].reshape(-1, 2, 2), moved[2 * len(label.objects) :]
    inside_N22 = np.minimum(np.maximum(corners_N22, low), high)
    area_N, left_N = _areas(corners_N22), _areas(inside_N22)
    kept_N = (area_N > 0) & (left_N >= keep * area_N - 1e-6 * area_N)
    objects = [
        _changed(item, box_2d=inside.ravel(), mask=np.zeros(0, np.int64))
        for item, inside, kept in zip(label.objects, inside_N22, kept_N.tolist(), strict=True)
        if kept
    ]
    within = (pixels > low) & (pixels < high)
    seen = within[:, 0] & within[:, 1]
    camera = label.intrinsics
    return _changed(
        label,
        width=width,
        height=height,
        median_depth=label.median_depth * _depth_ratio(label.pixel_points[:, 2], seen),
        objects=tuple(objects),
        intrinsics=None if camera is None else camera.through(window, height, width),
        pixels=pixels[seen],
        pixel_points=label.pixel_points[seen],
    )


def _areas(corners_N22: np.ndarray) -> np.ndarray:
    sides = corners_N22[:, 1] - corners_N22[:, 0]
    return sides[:, 0] * sides[:, 1]


def _changed(record: Record, **changes: Any) -> Record:
    """Do as `dataclasses.replace` for the records of labels, which is several times as fast."""
    changed = object.__new__(type(record))
    changed.__dict__.update(record.__dict__, **changes)
    return changed


def _depth_ratio(depth: np.ndarray, seen: np.ndarray) -> float:
    """Return by how much the median depth changes when only some pixels are seen; 1 where too few tell."""
    if seen.all() or seen.sum() < MIN_PIXELS:
        return 1.0
    return float(np.median(depth[seen]) / np.median(depth))


def mirror_label(label: ImageLabel) -> ImageLabel:
    """Return the label of the image flipped left to right."""
    camera = label.intrinsics
    if camera is not None:
        camera = PixelIntrinsics(
            camera.fx, camera.fy, label.width - camera.cx, camera.cy, width=camera.width, height=camera.height
        )
    pixels = label.pixels.copy()
    pixels[:, 0] = label.width - pixels[:, 0]
    return _changed(
        label,
        objects=tuple(_mirror_object(item, label.height, label.width) for item in label.objects),
        intrinsics=camera,
        pixels=pixels,
        pixel_points=_mirrored(label.pixel_points),
    )


def _mirror_object(item: ObjectLabel, height: int, width: int) -> ObjectLabel:
    left, top, right, bottom = item.box_2d
    mask = item.mask
    if mask.size:
        mask = encode_mask(decode_mask(mask, height, width)[:, ::-1])
    return _changed(
        item,
        name=mirror_words(item.name),
        box_2d=np.array([width - right, top, width - left, bottom], np.float32),
        mask=mask,
        centre=_mirrored(item.centre),
        quaternion=_mirrored_turn(item.quaternion),
        vertices=_mirrored(item.vertices)[MIRRORED_VERTICES],
        closest=_mirrored(item.closest),
        furthest=_mirrored(item.furthest),
    )


def _mirrored_turn(quaternion: np.ndarray) -> np.ndarray:
    """Return the quaternion of `OrientedBox.mirrored`, in the sign that labels have."""
    x, _, _, w = quaternion.tolist()
    # With w >= 0; where x and w are 0, it is minus itself.
    return quaternion if x == w == 0 else quaternion * MIRRORED_SIGNS


def _mirrored(points: np.ndarray) -> np.ndarray:
    return points * MIRROR


@lru_cache(maxsize=4096)
def mirror_words(text: str) -> str:
    """Exchange left and right (also leftmost, left-hand, leftward) in a text, keeping upper and lower case."""

    def other(match: re.Match[str]) -> str:
        word = match[1]
        mirrored = SIDES[word.lower()]
        return mirrored.upper() if word.isupper() else mirrored.capitalize() if word[0].isupper() else mirrored

    return SIDE.sub(other, text)


def recolour(pixels_3HW: Tensor, brightness: float, contrast: float, saturation: float) -> Tensor:
    """Scale brightness, then contrast around the mean grey, then saturation around each pixel's grey.

    Args:
        pixels_3HW: uint8 (3, H, W).
        brightness: Factor; 1 changes nothing.
        contrast: Factor.
        saturation: Factor.

    Returns:
        uint8 (3, H, W).
    """
    if brightness == contrast == saturation == 1:
        return pixels_3HW
    # The three steps written out: each is a mixture of the pixel, its grey, and the mean grey of the image.
    pixels_HW3 = pixels_3HW.permute(1, 2, 0).numpy()
    colour_N3 = pixels_HW3.reshape(-1, 3).astype(np.float32)
    gain = brightness * contrast
    mixture_33 = np.eye(3) * (saturation * gain) + GREY[:, None] * ((1 - saturation) * gain)
    # Each step by that of NumPy and torch which is several times as fast as the other.
    added = torch.from_numpy(colour_N3).mean(0).numpy() @ GREY * (brightness - gain)
    changed_N3 = torch.from_numpy(colour_N3 @ mixture_33.astype(np.float32))
    changed_N3.add_(float(added)).round_().clamp_(0, 255)
    return torch.from_numpy(changed_N3.numpy().astype(np.uint8).reshape(pixels_HW3.shape)).permute(2, 0, 1)

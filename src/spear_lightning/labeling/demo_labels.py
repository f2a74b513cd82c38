"""Labelled pictures of coloured boxes on a table, by closed-form ray casting: for tests and quick starts.

No physics engine and no model is needed, and every number of a label is exact.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import simplejpeg
import torch

from spear_lightning.geometry import quaternions
from spear_lightning.geometry.cameras import PixelIntrinsics
from spear_lightning.geometry.oriented_boxes import OrientedBox
from spear_lightning.labeling.object_label import EXACT, label_object
from spear_lightning.labeling.records import ImageLabel, ObjectLabel
from spear_lightning.labeling.store import LabelWriter

COLOURS = {
    "red": (200, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 80, 200),
    "yellow": (220, 200, 50),
    "purple": (130, 60, 160),
    "white": (230, 230, 230),
}
TABLE = (150, 120, 90)
SAMPLED_PIXELS = 32
"""Random pixels of an image whose points are stored."""


def demo_label(
    seed: int, height: int = 105, width: int = 140, boxes: tuple[int, int] = (2, 4)
) -> tuple[ImageLabel, np.ndarray]:
    """Make one labelled picture: a few boxes on a table before a camera that looks down at it.

    Args:
        seed: Everything follows from it.
        height: Rows.
        width: Columns.
        boxes: Fewest and most boxes, of 1 to 4.

    Returns:
        The label (metric), and the picture, uint8 (height, width, 3).
    """
    rng = np.random.default_rng(seed)
    camera = _camera(rng, height, width)
    pitch, distance = rng.uniform(0.4, 1.1), rng.uniform(0.5, 0.7)
    tilt = quaternions.from_rotvec(torch.tensor([pitch, 0.0, 0.0], dtype=torch.float64))
    shown = _boxes(rng, tilt, distance, boxes)
    rays_HW3 = _rays(camera)
    depth_HW, number_HW, shade_HW = _cast(rays_HW3, shown, tilt, distance)
    points_HW3 = rays_HW3 * depth_HW[..., None]
    names = rng.permutation(list(COLOURS))[: len(shown)]
    palette = np.array([TABLE, *(COLOURS[name] for name in names)])
    image_HW3 = (palette[number_HW] * shade_HW[..., None]).clip(0, 255).astype(np.uint8)
    objects = _objects(points_HW3, number_HW, shown, [f"{name} box" for name in names])
    known = np.argwhere(np.isfinite(depth_HW))
    chosen = known[rng.choice(len(known), min(SAMPLED_PIXELS, len(known)), replace=False)]
    label = ImageLabel(
        image_id=f"demo-{seed:06d}",
        width=width,
        height=height,
        source="demo",
        unit="metric",
        median_depth=float(np.median(depth_HW[np.isfinite(depth_HW)])),
        objects=tuple(objects),
        intrinsics=camera,
        pixels=(chosen[:, ::-1] + 0.5).astype(np.float32),
        pixel_points=points_HW3[chosen[:, 0], chosen[:, 1]].astype(np.float32),
        provenance={"geometry": "exact", "box": "exact"},
    )
    return label, image_HW3


def write_demo_labels(
    folder: str | Path, images: int, seed: int = 0, shard_size: int = 1000, boxes: tuple[int, int] = (2, 4)
) -> None:
    """Write labelled pictures (see `demo_label`) as a label store.

    Args:
        folder: Where the shards go.
        images: How many pictures.
        seed: Of the first picture; the others follow.
        shard_size: Pictures of a shard.
        boxes: Fewest and most boxes of a picture, of 1 to 4.
    """
    with LabelWriter(folder, shard_size) as writer:
        for number in range(seed, seed + images):
            label, image_HW3 = demo_label(number, boxes=boxes)
            writer.add(label, simplejpeg.encode_jpeg(np.ascontiguousarray(image_HW3), quality=92))


def _camera(rng: np.random.Generator, height: int, width: int) -> PixelIntrinsics:
    focal = width * rng.uniform(0.8, 1.2)
    return PixelIntrinsics(focal, focal, width / 2, height / 2, width=width, height=height)


def _rays(camera: PixelIntrinsics) -> np.ndarray:
    u, v = np.meshgrid(np.arange(camera.width) + 0.5, np.arange(camera.height) + 0.5)
    pixels = torch.from_numpy(np.stack([u, v], axis=-1))
    return camera.unproject(pixels, torch.ones(pixels.shape[:-1], dtype=pixels.dtype)).numpy()


def _boxes(
    rng: np.random.Generator, tilt: torch.Tensor, distance: float, number: tuple[int, int]
) -> list[OrientedBox]:
    """Stand boxes on the table plane, one in each of some sectors around the point the camera looks at."""
    boxes = []
    # Where there may be a single one, it stands in any sector; several are all around anyway.
    first = 4 if number[0] == 1 else 1
    turns = np.arange(4)[: rng.integers(number[0], number[1] + 1)] + rng.uniform(0, first)
    for turn in turns * math.pi / 2:
        size = torch.from_numpy(rng.uniform(0.04, 0.12, 3))
        radius = rng.uniform(0.09, 0.15)
        # In the table's frame y points down and the table is y = 0.
        place = torch.tensor([radius * math.cos(turn), 0.0, radius * math.sin(turn)], dtype=torch.float64)
        place[1] = -size[1] / 2
        yaw = quaternions.from_rotvec(torch.tensor([0.0, rng.uniform(0, math.pi), 0.0], dtype=torch.float64))
        centre = quaternions.rotate(tilt, place) + torch.tensor([0.0, 0.0, distance], dtype=torch.float64)
        boxes.append(OrientedBox(centre, quaternions.multiply(tilt, yaw), size).canonical())
    return boxes


def _cast(
    rays_HW3: np.ndarray, boxes: list[OrientedBox], tilt: torch.Tensor, distance: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return depth (inf: nothing), what is seen (0 table, i + 1 box i) and brightness of each pixel."""
    down = quaternions.to_matrix(tilt)[:, 1].numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        facing = rays_HW3 @ down
        depth_HW = np.where(facing > 1e-3, distance * down[2] / facing, np.inf)
        number_HW, shade_HW = np.zeros(depth_HW.shape, np.int64), np.ones(depth_HW.shape)
        for number, box in enumerate(boxes, start=1):
            axes, centre, half = box.axes.numpy(), box.centre.numpy(), box.extents.numpy() / 2
            direction, origin = rays_HW3 @ axes, -centre @ axes
            near = (-np.sign(direction) * half - origin) / direction
            far = (np.sign(direction) * half - origin) / direction
            # numpy takes several times as long over an axis of three.
            enter = np.maximum(np.maximum(near[..., 0], near[..., 1]), near[..., 2])
            leave = np.minimum(np.minimum(far[..., 0], far[..., 1]), far[..., 2])
            hit = (enter < leave) & (enter > 0) & (enter < depth_HW)
            depth_HW, number_HW = np.where(hit, enter, depth_HW), np.where(hit, number, number_HW)
            brightness = np.array([0.6, 1.0, 0.8])[near.argmax(-1)]
            shade_HW = np.where(hit, brightness, shade_HW)
    return depth_HW, number_HW, shade_HW


def _objects(
    points_HW3: np.ndarray, number_HW: np.ndarray, boxes: list[OrientedBox], names: list[str]
) -> list[ObjectLabel]:
    objects = []
    for number, (box, name) in enumerate(zip(boxes, names, strict=True), start=1):
        mask_HW = number_HW == number
        if mask_HW.sum() >= EXACT.min_points:
            objects.append(label_object(points_HW3, mask_HW, name, EXACT, box=box))
    return objects

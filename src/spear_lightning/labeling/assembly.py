"""The last step of labelling: boxes, masks and points of an image become its label."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from spear_lightning.errors import DataError
from spear_lightning.geometry.cameras import PixelIntrinsics
from spear_lightning.labeling.detections import Detections
from spear_lightning.labeling.geometry import PointMap
from spear_lightning.labeling.object_label import BoxRecipe, label_object
from spear_lightning.labeling.records import ImageLabel, ObjectLabel, Unit
from spear_lightning.labeling.segmenter import Masks

DROPPED = "dropped"
"""Key in a label's provenance: the detections that became no object, and why; one a line."""


@dataclass(frozen=True)
class ObjectFilter:
    """Which objects are worth a label.

    Attributes:
        min_mask_pixels: Smaller masks are dropped.
        min_mask_score: Masks of which the segmenter thinks less are dropped; those without a score stay.
        max_residual: Objects whose points lie farther from the box's surface are dropped; see `ObjectLabel`.
        sampled_pixels: Random pixels of an image whose points are stored beside the objects.
        keep_masks: Whether masks are stored.
    """

    min_mask_pixels: int = 64
    min_mask_score: float = 0.5
    max_residual: float = float("inf")
    sampled_pixels: int = 64
    keep_masks: bool = True


@dataclass(frozen=True, eq=False)
class Evidence:
    """All that is known of an image before there are boxes; travels to other processes.

    Attributes:
        image_id: Name of the image.
        source: Where it is from.
        detections: Its N named 2D boxes.
        packed_masks: uint8 (N, bytes): the masks' bits, row by row.
        mask_scores_N: What the segmenter thinks of them.
        points_HW3: float32, the point map; inf where nothing is known.
        intrinsics: The camera, if known.
        unit: Of the points.
        provenance: Step -> model and version.
    """

    image_id: str
    source: str
    detections: Detections
    packed_masks: np.ndarray
    mask_scores_N: np.ndarray
    points_HW3: np.ndarray
    intrinsics: PixelIntrinsics | None
    unit: Unit
    provenance: Mapping[str, str]


def gather(
    image_id: str,
    source: str,
    detections: Detections,
    masks: Masks | None,
    point_map: PointMap,
    provenance: Mapping[str, str],
) -> Evidence:
    """Put together what the steps found; masks are None where there were no detections."""
    points_HW3 = point_map.points_HW3
    if not point_map.valid_HW.all():
        points_HW3 = np.where(point_map.valid_HW[..., None], points_HW3, np.float32(np.inf))
    found = masks or Masks(np.zeros((0, *point_map.valid_HW.shape), bool), np.zeros(0, np.float32))
    return Evidence(
        image_id,
        source,
        detections,
        np.packbits(found.masks_NHW.reshape(len(detections), point_map.valid_HW.size), axis=-1),
        found.scores_N,
        np.ascontiguousarray(points_HW3, np.float32),
        point_map.intrinsics,
        point_map.unit,
        provenance,
    )


def assemble(evidence: Evidence, recipe: BoxRecipe, keep: ObjectFilter) -> ImageLabel:
    """Make the label of an image.

    Args:
        evidence: What the steps found.
        recipe: How points become boxes.
        keep: Which objects are worth it.

    Returns:
        The label. Detections that became no object stand in its provenance under `DROPPED`.

    Raises:
        DataError: If no pixel's point is known.
    """
    height, width = evidence.points_HW3.shape[:2]
    depth_HW = evidence.points_HW3[..., 2]
    known_HW = (depth_HW > 0) & (depth_HW < np.inf)
    if not known_HW.any():
        raise DataError("No pixel's geometry is known", where=f"image {evidence.image_id!r}")
    objects, dropped = [], []
    for number, name in enumerate(evidence.detections.names):
        try:
            objects.append(_object(evidence, number, recipe, keep))
        except DataError as error:
            dropped.append(f"{name}: {str(error).splitlines()[0]}")
    pixels, points = _sampled(evidence, known_HW, keep.sampled_pixels)
    provenance = dict(evidence.provenance) | ({DROPPED: "\n".join(dropped)} if dropped else {})
    return ImageLabel(
        image_id=evidence.image_id,
        width=width,
        height=height,
        source=evidence.source,
        unit=evidence.unit,
        median_depth=float(np.median(depth_HW[known_HW], overwrite_input=True)),
        objects=tuple(objects),
        intrinsics=evidence.intrinsics,
        pixels=pixels,
        pixel_points=points,
        provenance=provenance,
    )


def _object(evidence: Evidence, number: int, recipe: BoxRecipe, keep: ObjectFilter) -> ObjectLabel:
    height, width = evidence.points_HW3.shape[:2]
    bits = np.unpackbits(evidence.packed_masks[number], count=height * width)
    mask_HW = bits.reshape(height, width).view(bool)
    if np.count_nonzero(mask_HW) < keep.min_mask_pixels:
        raise DataError(f"Its mask has fewer than {keep.min_mask_pixels} pixels")
    if evidence.mask_scores_N[number] < keep.min_mask_score:
        raise DataError(f"The segmenter gives its mask less than {keep.min_mask_score:g}")
    item = label_object(
        evidence.points_HW3,
        mask_HW,
        evidence.detections.names[number],
        recipe,
        box_2d=evidence.detections.boxes_N4[number],
        detection_score=float(evidence.detections.scores_N[number]),
    )
    if item.residual > keep.max_residual:
        raise DataError(f"Its points lie farther from its box than {keep.max_residual:g}")
    return item if keep.keep_masks else replace(item, mask=np.zeros(0, np.int64))


def _sampled(evidence: Evidence, known_HW: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (K, 2) pixel coordinates and (K, 3) points, drawn by a seed of the image's name."""
    seed = int.from_bytes(hashlib.sha256(evidence.image_id.encode("utf-8", "surrogateescape")).digest()[:8], "big")
    known = np.flatnonzero(known_HW)
    chosen = np.random.default_rng(seed).choice(known, min(count, len(known)), replace=False)
    rows, columns = np.divmod(chosen, known_HW.shape[1])
    pixels = np.stack([columns + 0.5, rows + 0.5], -1).astype(np.float32)
    return pixels, evidence.points_HW3[rows, columns].astype(np.float32)

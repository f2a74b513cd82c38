"""From the points and the mask of one object to its label; photographs and the simulated world share it."""

from __future__ import annotations

import numpy as np
import torch

from spear_lightning.errors import DataError
from spear_lightning.geometry.box_fit import fit_box
from spear_lightning.geometry.oriented_boxes import OrientedBox
from spear_lightning.labeling.object_points import EXACT, BoxRecipe, object_points
from spear_lightning.labeling.records import ObjectLabel
from spear_lightning.labeling.run_lengths import encode_mask

__all__ = ["EXACT", "BoxRecipe", "label_object", "mask_bounds"]

NAN = float("nan")


def label_object(
    points_HW3: np.ndarray,
    mask_HW: np.ndarray,
    name: str,
    recipe: BoxRecipe = BoxRecipe(),  # noqa: B008 - frozen
    box: OrientedBox | None = None,
    box_2d: np.ndarray | None = None,
    visible_fraction: float = NAN,
    detection_score: float = NAN,
) -> ObjectLabel:
    """Label one object: outliers out, smallest box around the rest, key points, scores.

    Args:
        points_HW3: (H, W, 3) point map in the OpenCV camera frame; not finite where nothing is known.
        mask_HW: bool (H, W), the object's visible pixels.
        name: What it is called.
        recipe: How points become a box.
        box: The box, where it is known already (a simulated world's ground truth); default: fitted.
        box_2d: (4,) left, top, right, bottom in pixels; default: the bounds of the mask.
        visible_fraction: See `ObjectLabel`.
        detection_score: See `ObjectLabel`.

    Returns:
        The label, in the unit of the points.

    Raises:
        DataError: If too few points are left, or part of the box lies behind the camera.
    """
    mask_HW = np.asarray(mask_HW, bool)
    points, outline = object_points(points_HW3, mask_HW, recipe)
    if len(points) < recipe.min_points:
        raise DataError(
            "An object has too few points",
            where=f"object {name!r}",
            found=f"{len(points)} of {int(mask_HW.sum())} pixels of its mask",
            expected=f"at least {recipe.min_points}",
        )
    distance = np.linalg.norm(points, axis=-1)
    if box is None:
        box = fit_box(np.concatenate([points, outline]), min_extent=recipe.min_extent * float(np.median(distance)))
    box = box.canonical()
    vertices = box.vertices()
    if float(vertices[:, 2].min()) <= 0:
        raise DataError(
            "The box of an object reaches behind the camera", where=f"object {name!r}", found=vertices.tolist()
        )
    return ObjectLabel(
        name=name,
        box_2d=mask_bounds(mask_HW) if box_2d is None else np.asarray(box_2d, np.float32),
        mask=encode_mask(mask_HW),
        centre=_float32(box.centre),
        quaternion=_float32(box.quaternion),
        extents=_float32(box.extents),
        vertices=_float32(vertices),
        closest=points[distance.argmin()].astype(np.float32),
        furthest=points[distance.argmax()].astype(np.float32),
        distance=float(torch.linalg.vector_norm(box.centre)),
        points=len(points),
        visible_fraction=visible_fraction,
        residual=_residual(box, points),
        detection_score=detection_score,
    )


def mask_bounds(mask_HW: np.ndarray) -> np.ndarray:
    """Return (left, top, right, bottom), float32 pixels, of a mask; right and bottom are exclusive."""
    rows, columns = np.flatnonzero(mask_HW.any(1)), np.flatnonzero(mask_HW.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)


def _residual(box: OrientedBox, points: np.ndarray) -> float:
    local = (torch.from_numpy(points) - box.centre) @ box.axes.to(torch.float64)
    depth = (box.extents / 2 - local.abs()).abs().amin(-1)
    return float(depth.mean() / box.volume.clamp(min=1e-30) ** (1 / 3))


def _float32(values: torch.Tensor) -> np.ndarray:
    return values.to(torch.float32).numpy()

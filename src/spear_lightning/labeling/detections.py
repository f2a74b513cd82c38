"""What a detector finds in an image, and how it is put in order: names cleaned, boxes clipped, doubles removed."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Detections:
    """Named 2D boxes of one image.

    Attributes:
        boxes_N4: float32 (N, 4): left, top, right, bottom in pixels.
        names: N names.
        scores_N: float32 (N,), confidence in [0, 1]; NaN where there is none.
    """

    boxes_N4: np.ndarray
    names: tuple[str, ...]
    scores_N: np.ndarray

    def __len__(self) -> int:
        """Return the number of boxes."""
        return len(self.names)

    def take(self, rows: np.ndarray) -> Detections:
        """Return some of the boxes, by index."""
        return Detections(
            self.boxes_N4[rows], tuple(self.names[row] for row in rows.tolist()), self.scores_N[rows]
        )


NOTHING = Detections(np.zeros((0, 4), np.float32), (), np.zeros(0, np.float32))
"""No detection at all."""


@dataclass(frozen=True)
class DetectionFilter:
    """How a detector's boxes are put in order.

    Attributes:
        min_score: Boxes of less confidence are dropped; those without confidence stay.
        min_side: Least width and height of a clipped box in pixels.
        max_image_share: Boxes that cover more of the image are dropped: they are the scene, not an object.
        same_name_iou: Of two boxes of one name that overlap by more, the less confident (or later) one is dropped.
        any_name_iou: The same whatever their names: one thing under two names.
        max_objects: Boxes kept at most, the most confident (or first) ones.
    """

    min_score: float = 0.0
    min_side: float = 4.0
    max_image_share: float = 0.9
    same_name_iou: float = 0.7
    any_name_iou: float = 0.95
    max_objects: int = 50

    def __call__(self, found: Detections, width: int, height: int) -> Detections:
        """Return what is left of the boxes of an image, in their order.

        Args:
            found: As the detector gave them.
            width: Of the image, pixels.
            height: Of the image, pixels.
        """
        boxes_N4 = np.asarray(found.boxes_N4, np.float32).reshape(-1, 4)
        fine_N = np.isfinite(boxes_N4).all(-1)
        boxes_N4 = boxes_N4.clip(0, [width, height, width, height])
        cleaned = Detections(boxes_N4.astype(np.float32), tuple(map(clean_name, found.names)), found.scores_N)
        sides_N2 = boxes_N4[:, 2:] - boxes_N4[:, :2]
        fine_N &= (sides_N2 >= self.min_side).all(-1)
        fine_N &= sides_N2.prod(-1) <= self.max_image_share * width * height
        fine_N &= ~(np.asarray(found.scores_N) < self.min_score)
        fine_N &= np.array([bool(name) for name in cleaned.names], bool)
        cleaned = cleaned.take(np.flatnonzero(fine_N))
        return cleaned.take(self._distinct(cleaned))

    def _distinct(self, found: Detections) -> np.ndarray:
        """Return the indices of the boxes to keep, ascending."""
        confidence = np.where(np.isnan(found.scores_N), np.inf, found.scores_N)
        overlap_NN = box_overlaps(found.boxes_N4)
        kept: list[int] = []
        for index in np.argsort(-confidence, kind="stable").tolist():
            if len(kept) == self.max_objects:
                break
            limits = (
                self.same_name_iou if found.names[index] == found.names[other] else self.any_name_iou
                for other in kept
            )
            if all(overlap_NN[index, other] <= limit for other, limit in zip(kept, limits, strict=True)):
                kept.append(index)
        return np.array(sorted(kept), np.int64)


def box_overlaps(boxes_N4: np.ndarray) -> np.ndarray:
    """Return the intersection over union of all pairs of boxes, (N, N); 0 for boxes without area."""
    corner_N2 = np.maximum(boxes_N4[:, None, :2], boxes_N4[None, :, :2])
    opposite_N2 = np.minimum(boxes_N4[:, None, 2:], boxes_N4[None, :, 2:])
    shared_NN = (opposite_N2 - corner_N2).clip(0).prod(-1).astype(np.float64)
    areas_N = (boxes_N4[:, 2:] - boxes_N4[:, :2]).clip(0).prod(-1).astype(np.float64)
    union_NN = areas_N[:, None] + areas_N[None] - shared_NN
    return np.divide(shared_NN, union_NN, out=np.zeros_like(shared_NN), where=union_NN > 0)


_ARTICLE = re.compile(r"^(?:an?|the)(?:\s+|$)", re.IGNORECASE)


def clean_name(name: str) -> str:
    """Return a name as labels use it: lower case, single spaces, no article, no marks around it; may be empty."""
    plain = unicodedata.normalize("NFKC", name).replace("_", " ")
    plain = " ".join("".join(sign for sign in plain if sign.isprintable() or sign.isspace()).split())
    plain = plain.strip(" .,;:!?\"'`()[]{}<>*#-")
    return _ARTICLE.sub("", plain).lower()

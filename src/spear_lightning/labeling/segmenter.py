"""The second step of labelling: 2D boxes become the masks of the objects in them."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spear_lightning.errors import DataError, SpearError
from spear_lightning.labeling.detections import Detections, box_overlaps, clean_name
from spear_lightning.labeling.detector import Picture
from spear_lightning.labeling.run_lengths import decode_mask


@dataclass(frozen=True, eq=False)
class Masks:
    """The masks of the objects of one image.

    Attributes:
        masks_NHW: bool (N, H, W), in the order of the boxes they were made from.
        scores_N: float32 (N,), what the segmenter thinks of each, in [0, 1]; NaN where it does not say.
    """

    masks_NHW: np.ndarray
    scores_N: np.ndarray


class Segmenter(ABC):
    """Finds the masks of boxes. One object serves one process; `prepare` is called before the first image.

    Attributes:
        batch_size: Images of one call of `segment`.
    """

    batch_size: int = 1

    @property
    @abstractmethod
    def version(self) -> str:
        """What makes the masks and in which version, for a label's provenance."""

    @abstractmethod
    def segment(self, pictures: Sequence[Picture], boxes: Sequence[Detections]) -> list[Masks | SpearError]:
        """Return the masks of each image's boxes, or the error that says why there are none.

        Args:
            pictures: At most `batch_size` images of any sizes.
            boxes: Of each image at least one.
        """

    @abstractmethod
    def prepare(self, device: torch.device | str = "cpu") -> None:
        """Load weights and move to a device, or read files; called once per process.

        Args:
            device: Where to compute.

        Raises:
            SpearError: If something is missing or does not fit.
        """


class MaskFile(Segmenter):
    """Masks that are known already, from a JSON-lines file: one as `BoxFile` reads, with a "mask" for each object.

    A mask is uncompressed COCO run lengths: `{"size": [height, width], "counts": [...]}`, column by column. A
    detection gets the mask of the object of its name whose box overlaps its own most.

    Args:
        path: The file.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path).expanduser()
        self._objects: dict[str, list[dict[str, Any]]] = {}

    @property
    def version(self) -> str:
        """The file's name."""
        return f"masks of {self._path.name}"

    def prepare(self, device: torch.device | str = "cpu") -> None:
        """Read the file.

        Raises:
            DataError: If it cannot be read.
        """
        try:
            with self._path.open(encoding="utf-8") as lines:
                rows = [json.loads(line) for line in lines if line.strip()]
            self._objects = {row["image_id"]: row["objects"] for row in rows}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError("The file of masks cannot be read", where=self._path, found=error) from error

    def segment(self, pictures: Sequence[Picture], boxes: Sequence[Detections]) -> list[Masks | SpearError]:
        """Look the masks up."""
        found: list[Masks | SpearError] = []
        for picture, detections in zip(pictures, boxes, strict=True):
            try:
                masks = [
                    self._mask(picture, name, box_4)
                    for name, box_4 in zip(detections.names, detections.boxes_N4, strict=True)
                ]
            except DataError as error:
                found.append(error)
            else:
                found.append(Masks(np.stack(masks), np.full(len(masks), np.nan, np.float32)))
        return found

    def _mask(self, picture: Picture, name: str, box_4: np.ndarray) -> np.ndarray:
        where = f"{self._path}, {picture.image_id}, {name}"
        objects = self._objects.get(picture.image_id, ())
        same = [item for item in objects if clean_name(str(item["name"])) == name]
        if not same:
            raise DataError("The file of masks lacks an object", where=where)
        boxes = np.array([box_4, *(item["box_2d"] for item in same)], np.float32)
        mask = same[int(box_overlaps(boxes)[0, 1:].argmax())]["mask"]
        height, width = picture.pixels_HW3.shape[:2]
        if tuple(mask["size"]) != (height, width):
            raise DataError(
                "A mask is that of another image size",
                where=where,
                found=mask["size"],
                expected=[height, width],
            )
        return decode_mask(np.array(mask["counts"]), height, width)

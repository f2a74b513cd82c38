"""The first step of labelling: an image becomes named 2D boxes."""

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
from spear_lightning.labeling.detections import NOTHING, Detections


@dataclass(frozen=True, eq=False)
class Picture:
    """An image on its way through the steps.

    Attributes:
        image_id: Its name.
        data: Its JPEG or PNG bytes.
        pixels_HW3: uint8 RGB.
    """

    image_id: str
    data: bytes
    pixels_HW3: np.ndarray


class Detector(ABC):
    """Finds objects in images. One object serves one process; `prepare` is called before the first image.

    Attributes:
        batch_size: Images of one call of `detect`.
        parallel: Calls of `detect` that may run at the same time, in threads.
    """

    batch_size: int = 1
    parallel: int = 1

    @property
    @abstractmethod
    def version(self) -> str:
        """What finds the objects and in which version, for a label's provenance."""

    @abstractmethod
    def detect(self, pictures: Sequence[Picture]) -> list[Detections | SpearError]:
        """Return what is in each image, or the error that says why that is not known.

        Args:
            pictures: At most `batch_size` images of any sizes.
        """

    @abstractmethod
    def prepare(self, device: torch.device | str = "cpu") -> None:
        """Load weights and move to a device, or read files; called once per process.

        Args:
            device: Where to compute.

        Raises:
            SpearError: If something is missing or does not fit.
        """

    def forget(self, picture: Picture) -> bool:
        """Drop what is remembered of an image that failed before and is now tried again.

        Returns:
            Whether there was something.
        """
        return False

    def costs(self) -> str:
        """Return what the calls have cost so far, in words; empty where they cost nothing."""
        return ""


class BoxFile(Detector):
    """Boxes that are known already, from a JSON-lines file.

    A line is `{"image_id": "a.jpg", "objects": [{"name": "cup", "box_2d": [left, top, right, bottom]}]}`, with the
    box in pixels and optionally a "score" in [0, 1]. Ids of a folder's images are paths relative to it.

    Args:
        path: The file.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path).expanduser()
        self._found: dict[str, Detections] = {}

    @property
    def version(self) -> str:
        """The file's name."""
        return f"boxes of {self._path.name}"

    def prepare(self, device: torch.device | str = "cpu") -> None:
        """Read the file.

        Raises:
            DataError: If it cannot be read or a line is wrong.
        """
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError("The file of boxes cannot be read", where=self._path, found=error) from error
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                self._found[row["image_id"]] = _detections(row["objects"])
            except (ValueError, TypeError, KeyError) as error:
                raise DataError(
                    "A line of the file of boxes is wrong",
                    where=f"{self._path}, line {number}",
                    found=f"{type(error).__name__}: {error}",
                    expected='{"image_id": "...", "objects": [{"name": "...", "box_2d": [l, t, r, b]}]}',
                ) from error

    def detect(self, pictures: Sequence[Picture]) -> list[Detections | SpearError]:
        """Look the images up; one that the file does not mention is an error."""
        return [self._found.get(picture.image_id) or self._missing(picture.image_id) for picture in pictures]

    def _missing(self, image_id: str) -> Detections | DataError:
        if image_id in self._found:
            return NOTHING
        return DataError("The file of boxes does not mention the image", where=self._path, found=image_id)


def _detections(objects: list[dict[str, Any]]) -> Detections:
    return Detections(
        np.array([item["box_2d"] for item in objects], np.float32).reshape(len(objects), 4),
        tuple(str(item["name"]) for item in objects),
        np.array([item.get("score", np.nan) for item in objects], np.float32),
    )

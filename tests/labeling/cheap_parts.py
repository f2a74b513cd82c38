"""Steps of labelling that cost nothing and depend on nothing but the image, and ways to run and compare runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import simplejpeg
import torch

from spear_lightning.errors import DataError, SpearError
from spear_lightning.geometry.cameras import PixelIntrinsics
from spear_lightning.labeling.demo_labels import demo_label
from spear_lightning.labeling.detections import NOTHING, Detections
from spear_lightning.labeling.detector import Detector, Picture
from spear_lightning.labeling.gemini import Gemini
from spear_lightning.labeling.gemini_api import Patience
from spear_lightning.labeling.geometry import Geometry, PointMap
from spear_lightning.labeling.object_label import BoxRecipe
from spear_lightning.labeling.pipeline import LabelingRun, Tally
from spear_lightning.labeling.segmenter import Masks, Segmenter
from spear_lightning.labeling.sources import ImageFolder
from spear_lightning.labeling.work_split import ALONE, WorkSplit

RECIPE = BoxRecipe(erosion=1, min_points=16, max_points=500)


class Quadrants(Detector):
    """Finds two things in every image; `trouble` is what becomes of images whose name has it in it."""

    batch_size, parallel = 3, 2

    def __init__(self, trouble: dict[str, Exception] | None = None) -> None:
        self.trouble = trouble or {}
        self.seen: list[str] = []
        self.forgotten: list[str] = []

    @property
    def version(self) -> str:
        return "quadrants"

    def prepare(self, device: torch.device | str = "cpu") -> None: ...

    def forget(self, picture: Picture) -> bool:
        self.forgotten.append(picture.image_id)
        return True

    def detect(self, pictures: Sequence[Picture]) -> list[Detections | SpearError]:
        self.seen += [picture.image_id for picture in pictures]
        return [self._detect(picture) for picture in pictures]

    def _detect(self, picture: Picture) -> Detections | SpearError:
        for name, error in self.trouble.items():
            if name in picture.image_id:
                if isinstance(error, SpearError):
                    return error
                raise error
        if "empty" in picture.image_id:
            return NOTHING
        height, width = picture.pixels_HW3.shape[:2]
        rows = [[0.1, 0.1, 0.5, 0.5], [0.4, 0.5, 0.9, 0.95]]
        boxes = np.array(rows, np.float32) * [width, height, width, height]
        return Detections(boxes.astype(np.float32), ("cup", "plate"), np.array([0.9, 0.8], np.float32))


class Ellipses(Segmenter):
    """The ellipse in each box."""

    batch_size = 4

    @property
    def version(self) -> str:
        return "ellipses"

    def prepare(self, device: torch.device | str = "cpu") -> None: ...

    def segment(self, pictures: Sequence[Picture], boxes: Sequence[Detections]) -> list[Masks | SpearError]:
        results: list[Masks | SpearError] = []
        for picture, found in zip(pictures, boxes, strict=True):
            assert len(found), "there is nothing to segment"
            if "no masks" in picture.image_id:
                raise RuntimeError("this image spoils its batch")
            height, width = picture.pixels_HW3.shape[:2]
            v, u = np.mgrid[0:height, 0:width] + 0.5
            masks = []
            for left, top, right, bottom in found.boxes_N4:
                x, y = (2 * u - left - right) / (right - left), (2 * v - top - bottom) / (bottom - top)
                masks.append(x**2 + y**2 < 1)
            results.append(Masks(np.stack(masks), np.full(len(masks), 0.9, np.float32)))
        return results


class Relief(Geometry):
    """A plane a metre away whose bright pixels stand out."""

    @property
    def version(self) -> str:
        return "relief"

    def prepare(self, device: torch.device | str = "cpu") -> None: ...

    def point_maps(
        self,
        images: Sequence[np.ndarray],
        image_ids: Sequence[str],
        intrinsics: Sequence[PixelIntrinsics | None] | None = None,
    ) -> list[PointMap | SpearError]:
        return [
            DataError("nothing is known", where=name) if "no points" in name else _relief(image)
            for image, name in zip(images, image_ids, strict=True)
        ]


def _relief(image_HW3: np.ndarray) -> PointMap:
    height, width = image_HW3.shape[:2]
    camera = PixelIntrinsics(width, width, width / 2, height / 2, width=width, height=height)
    v, u = np.mgrid[0:height, 0:width] + 0.5
    depth = 1 - 0.3 * image_HW3.mean(-1) / 255
    points = np.stack([(u - camera.cx) / camera.fx * depth, (v - camera.cy) / camera.fy * depth, depth], -1)
    return PointMap(points.astype(np.float32), np.ones((height, width), bool), camera, "scale_free")


def write_images(folder: Path, names: Sequence[str]) -> None:
    """Write demo pictures, each another one, under the names."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(names):
        image = demo_label(seed, 60, 80)[1]
        (folder / name).write_bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(image)))


def cheap_run(images: Path, out: Path, detector: Detector, **options: Any) -> LabelingRun:
    given = {"shard_size": 4, "box_processes": 0, "boxes": RECIPE} | options
    return LabelingRun(str(out), ImageFolder(str(images), "pictures"), detector, Ellipses(), Relief(), **given)


def label_with_gemini(images: str, out: str, url: str, split: WorkSplit = ALONE, box_processes: int = 0) -> Tally:
    """Label a folder with the fake server's boxes; what other processes call."""
    detector = Gemini(
        str(Path(out) / "replies"),
        base_url=url,
        parallel=3,
        requests_per_minute=1e9,
        patience=Patience(timeout_s=300, attempts=1),
    )
    return cheap_run(Path(images), Path(out) / "labels", detector, shard_size=3, box_processes=box_processes).run(
        split
    )


def contents(folder: Path) -> dict[str, str]:
    """Return image id -> row of all shards, without the place of its image; every image must be there once."""
    rows: dict[str, str] = {}
    for path in folder.glob("*.parquet"):
        for row in pq.read_table(path).to_pylist():
            place = row.pop("image_file"), row.pop("image_offset")
            assert row["image_id"] not in rows, f"{row['image_id']} is there twice, the second time in {place}"
            # As text, in which a NaN equals another.
            rows[row["image_id"]] = repr(row)
    return rows

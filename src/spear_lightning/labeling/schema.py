"""The Parquet schema of labels, version 1, and records to and from its rows.

One row is one image. Lists of numbers that have a fixed length in `records` (a point, eight vertices) are stored
flat, row by row. The version stands in the file's metadata under `spear_labels_schema`.

| column | type | meaning |
|---|---|---|
| image_id, source, unit | string | as in `ImageLabel` |
| width, height | int32 | pixels |
| median_depth | float32 | |
| intrinsics | list of float64 | fx, fy, cx, cy in pixels; null where unknown |
| pixels, pixel_points | list of float32 | 2 K and 3 K numbers |
| provenance | map of string to string | step -> model and version |
| image_file | string | relative to the shard: the file that holds the encoded image |
| image_offset, image_bytes | int64 | where in that file |
| image_sha256 | string | of the encoded image, in hexadecimal |
| objects | list of struct | the fields of `ObjectLabel`, in its order |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from spear_lightning.geometry.cameras import PixelIntrinsics
from spear_lightning.labeling.records import ImageLabel, ObjectLabel

if TYPE_CHECKING:
    import pyarrow as pa

VERSION = 1
"""Version of the schema."""

VERSION_KEY = b"spear_labels_schema"
"""Key of the version in a Parquet file's metadata."""

_VECTORS = {"box_2d": (4,), "centre": (3,), "quaternion": (4,), "extents": (3,), "vertices": (8, 3)}
_VECTORS |= {"closest": (3,), "furthest": (3,)}
_NUMBERS = ("distance", "visible_fraction", "residual", "detection_score")


@dataclass(frozen=True)
class ImagePlace:
    """Where an encoded image lies.

    Attributes:
        file: File, relative to the shard's folder.
        offset: First byte.
        bytes: Number of bytes.
        sha256: Hash of these bytes, in hexadecimal.
    """

    file: str
    offset: int
    bytes: int
    sha256: str


def arrow_schema() -> pa.Schema:
    """Return the schema with its version in the metadata."""
    import pyarrow as pa

    numbers = pa.list_(pa.float32())
    item = pa.struct(
        [
            ("name", pa.string()),
            ("box_2d", numbers),
            ("mask", pa.list_(pa.int32())),
            *((name, numbers) for name in list(_VECTORS)[1:]),
            ("distance", pa.float32()),
            ("points", pa.int32()),
            *((name, pa.float32()) for name in _NUMBERS[1:]),
        ]
    )
    columns = [
        *((name, pa.string()) for name in ("image_id", "source", "unit")),
        *((name, pa.int32()) for name in ("width", "height")),
        ("median_depth", pa.float32()),
        ("intrinsics", pa.list_(pa.float64())),
        ("pixels", numbers),
        ("pixel_points", numbers),
        ("provenance", pa.map_(pa.string(), pa.string())),
        ("image_file", pa.string()),
        *((name, pa.int64()) for name in ("image_offset", "image_bytes")),
        ("image_sha256", pa.string()),
        ("objects", pa.list_(item)),
    ]
    return pa.schema(columns, metadata={VERSION_KEY: str(VERSION).encode()})


def is_mask(column_path: str) -> bool:
    """Return whether a Parquet column holds masks: the one heavy column, which most readers can do without."""
    return column_path.startswith("objects.") and ".mask." in column_path


def is_name(column_path: str) -> bool:
    """Return whether a Parquet column holds the names of objects."""
    return column_path.startswith("objects.") and column_path.endswith(".name")


def to_row(label: ImageLabel, place: ImagePlace) -> dict[str, Any]:
    """Return the row of a label whose image lies at `place`."""
    camera = label.intrinsics
    return {
        "image_id": label.image_id,
        "source": label.source,
        "unit": label.unit,
        "width": label.width,
        "height": label.height,
        "median_depth": label.median_depth,
        "intrinsics": None if camera is None else [camera.fx, camera.fy, camera.cx, camera.cy],
        "pixels": _flat(label.pixels),
        "pixel_points": _flat(label.pixel_points),
        "provenance": sorted(label.provenance.items()),
        "image_file": place.file,
        "image_offset": place.offset,
        "image_bytes": place.bytes,
        "image_sha256": place.sha256,
        "objects": [_object_row(item) for item in label.objects],
    }


def _object_row(item: ObjectLabel) -> dict[str, Any]:
    return {
        "name": item.name,
        "mask": item.mask.astype(np.int32),
        "points": item.points,
        **{name: _flat(getattr(item, name)) for name in _VECTORS},
        **{name: getattr(item, name) for name in _NUMBERS},
    }


def _flat(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, np.float32).ravel()


def from_row(row: dict[str, Any]) -> tuple[ImageLabel, ImagePlace]:
    """Return the label of a row, and where its image lies."""
    width, height = row["width"], row["height"]
    camera = row["intrinsics"]
    label = ImageLabel(
        image_id=row["image_id"],
        width=width,
        height=height,
        source=row["source"],
        unit=row["unit"],
        median_depth=row["median_depth"],
        objects=tuple(_object(item) for item in row["objects"]),
        intrinsics=None if camera is None else _camera(camera, width, height),
        pixels=_shaped(row["pixels"], (-1, 2)),
        pixel_points=_shaped(row["pixel_points"], (-1, 3)),
        provenance=dict(row["provenance"]),
    )
    place = ImagePlace(row["image_file"], row["image_offset"], row["image_bytes"], row["image_sha256"])
    return label, place


def _camera(numbers: list[float], width: int, height: int) -> PixelIntrinsics:
    fx, fy, cx, cy = numbers
    return PixelIntrinsics(fx, fy, cx, cy, width=width, height=height)


def _object(row: dict[str, Any]) -> ObjectLabel:
    values: dict[str, Any] = {name: _shaped(row[name], shape) for name, shape in _VECTORS.items()}
    values |= {name: row[name] for name in _NUMBERS}
    mask = np.asarray(row.get("mask", ()), np.int64)
    return ObjectLabel(name=row["name"], mask=mask, points=row["points"], **values)


def _shaped(values: list[float], shape: tuple[int, ...]) -> np.ndarray:
    return np.array(values, np.float32).reshape(shape)

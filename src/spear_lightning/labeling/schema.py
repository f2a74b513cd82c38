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

import math
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
_IMAGE_NUMBERS = ("width", "height", "median_depth", "image_offset", "image_bytes")
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


class LabelRows:
    """Rows in the schema, kept as columns: a label is cut out of them when it is wanted.

    Labels of a whole row group would take several milliseconds to make, and ten times the memory to keep.

    Args:
        table: The rows; columns of masks may be missing.

    Attributes:
        checked: Rows whose labels the reader has found to be right.

    Raises:
        ValueError: If a list of a fixed length has another.
    """

    def __init__(self, table: pa.Table) -> None:
        self.checked: set[int] = set()
        table = table.combine_chunks()
        self._columns = {name: table.column(name).chunk(0) for name in table.column_names}
        self._numbers = {name: self._columns[name].to_numpy().tolist() for name in _IMAGE_NUMBERS}
        provenances = [tuple(row) for row in self._columns["provenance"].to_pylist()]
        shared = {row: dict(row) for row in provenances}
        self._provenances = [shared[row] for row in provenances]
        self._pixels = _Lists(self._columns["pixels"]), _Lists(self._columns["pixel_points"])
        objects = self._columns["objects"]
        items = objects.values
        self._first: list[int] = objects.offsets.to_pylist()
        self._names = items.field("name")
        self._vectors = {name: _Lists(items.field(name)).shaped(shape) for name, shape in _VECTORS.items()}
        self._values = {name: _array(items.field(name)).tolist() for name in ("points", *_NUMBERS)}
        has_masks = any(field.name == "mask" for field in items.type)
        self._masks = _Lists(items.field("mask")) if has_masks else None

    def label(self, row: int) -> ImageLabel:
        """Return the label of a row; its arrays are views of the columns."""
        width, height = self._numbers["width"][row], self._numbers["height"][row]
        camera = self._text("intrinsics", row)
        pixels, points = (part[row] for part in self._pixels)
        return ImageLabel(
            image_id=self._text("image_id", row),
            width=width,
            height=height,
            source=self._text("source", row),
            unit=self._text("unit", row),
            median_depth=self._numbers["median_depth"][row],
            objects=tuple(map(self._object, range(self._first[row], self._first[row + 1]))),
            intrinsics=None if camera is None else _camera(camera, width, height),
            pixels=pixels.reshape(-1, 2),
            pixel_points=points.reshape(-1, 3),
            provenance=self._provenances[row],
        )

    def place(self, row: int) -> ImagePlace:
        """Return where the image of a row lies."""
        offset, size = self._numbers["image_offset"][row], self._numbers["image_bytes"][row]
        return ImagePlace(self._text("image_file", row), offset, size, self._text("image_sha256", row))

    def _text(self, column: str, row: int) -> Any:
        return self._columns[column][row].as_py()

    def _object(self, number: int) -> ObjectLabel:
        return ObjectLabel(
            name=self._names[number].as_py(),
            mask=np.zeros(0, np.int64) if self._masks is None else self._masks[number].astype(np.int64),
            **{name: values[number] for name, values in self._vectors.items()},
            **{name: values[number] for name, values in self._values.items()},
        )


def _camera(numbers: list[float], width: int, height: int) -> PixelIntrinsics:
    fx, fy, cx, cy = numbers
    return PixelIntrinsics(fx, fy, cx, cy, width=width, height=height)


class _Lists:
    """A column of lists of numbers."""

    def __init__(self, column: pa.ListArray) -> None:
        self._first = column.offsets.to_numpy()
        self._values = _array(column.values)

    def __getitem__(self, row: int) -> np.ndarray:
        return self._values[self._first[row] : self._first[row + 1]]

    def shaped(self, shape: tuple[int, ...]) -> np.ndarray:
        """Return all lists as (rows, *shape)."""
        wanted = math.prod(shape)
        lengths = np.diff(self._first)
        if (lengths != wanted).any():
            raise ValueError(f"lists of {lengths[lengths != wanted][0]} numbers instead of {wanted}")
        return self._values[self._first[0] : self._first[-1]].reshape(-1, *shape)


def _array(column: pa.Array) -> np.ndarray:
    """Return numbers in memory of their own, which unlike Arrow's may be written to: torch wants that."""
    return np.array(column.to_numpy(zero_copy_only=False))

"""Labels on disk: Parquet shards (see `schema`), and the encoded images they speak of in files beside them.

A shard is a pair `NAME.parquet`, `NAME.images`: the images' JPEG or PNG bytes one after another, and rows that
say where each begins. Parquet cannot hand out one image of a column without decoding its neighbours, and 230,000
single files are slow on a cluster's file system; a file of concatenated images is memory-mapped, and any image
is read at random without touching another. The same columns describe single files in a folder (offset 0), so
that images that are there already need not be copied. The Parquet file gets its name last: where it is, all is.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from spear_lightning.errors import DataError
from spear_lightning.labeling.records import ImageLabel, check_label
from spear_lightning.labeling.schema import (
    VERSION,
    VERSION_KEY,
    ImagePlace,
    LabelRows,
    arrow_schema,
    is_mask,
    is_name,
    to_row,
)
from spear_lightning.robot_data.images import decode_image

GROUP = 64
"""Images of a row group: what is decoded to reach one row."""


class LabelWriter:
    """Writes labels and their images in shards; use as a context manager.

    A shard appears under its name when it is whole. Leaving the context by an error drops the unfinished shard.

    Args:
        folder: Where the shards go.
        shard_size: Images of a shard.
        prefix: Start of the shards' names, for example one per process.
        first_shard: Number of the first shard.
    """

    def __init__(
        self, folder: str | Path, shard_size: int = 1000, prefix: str = "labels", first_shard: int = 0
    ) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._shard_size, self._prefix, self._shard = shard_size, prefix, first_shard
        self._rows: list[dict[str, Any]] = []
        self._images: BinaryIO | None = None

    def __enter__(self) -> LabelWriter:
        return self

    def add(self, label: ImageLabel, image: bytes) -> None:
        """Add a label and the bytes of its JPEG or PNG.

        Raises:
            DataError: If the label is wrong (see `check_label`), or the shard exists already.
        """
        self._check(label)
        if self._images is None:
            self._images = self._temporary(".images").open("wb")
        digest = hashlib.sha256(image).hexdigest()
        place = ImagePlace(self._path(".images").name, self._images.tell(), len(image), digest)
        self._images.write(image)
        self._rows.append(to_row(label, place))
        if len(self._rows) >= self._shard_size:
            self.finish_shard()

    def add_in_place(self, label: ImageLabel, image: str | Path) -> None:
        """Add a label whose image stays in a file of its own, which is named relative to the folder.

        Raises:
            DataError: If the label is wrong, the file cannot be read, or the shard exists already.
        """
        self._check(label)
        try:
            data = Path(image).read_bytes()
        except OSError as error:
            raise DataError("An image cannot be read", where=image, found=error) from error
        relative = os.path.relpath(image, self.folder)
        self._rows.append(to_row(label, ImagePlace(relative, 0, len(data), hashlib.sha256(data).hexdigest())))
        if len(self._rows) >= self._shard_size:
            self.finish_shard()

    def finish_shard(self) -> None:
        """Write out the rows so far as a shard of their own; nothing if there are none."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not self._rows:
            return
        if self._images is not None:
            self._images.flush()
            os.fsync(self._images.fileno())
            self._images.close()
            os.replace(self._temporary(".images"), self._path(".images"))
            self._images = None
        table = pa.Table.from_pylist(self._rows, schema=arrow_schema())
        temporary = self._temporary(".parquet")
        with temporary.open("wb") as file:
            pq.write_table(table, file, row_group_size=GROUP, compression="zstd")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._path(".parquet"))
        self._rows = []
        self._shard += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish_shard()
        if self._images is not None:
            self._images.close()
            self._images = None
            self._temporary(".images").unlink(missing_ok=True)

    def _check(self, label: ImageLabel) -> None:
        check_label(label)
        if not self._rows and self._path(".parquet").exists():
            raise DataError(
                "A shard of labels exists already",
                where=self._path(".parquet"),
                remedy="write into another folder, or remove the shards there",
            )

    def _path(self, suffix: str) -> Path:
        return self.folder / f"{self._prefix}-{self._shard:05d}{suffix}"

    def _temporary(self, suffix: str) -> Path:
        path = self._path(suffix)
        return path.with_name(f".{path.name}.{os.getpid()}.tmp")


class LabelStore:
    """Reads labels and images at random; memory-maps, and decodes one row group at a time.

    Labels keep the order of the shards' names and rows. The object can be sent to worker processes.

    Args:
        folder: Folder of shards.
        masks: Whether masks are read; without, labels have empty ones and are read faster.
        cached_groups: Row groups of 64 images that are kept decoded: 0.1 to 0.2 MB each without masks, with
            masks megabytes.

    Raises:
        DataError: If there are no shards, or one is broken or of an unknown version.
    """

    def __init__(self, folder: str | Path, masks: bool = False, cached_groups: int = 1024) -> None:
        self.folder = Path(folder)
        self._masks, self._cached = masks, cached_groups
        self._shards = sorted(self.folder.glob("*.parquet"))
        if not self._shards:
            raise DataError(
                "There are no labels",
                where=self.folder,
                expected="files *.parquet",
                remedy="make labels with `spear label`, or check the folder",
            )
        sizes, shards, groups = [], [], []
        for number, path in enumerate(self._shards):
            metadata = _open_shard(path).metadata
            for group in range(metadata.num_row_groups):
                sizes.append(metadata.row_group(group).num_rows)
                shards.append(number)
                groups.append(group)
        self._first = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self._group_shard, self._group = shards, groups
        self._forget()

    def _forget(self) -> None:
        self._open: dict[int, tuple[Any, list[str]]] = {}
        self._maps: dict[str, mmap.mmap] = {}
        self._decoded: OrderedDict[int, LabelRows] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """Leave open files and caches behind: a worker process opens its own."""
        return {key: value for key, value in self.__dict__.items() if key not in ("_open", "_maps", "_decoded")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __len__(self) -> int:
        """Return the number of images."""
        return int(self._first[-1])

    def __getitem__(self, index: int) -> ImageLabel:
        """Return a label.

        Raises:
            DataError: If it is wrong (see `check_label`) or its shard is broken.
        """
        label, _ = self._read(index)
        return label

    def __iter__(self) -> Iterator[ImageLabel]:
        """Yield all labels in order."""
        for index in range(len(self)):
            yield self[index]

    def encoded_image(self, index: int) -> bytes:
        """Return the bytes of an image's JPEG or PNG.

        Raises:
            DataError: If its file is missing or too short.
        """
        return self._bytes(self._read(index)[1])

    def read(self, index: int) -> tuple[ImageLabel, np.ndarray]:
        """Return a label and its image, uint8 RGB (height, width, 3).

        Raises:
            DataError: If either is broken, or the image's size is not the label's.
        """
        label, place = self._read(index)
        image_HW3 = decode_image(self._bytes(place), f"{place.file}, image {label.image_id!r}")
        height, width = image_HW3.shape[:2]
        if (width, height) != (label.width, label.height):
            raise DataError(
                "An image has another size than its label",
                where=f"image {label.image_id!r} in {self.folder / place.file}",
                found=f"{width} x {height}",
                expected=f"{label.width} x {label.height}",
                remedy="label the image again; an image must not be resized after labelling",
            )
        return label, image_HW3

    def object_names(self) -> Iterator[list[str]]:
        """Yield the names of each image's objects, in order; reads nothing else, so it is fast.

        Raises:
            DataError: If a shard is broken.
        """
        for row in self._column(is_name):
            yield [item["name"] for item in row]

    def image_ids(self) -> Iterator[str]:
        """Yield the id of each image, in order; reads nothing else, so it is fast.

        Raises:
            DataError: If a shard is broken.
        """
        return self._column(lambda path: path == "image_id")

    def _column(self, wanted: Callable[[str], bool]) -> Iterator[Any]:
        for path in self._shards:
            file = _open_shard(path)
            columns = [column.path for column in file.schema if wanted(column.path)]
            for group in range(file.num_row_groups):
                try:
                    yield from file.read_row_group(group, columns=columns).column(0).to_pylist()
                except (OSError, ValueError) as error:
                    raise _broken_shard(path, error) from error

    def fingerprint(self) -> str:
        """Return a short hash of which labels there are: shard names, sizes of files, numbers of rows."""
        parts = [f"{path.name} {path.stat().st_size}" for path in self._shards] + [str(len(self))]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def _read(self, index: int) -> tuple[ImageLabel, ImagePlace]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        rows, row = self._rows(number), index - int(self._first[number])
        label = rows.label(row)
        if row not in rows.checked:
            check_label(label, self._shards[self._group_shard[number]])
            rows.checked.add(row)
        return label, rows.place(row)

    def _rows(self, number: int) -> LabelRows:
        if number in self._decoded:
            self._decoded.move_to_end(number)
            return self._decoded[number]
        shard = self._group_shard[number]
        if shard not in self._open:
            file = _open_shard(self._shards[shard])
            columns = [column.path for column in file.schema if self._masks or not is_mask(column.path)]
            self._open[shard] = file, columns
        file, columns = self._open[shard]
        try:
            # On one thread: loaders have a process per core.
            rows = LabelRows(file.read_row_group(self._group[number], columns=columns, use_threads=False))
        except (OSError, ValueError) as error:
            raise _broken_shard(self._shards[shard], error) from error
        self._decoded[number] = rows
        if len(self._decoded) > self._cached:
            self._decoded.popitem(last=False)
        return rows

    def _bytes(self, place: ImagePlace) -> bytes:
        path = self.folder / place.file
        try:
            if place.file not in self._maps:
                with path.open("rb") as file:
                    if place.offset == 0 and path.stat().st_size == place.bytes:
                        # A file of its own is read once; only files of many images are worth a map.
                        return file.read()
                    self._maps[place.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise DataError("The images of labels cannot be read", where=path, found=error) from error
        data = self._maps[place.file][place.offset : place.offset + place.bytes]
        if len(data) != place.bytes:
            raise DataError(
                "A file of images is too short",
                where=path,
                found=f"{len(self._maps[place.file])} bytes",
                expected=f"at least {place.offset + place.bytes}",
                remedy="copy it again, together with its .parquet file",
            )
        return data


def _open_shard(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path, memory_map=True)
    except (OSError, pa.ArrowInvalid) as error:
        raise _broken_shard(path, error) from error
    version = (file.schema_arrow.metadata or {}).get(VERSION_KEY)
    if version != str(VERSION).encode():
        raise DataError(
            "A file of labels has an unknown schema version",
            where=path,
            found="no version" if version is None else version.decode(errors="replace"),
            expected=VERSION,
            remedy="update the package, or make the labels again",
        )
    missing = set(arrow_schema().names) - set(file.schema_arrow.names)
    if missing:
        raise DataError("A file of labels lacks columns", where=path, found=f"no {', '.join(sorted(missing))}")
    return file


def _broken_shard(path: Path, error: Exception) -> DataError:
    return DataError("A file of labels cannot be read", where=path, found=error, expected="a whole Parquet file")

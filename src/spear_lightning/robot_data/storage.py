"""Where data sets lie: folders of this machine, or buckets (gs://, s3://, ...) through fsspec.

Local places are plain `pathlib` paths, with memory maps and byte ranges of open files. A `BucketPath` offers the
same few operations for addresses that fsspec has a driver for.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlparse

from spear_lightning.errors import ConfigError, DataError

READ_AHEAD = 16 << 20
"""Bytes fetched at a time when a file in a bucket is read from end to end."""

DRIVERS = {"gs": "gcs", "gcs": "gcs", "s3": "s3"}
"""Protocol -> extra of this package that installs its driver."""

_STAMPS = ("etag", "ETag", "md5Hash", "mtime", "LastModified", "updated", "last_modified", "created")


class BucketPath:
    """A file or folder in a bucket. Holds an address alone, so it travels to worker processes.

    Args:
        url: E.g. "gs://gresearch/robotics"; chains such as "filecache::gs://..." are fsspec's.
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        from fsspec.core import url_to_fs

        try:
            filesystem, path = url_to_fs(self._url)
        except (ImportError, ValueError) as error:
            protocol = self._url.split("::")[-1].split("://")[0]
            extra = DRIVERS.get(protocol)
            raise ConfigError(
                "There is no driver for this place",
                where=self._url,
                found=error,
                expected="a folder, gs://, s3://, or another protocol of fsspec",
                remedy=f"pip install 'spear-lightning[{extra}]'" if extra else "install fsspec's driver for it",
            ) from error
        return filesystem, path

    @property
    def name(self) -> str:
        """Last part of the address."""
        return self._url.rsplit("/", 1)[-1]

    @property
    def parent(self) -> BucketPath:
        """What it is in."""
        return BucketPath(self._url.rsplit("/", 1)[0])

    def __truediv__(self, name: str) -> BucketPath:
        return BucketPath(f"{self._url}/{name}")

    def __str__(self) -> str:
        return self._url

    def __repr__(self) -> str:
        return f"BucketPath({self._url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BucketPath) and self._url == other._url

    def __hash__(self) -> int:
        return hash(self._url)

    def __getstate__(self) -> dict[str, Any]:
        return {"_url": self._url}

    def is_dir(self) -> bool:
        """Return whether it is a folder that holds something."""
        filesystem, path = self._opened
        return bool(filesystem.isdir(path))

    def is_file(self) -> bool:
        """Return whether it is a file."""
        filesystem, path = self._opened
        return bool(filesystem.isfile(path))

    def iterdir(self) -> Iterator[BucketPath]:
        """Yield what a folder holds."""
        for name in self._listing():
            yield self / name

    def open(self, mode: str = "rb") -> BinaryIO:
        """Open a file for reading; fetches ahead."""
        filesystem, path = self._opened
        file: BinaryIO = filesystem.open(path, mode, block_size=READ_AHEAD)
        return file

    def read_bytes(self) -> bytes:
        """Return a file's content."""
        filesystem, path = self._opened
        return bytes(filesystem.cat_file(path))

    def read_text(self) -> str:
        """Return a file's content as text."""
        return self.read_bytes().decode()

    def read_ranges(self, names: Sequence[str], spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return parts of files of this folder, fetched at the same time where the driver can.

        Args:
            names: File of each part.
            spans: (first byte, one past the last) of each part.

        Raises:
            DataError: If one cannot be read.
        """
        filesystem, path = self._opened
        starts, ends = [start for start, _ in spans], [end for _, end in spans]
        parts = filesystem.cat_ranges([f"{path}/{name}" for name in names], starts, ends, on_error="return")
        for name, (start, end), part in zip(names, spans, parts, strict=True):
            if isinstance(part, Exception) or len(part) != end - start:
                raise DataError(
                    "A part of a file in a bucket cannot be read",
                    where=f"{self._url}/{name}, bytes {start} to {end}",
                    found=f"{type(part).__name__}: {part}"
                    if isinstance(part, Exception)
                    else f"{len(part)} bytes",
                    remedy="check the connection and the permissions; index the data set again if it has changed",
                ) from (part if isinstance(part, Exception) else None)
        return [bytes(part) for part in parts]

    def sizes(self) -> dict[str, tuple[int, str]]:
        """Return the files of a folder: name -> (bytes, a mark that changes with the content)."""
        return {
            name: (int(info["size"]), str(next((info[key] for key in _STAMPS if info.get(key)), "")))
            for name, info in self._listing().items()
            if info.get("type") == "file"
        }

    def _listing(self) -> dict[str, dict[str, Any]]:
        filesystem, path = self._opened
        entries = filesystem.ls(path, detail=True)
        return {entry["name"].rstrip("/").rsplit("/", 1)[-1]: entry for entry in entries}


DataPath = Path | BucketPath
"""A file or folder of this machine, or in a bucket."""


def data_path(place: str | DataPath) -> DataPath:
    """Return where something is: in a bucket if it has a protocol other than "file://", else on this machine."""
    if isinstance(place, Path | BucketPath):
        return place.expanduser() if isinstance(place, Path) else place
    if place.startswith("file://"):
        return Path(unquote(urlparse(place).path))
    return BucketPath(place) if "://" in place else Path(place).expanduser()


def file_marks(paths: Iterable[DataPath]) -> list[tuple[str, int, int | str]]:
    """Return (name, bytes, a mark that changes with the content) of some files.

    Raises:
        FileNotFoundError: If one is not there; its `filename` says which.
    """
    marks: list[tuple[str, int, int | str]] = []
    listed: dict[BucketPath, dict[str, tuple[int, str]]] = {}
    for path in paths:
        if isinstance(path, Path):
            status = os.stat(path)
            marks.append((path.name, status.st_size, status.st_mtime_ns))
            continue
        # One listing of a folder instead of a question for every file in it.
        folder = path.parent
        if folder not in listed:
            listed[folder] = folder.sizes()
        if path.name not in listed[folder]:
            raise FileNotFoundError(2, "No such file in the bucket", str(path))
        marks.append((path.name, *listed[folder][path.name]))
    return marks

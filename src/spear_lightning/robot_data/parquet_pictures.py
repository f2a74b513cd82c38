"""Pictures that LeRobot data sets keep in their Parquet files (columns of type `image`).

Parquet has no way to one row: a row group is read as a whole, an episode as a rule, and kept for the next picture.
For training, a frame cache (`data.frame_cache`) reads each group once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spear_lightning.errors import DataError
from spear_lightning.robot_data.storage import DataPath

if TYPE_CHECKING:
    import pyarrow as pa

KEPT_GROUPS = 8
"""Row groups kept per process; of one camera each."""


class ParquetPictures:
    """Encoded pictures by file, column and row; used by one thread.

    Args:
        folder: Where the files are.
        files: Their names, below the folder.
    """

    def __init__(self, folder: DataPath, files: Sequence[str]) -> None:
        self._folder, self._files = folder, files
        self._groups: OrderedDict[tuple[int, str, int], list[bytes]] = OrderedDict()
        self._opened: tuple[int, Any, np.ndarray] | None = None

    def read(self, file: int, column: str, row: int) -> bytes:
        """Return the stored bytes of a picture, b"" if there are none.

        Raises:
            DataError: If the file cannot be read, or has no such row.
        """
        path = self._folder / self._files[file]
        try:
            table, starts = self._open(file, path)
            group = int(np.searchsorted(starts, row, side="right")) - 1
            key = (file, column, group)
            if key not in self._groups:
                pictures = encoded_pictures(table.read_row_group(group, [column]).column(column))
                if len(self._groups) >= KEPT_GROUPS:
                    self._groups.popitem(last=False)
                self._groups[key] = pictures
            self._groups.move_to_end(key)
            return self._groups[key][row - int(starts[group])]
        except (OSError, ValueError, IndexError, KeyError) as error:
            raise DataError(
                "A picture in a Parquet file cannot be read",
                where=f"{path}, column {column}, row {row}",
                found=f"{type(error).__name__}: {error}",
                remedy="download the file again, or index the data set where it is now",
            ) from error

    def _open(self, file: int, path: DataPath) -> tuple[Any, np.ndarray]:
        """Return a file and the first row of each of its row groups."""
        import pyarrow.parquet as pq

        if self._opened is None or self._opened[0] != file:
            table = (
                pq.ParquetFile(path, memory_map=True) if isinstance(path, Path) else pq.ParquetFile(path.open())
            )
            counts = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
            self._opened = (file, table, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))
        return self._opened[1], self._opened[2]


def encoded_pictures(column: pa.ChunkedArray) -> list[bytes]:
    """Return the bytes in a column of pictures, of structs (bytes, path) or bytes; b"" where there are none."""
    values = column.to_pylist()
    return [(value.get("bytes") if isinstance(value, dict) else value) or b"" for value in values]

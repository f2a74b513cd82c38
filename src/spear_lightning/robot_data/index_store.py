"""How an index lies on disk: raw arrays that can be memory-mapped, and one JSON file that describes them.

A folder is written under a temporary name and renamed when it is whole, so an interrupted run leaves nothing
that could be taken for an index.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from spear_lightning.errors import DataError

SCHEMA = 1
"""Version of the layout; indexes of another version are made again."""

DESCRIPTION = "index.json"


class ArrayFolderWriter:
    """Writes a folder of arrays that grow by appending; use as a context manager.

    Args:
        folder: The final folder; exists only after `finish`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._temporary = folder.with_name(f".{folder.name}.{socket.gethostname()}.{os.getpid()}.tmp")
        self._files: dict[str, Any] = {}
        self._arrays: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> ArrayFolderWriter:
        self._temporary.parent.mkdir(parents=True, exist_ok=True)
        for leftover in self._temporary.parent.glob(f".*.{socket.gethostname()}.*.tmp"):
            if not _is_running(int(leftover.name.split(".")[-2])):
                shutil.rmtree(leftover, ignore_errors=True)
        self._temporary.mkdir()
        return self

    def append(self, name: str, rows: np.ndarray) -> None:
        """Append rows (n, ...) to an array; all rows of an array have one type and shape."""
        if name not in self._files:
            file = f"{name.replace('/', '.')}.bin"
            self._files[name] = (self._temporary / file).open("wb")
            self._arrays[name] = {
                "file": file,
                "dtype": rows.dtype.str,
                "row": list(rows.shape[1:]),
                "rows": 0,
            }
        self._files[name].write(np.ascontiguousarray(rows).tobytes())
        self._arrays[name]["rows"] += len(rows)

    def finish(self, description: dict[str, Any]) -> None:
        """Write the description and give the folder its name, in place of an older one if there is one."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        text = json.dumps({"schema": SCHEMA, **description, "arrays": self._arrays}, indent=1)
        with (self._temporary / DESCRIPTION).open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        replaced = self._temporary.with_suffix(".replaced")
        with contextlib.suppress(FileNotFoundError):
            # A folder cannot be renamed onto one that is not empty; processes that map the old one keep it.
            os.rename(self.folder, replaced)
        try:
            os.rename(self._temporary, self.folder)
        except OSError:
            # Another process may have finished the same folder in between: it is as good.
            if not (self.folder / DESCRIPTION).is_file():
                raise
        shutil.rmtree(replaced, ignore_errors=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()
        shutil.rmtree(self._temporary, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    # A leftover of an earlier process that had this process's number.
    return pid != os.getpid()


def read_array_folder(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the description of a folder and its arrays, memory-mapped and read-only.

    Raises:
        DataError: If the folder is not an index, of another version, or a file has the wrong size.
    """
    path = folder / DESCRIPTION
    try:
        description = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(
            "This is not an index", where=folder, found=error, remedy="make one with `spear data index`"
        ) from error
    if description.get("schema") != SCHEMA:
        raise DataError(
            "The index was written by another version of the package",
            where=path,
            found=f"schema {description.get('schema')}",
            expected=f"schema {SCHEMA}",
            remedy="delete the folder and make it again with `spear data index`",
        )
    arrays = {}
    for name, layout in description["arrays"].items():
        file = folder / layout["file"]
        dtype = np.dtype(layout["dtype"])
        shape = (layout["rows"], *layout["row"])
        expected = dtype.itemsize * int(np.prod(shape))
        found = file.stat().st_size if file.is_file() else None
        if found != expected:
            raise DataError(
                "A file of the index has the wrong size",
                where=file,
                found="missing" if found is None else f"{found} bytes",
                expected=f"{expected} bytes",
                remedy="delete the index folder and make it again with `spear data index`",
            )
        arrays[name] = np.memmap(file, dtype, "r", shape=shape) if expected else np.zeros(shape, dtype)
    return description, arrays


def default_index_root() -> Path:
    """Return where indexes are kept unless told otherwise: $SPEAR_CACHE_DIR or ~/.cache/spear-lightning."""
    cache = os.environ.get("SPEAR_CACHE_DIR")
    root = Path(cache) if cache else Path.home() / ".cache" / "spear-lightning"
    return root.expanduser() / "indexes"

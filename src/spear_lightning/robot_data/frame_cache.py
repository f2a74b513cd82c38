"""Pictures made once at the size the model sees, so that later epochs neither decode full frames nor resize.

A cache is a folder: parts of some hundred megabytes that hold picture after picture, where each frame's picture
begins (`offset.bin`) and how long it is (`length.bin`; 0: the frame has none), and `cache.json`, written last: a
folder without it is not finished. `frame_cache_build` makes it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import simplejpeg
from torch import Tensor

from spear_lightning.errors import DataError
from spear_lightning.robot_data.episode_index import EpisodeIndex
from spear_lightning.robot_data.images import CameraSpec

SCHEMA = 1
"""Version of the layout and of how pictures are made; caches of another version are not found."""

DESCRIPTION = "cache.json"
OFFSETS, LENGTHS = "offset.bin", "length.bin"
OPEN_PARTS = 64

CacheKind = Literal["exact", "jpeg"]
"""How pictures are kept: "exact", pixels as they are (3 bytes each), or "jpeg", encoded once more (quality 95)."""


def cache_folder(root: Path, index: EpisodeIndex, camera: str, spec: CameraSpec, kind: CacheKind) -> Path:
    """Return where the pictures of a camera are kept: a name for the data, the camera's size, and the kind.

    Args:
        root: Folder of indexes; caches are beside them.
        index: The data set.
        camera: Its camera.
        spec: What the model sees of it.
        kind: How pictures are kept.
    """
    about = index.description
    identity = [
        SCHEMA,
        camera,
        {**asdict(spec), "source": None},
        kind,
        about["images_verified"],
        about["problems"],
    ]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    return root / "frames" / index.folder.name / f"{camera}-{spec.width}x{spec.height}-{kind}-{digest}"


def part_file(folder: Path, number: int) -> Path:
    """Return the file of a part."""
    return folder / f"{number:05d}.pictures"


class FrameCache:
    """The pictures of one camera of one data set, read from a finished cache (see `pictures.Pictures`).

    Instances can be sent to worker processes; memory does not grow with the data set.

    Args:
        folder: The cache.

    Attributes:
        description: Its `cache.json`: size, kind, pictures, bytes, frames left out.

    Raises:
        DataError: If it is not whole.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.description: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text())
            frames = self.description["frames"]
            self._offsets = np.memmap(folder / OFFSETS, np.int64, "r", shape=(frames,))
            self._lengths = np.memmap(folder / LENGTHS, np.int32, "r", shape=(frames,))
        except (OSError, ValueError) as error:
            raise self._damaged(error) from error
        self._exact = self.description["kind"] == "exact"
        self._starts = np.array(self.description["part_starts"], np.int64)
        self._files: OrderedDict[int, int] = OrderedDict()

    def read_into(self, frame: int, episode: int, out_3HW: Tensor) -> bool:
        """Write a frame's picture into its place; returns whether there is one.

        Raises:
            DataError: If the cache is damaged.
        """
        length = int(self._lengths[frame])
        if length == 0:
            return False
        out_HW3 = out_3HW.permute(1, 2, 0).numpy()
        offset = int(self._offsets[frame])
        part = int(np.searchsorted(self._starts, offset, side="right")) - 1
        file, offset = self._open_part(part), offset - int(self._starts[part])
        if self._exact:
            found = os.preadv(file, [out_HW3.data.cast("B")], offset)
        else:
            data = os.pread(file, length, offset)
            found = len(data)
        if found != length:
            raise self._damaged(f"{part_file(self.folder, part)} is too short")
        if not self._exact:
            try:
                simplejpeg.decode_jpeg(data, colorspace="RGB", buffer=out_HW3)
            except ValueError as error:
                raise self._damaged(f"{part_file(self.folder, part)}, byte {offset}: {error}") from error
        return True

    def fetch(self, frames: np.ndarray, episodes: np.ndarray) -> None:
        """Do nothing: the pictures are on this machine (see `Pictures`)."""

    def _open_part(self, part: int) -> int:
        file = self._files.pop(part, None)
        if file is None:
            try:
                file = os.open(part_file(self.folder, part), os.O_RDONLY)
            except OSError as error:
                raise self._damaged(error) from error
            if len(self._files) >= OPEN_PARTS:
                os.close(self._files.popitem(last=False)[1])
        self._files[part] = file
        return file

    def _damaged(self, found: object) -> DataError:
        return DataError(
            "A cache of frames is damaged",
            where=self.folder,
            found=found,
            remedy="delete the folder: it is made again when it is needed",
        )

    def close(self) -> None:
        """Close the files that are open in this process."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

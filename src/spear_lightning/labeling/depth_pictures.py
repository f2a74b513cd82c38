"""A store of pictures with exact depth, for training geometry networks: plain arrays, read without decoding.

A folder holds shards of three NumPy files. `NUMBER.images.npy`: uint8 RGB (N, 3, H, W). `NUMBER.depth.npy`:
float32 (N, H, W), z in metres, inf where nothing is. `NUMBER.focal.npy`: float32 (N,), focal lengths in image
widths of cameras with square pixels and the principal point in the middle. A shard is there when its focal
lengths are: they are written last.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from spear_lightning.batches import GeometryBatch
from spear_lightning.errors import DataError

PARTS = ("images", "depth", "focal")
"""Kinds of file of a shard, in the order they are written."""


def write_shard(
    folder: Path, number: int, images_N3HW: np.ndarray, depth_NHW: np.ndarray, focal_N: np.ndarray
) -> None:
    """Write a shard, whole or not at all.

    Args:
        folder: The store.
        number: Of the shard.
        images_N3HW: uint8 RGB.
        depth_NHW: z in metres, inf where nothing is.
        focal_N: Focal lengths in image widths.
    """
    arrays = (images_N3HW, depth_NHW.astype(np.float32), focal_N.astype(np.float32))
    for part, array in zip(PARTS, arrays, strict=True):
        unfinished = folder / f".{number:05d}.{part}.{os.getpid()}.tmp"
        with unfinished.open("wb") as file:
            np.save(file, array)
        unfinished.replace(folder / f"{number:05d}.{part}.npy")


class DepthPictures:
    """Reads a store; files stay memory-mapped.

    Args:
        folder: The store.

    Raises:
        DataError: If there is no whole shard, or shards differ in size.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        numbers = sorted(path.name.split(".")[0] for path in self.folder.glob("*.focal.npy"))
        try:
            self._shards = [
                tuple(np.load(self.folder / f"{number}.{part}.npy", mmap_mode="r") for part in PARTS)
                for number in numbers
            ]
        except (OSError, ValueError) as error:
            raise DataError("A shard of pictures with depth cannot be read", where=folder, found=error) from error
        sizes = {images.shape[1:] for images, _, _ in self._shards}
        if len(sizes) != 1:
            raise DataError(
                "There are no pictures with depth of one size",
                where=folder,
                found=f"{len(numbers)} shards, sizes {sorted(sizes)}",
                expected="shards of `spear data tabletop --depth_pictures N`",
            )
        self._starts = np.cumsum([0, *(len(focal) for _, _, focal in self._shards)])

    def __len__(self) -> int:
        """Return the number of pictures."""
        return int(self._starts[-1])

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pictures."""
        height, width = self._shards[0][0].shape[2:]
        return height, width

    @property
    def fingerprint(self) -> str:
        """Tells stores apart: a hash of the focal lengths, which scenes decide."""
        digest = hashlib.sha256()
        for _, _, focal_N in self._shards:
            digest.update(np.ascontiguousarray(focal_N).tobytes())
        return digest.hexdigest()[:16]

    def read(self, indices: Sequence[int] | np.ndarray, positions: Sequence[int] | None = None) -> GeometryBatch:
        """Return some pictures.

        Args:
            indices: Numbers of pictures.
            positions: Their places in the sample stream; default: their numbers.
        """
        places = np.asarray(indices)
        shards = np.searchsorted(self._starts, places, side="right") - 1
        offsets = places - self._starts[shards]
        parts = [
            np.stack([self._shards[shard][part][offset] for shard, offset in zip(shards, offsets, strict=True)])
            for part in range(len(PARTS))
        ]
        images, depth, focal = (torch.from_numpy(part) for part in parts)
        return GeometryBatch(images, depth, focal, torch.as_tensor(places if positions is None else positions))

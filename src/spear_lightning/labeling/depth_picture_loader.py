"""Batches of pictures with depth: an endless shuffled stream for training, and all held-out ones in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from spear_lightning.batches import GeometryBatch
from spear_lightning.errors import CheckpointError
from spear_lightning.labeling.depth_pictures import DepthPictures
from spear_lightning.robot_data.permutation import permute_each
from spear_lightning.robot_data.resumable_stream import ResumableStream, StreamBatches
from spear_lightning.robot_data.worker_processes import WorkerLoader


class ShuffledPictures(Dataset[GeometryBatch]):
    """The first pictures of a store, in another order in every epoch; its items are whole batches.

    Args:
        pictures: The store.
        count: How many of its pictures are trained on: the first ones, so that no scene is on both sides.
        seed: Of the order.
    """

    def __init__(self, pictures: DepthPictures, count: int, seed: int) -> None:
        self.pictures, self.count, self.seed = pictures, count, seed

    def __getitem__(self, places: list[int]) -> GeometryBatch:
        """Return the pictures at places of the endless stream."""
        epochs, index = np.divmod(np.asarray(places, np.int64), self.count)
        unique, which = np.unique(epochs, return_inverse=True)
        keys = [self.seed * 1_000_003 + int(epoch) for epoch in unique]
        return self.pictures.read(permute_each(index, self.count, keys, which), places)

    def __getitems__(self, places: list[int]) -> GeometryBatch:
        """Do the same: torch's loader asks so for batches."""
        return self[places]


class PictureStream(ResumableStream[GeometryBatch]):
    """Iterates over epochs of a fixed number of batches; continues exactly where its state says.

    Args:
        dataset: Reads batches.
        batch_size: Samples per process and step.
        epoch_batches: Batches after which an epoch ends.
        rank: This process.
        world_size: Number of processes.
        num_workers: Worker processes; 0 reads in this process.
        device: GPU that batches are copied to, each while the one before is worked on; `None` leaves them in CPU
            memory.
        data: Fingerprint of the data; a state of other data is refused.
    """

    def __init__(
        self,
        dataset: ShuffledPictures,
        batch_size: int,
        epoch_batches: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        device: torch.device | None = None,
        data: str = "",
    ) -> None:
        super().__init__(batch_size, epoch_batches, rank, world_size, data, device)
        self.dataset = dataset
        self._num_workers = num_workers

    def open_at(self, places: StreamBatches) -> Iterable[GeometryBatch]:
        """Return what reads the batches of some places, in order and without end."""
        return WorkerLoader(self.dataset, places, self._num_workers, pin_memory=self._device is not None)

    def check_state(self, state: dict[str, Any]) -> None:
        """Refuse other data and another global batch size.

        Raises:
            CheckpointError: If one of them differs.
        """
        own = {"data": self._data, "global_batch_size": self.batch_size * self._world_size}
        differing = {name: value for name, value in own.items() if state[name] != value}
        if differing:
            raise CheckpointError(
                "The run to resume read its pictures otherwise",
                where="data",
                found=differing,
                expected={name: state[name] for name in differing},
                remedy="restore the data and the batch size, or start a new run with --model.init_from",
            )


class PicturesInOrder:
    """Iterates over some pictures of a store; the last batch may be smaller.

    Args:
        pictures: The store.
        numbers: Which pictures.
        batch_size: Samples per batch.
    """

    def __init__(self, pictures: DepthPictures, numbers: range, batch_size: int) -> None:
        self.pictures, self.numbers, self.batch_size = pictures, numbers, batch_size

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self.numbers) // self.batch_size)

    def __iter__(self) -> Iterator[GeometryBatch]:
        """Yield the batches."""
        for start in range(0, len(self.numbers), self.batch_size):
            yield self.pictures.read(self.numbers[start : start + self.batch_size])

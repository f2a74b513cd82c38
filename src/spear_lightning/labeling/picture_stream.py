"""Batches of pictures for networks that are trained on pictures alone: an endless stream, and passes in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch.utils.data import Dataset

from spear_lightning.errors import CheckpointError
from spear_lightning.robot_data.device_copies import Batch
from spear_lightning.robot_data.resumable_stream import ResumableStream, StreamBatches
from spear_lightning.robot_data.worker_processes import WorkerLoader

Read = TypeVar("Read", covariant=True)


class PictureStream(ResumableStream[Batch]):
    """Iterates over epochs of a fixed number of batches; continues exactly where its state says.

    Args:
        dataset: Reads batches: its items are those of lists of places in the endless stream.
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
        dataset: Dataset[Batch],
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

    def open_at(self, places: StreamBatches) -> Iterable[Batch]:
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


class ReadsPictures(Protocol[Read]):
    """Reads the batch of some pictures."""

    def read(self, indices: Sequence[int]) -> Read:
        """Return pictures by their numbers."""
        ...


class PicturesInOrder(Generic[Read]):
    """Iterates over some pictures; the last batch may be smaller.

    Args:
        pictures: What reads them.
        numbers: Which pictures.
        batch_size: Samples per batch.
    """

    def __init__(self, pictures: ReadsPictures[Read], numbers: range, batch_size: int) -> None:
        self.pictures, self.numbers, self.batch_size = pictures, numbers, batch_size

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self.numbers) // self.batch_size)

    def __iter__(self) -> Iterator[Read]:
        """Yield the batches."""
        for start in range(0, len(self.numbers), self.batch_size):
            yield self.pictures.read(self.numbers[start : start + self.batch_size])

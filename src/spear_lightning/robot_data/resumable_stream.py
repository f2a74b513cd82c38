"""Batches of places: epochs of an endless stream whose state is one number, and passes over some places."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic

import numpy as np
import torch

from spear_lightning.robot_data.device_copies import Batch, DeviceCopies


class StreamBatches:
    """Batches of places in the global stream for one process, from a given batch on, without end.

    Batch b of all processes together holds places [b * G, (b + 1) * G), G = batch size times processes; so
    the samples of a step do not depend on the number of processes, only who gets which.

    Args:
        batch_size: Samples per process.
        rank: This process.
        world_size: Number of processes.
        first: First batch.
    """

    def __init__(self, batch_size: int, rank: int, world_size: int, first: int) -> None:
        self._batch_size, self._rank, self._world_size, self._first = batch_size, rank, world_size, first

    def __iter__(self) -> Iterator[list[int]]:
        number = self._first
        while True:
            start = (number * self._world_size + self._rank) * self._batch_size
            yield np.arange(start, start + self._batch_size).tolist()
            number += 1


class ResumableStream(ABC, Generic[Batch]):
    """Iterates over epochs of a fixed number of batches; continues exactly where its state says.

    What reads ahead has a position of no use after a restart; what is saved is the number of batches handed out.

    Args:
        batch_size: Samples per process and step.
        epoch_batches: Batches after which an epoch ends.
        rank: This process.
        world_size: Number of processes.
        data: Fingerprint of the data; a state of other data is refused.
        device: GPU that batches are copied to, each while the one before is worked on; `None` leaves them in CPU
            memory.
    """

    def __init__(
        self,
        batch_size: int,
        epoch_batches: int,
        rank: int,
        world_size: int,
        data: str,
        device: torch.device | None = None,
    ) -> None:
        self.batch_size = batch_size
        self._data = data
        self._epoch_batches = epoch_batches
        self._rank, self._world_size = rank, world_size
        self._device = device
        self._given = 0
        self._running: Iterator[Batch] | None = None

    @abstractmethod
    def open_at(self, places: StreamBatches) -> Iterable[Batch]:
        """Return what reads the batches of some places, in order and without end."""

    @abstractmethod
    def check_state(self, state: dict[str, Any]) -> None:
        """Raise a `CheckpointError` if a state is of another stream."""

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        return self._epoch_batches

    def __iter__(self) -> Iterator[Batch]:
        """Yield the rest of the current epoch; at its end the next iteration begins a new one."""
        if self._running is None:
            places = StreamBatches(self.batch_size, self._rank, self._world_size, self._given)
            self._running = iter(DeviceCopies(self.open_at(places), self._device))
        while True:
            batch = next(self._running)
            self._given += 1
            yield batch
            if self._given % self._epoch_batches == 0:
                return

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs to continue exactly."""
        size = self.batch_size * self._world_size
        return {"batches": self._given, "global_batch_size": size, "data": self._data}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint, also with another number of processes.

        Raises:
            CheckpointError: If the global batch size or the data differ: it would be another stream.
        """
        self.check_state(state)
        self._given = state["batches"]
        self._running = None


class FinitePass(Generic[Batch]):
    """Iterates over some places in order, again and again; the last batch may be smaller.

    Not a `DataLoader`, so that the trainer takes it as it is instead of putting samplers of its own into it.

    Args:
        places: Which places.
        batch_size: Samples per batch.
        open_reader: Returns what reads the batches of some places, in order.
        device: GPU that batches are copied to; `None` leaves them in CPU memory.
    """

    def __init__(
        self,
        places: range,
        batch_size: int,
        open_reader: Callable[[list[list[int]]], Iterable[Batch]],
        device: torch.device | None = None,
    ) -> None:
        starts = range(places.start, places.stop, batch_size)
        self._batches = [list(range(start, min(start + batch_size, places.stop))) for start in starts]
        self._copies = DeviceCopies(open_reader(self._batches), device)

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches."""
        return iter(self._copies)

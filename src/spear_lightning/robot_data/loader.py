"""A data loader over an endless stream whose state is one number: how many batches were handed out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from spear_lightning.batches import RobotBatch
from spear_lightning.errors import CheckpointError
from spear_lightning.robot_data.dataset import RobotDataset
from spear_lightning.robot_data.read_ahead import Reading, open_reader


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


class ResumableLoader:
    """Iterates over epochs of a fixed number of batches; continues exactly where its state says.

    Workers and threads run ahead, so their position is of no use after a restart; what is saved is the number of
    batches handed out. They live from the first batch to the end of training: an epoch costs no restart.

    Args:
        dataset: Reads batches at places of an endless stream.
        batch_size: Samples per process and step.
        epoch_batches: Batches after which an epoch ends.
        rank: This process.
        world_size: Number of processes.
        num_workers: Worker processes; 0 reads in this process.
        prefetch: Batches each worker or thread prepares ahead.
        pin_memory: Whether batches are put into page-locked memory.
        data: Fingerprint of the data; a state of other data is refused.
        num_threads: Threads of this process that read ahead; for 0 workers. 0 reads when a batch is asked for.
    """

    def __init__(
        self,
        dataset: RobotDataset,
        batch_size: int,
        epoch_batches: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        prefetch: int = 2,
        pin_memory: bool = False,
        data: str = "",
        num_threads: int = 0,
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self._data = data
        self._epoch_batches = epoch_batches
        self._rank, self._world_size = rank, world_size
        self._reading = Reading(num_workers, num_threads, prefetch, pin_memory)
        self._given = 0
        self._running: Iterator[RobotBatch] | None = None

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        return self._epoch_batches

    def __iter__(self) -> Iterator[RobotBatch]:
        """Yield the rest of the current epoch; at its end the next iteration begins a new one."""
        if self._running is None:
            places = StreamBatches(self.batch_size, self._rank, self._world_size, self._given)
            self._running = iter(open_reader(self.dataset, places, self.batch_size, self._reading))
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
        if state["data"] != self._data:
            raise CheckpointError(
                "The run to resume was trained on other data",
                where="data.root",
                found=f"episodes and frames with fingerprint {self._data}",
                expected=state["data"],
                remedy="restore the data as it was (also the index: --verify_images leaves frames out); or start "
                "a new run from its weights with --model.init_from",
            )
        own = self.batch_size * self._world_size
        if state["global_batch_size"] != own:
            raise CheckpointError(
                "The run to resume had another global batch size",
                where="data.batch_size",
                found=f"{own} (batch size {self.batch_size} x {self._world_size} processes)",
                expected=state["global_batch_size"],
                remedy="set the batch size so that batch size times processes stays the same",
            )
        self._given = state["batches"]
        self._running = None


class FiniteLoader:
    """Iterates over some places in order; the last batch may be smaller.

    Not a `DataLoader`, so that the trainer takes it as it is instead of putting samplers of its own into it.

    Args:
        dataset: Reads batches at places.
        places: Which places.
        batch_size: Samples per batch.
        num_workers: Worker processes; 0 reads in this process. They stay: validation comes again and again.
        pin_memory: Whether batches are put into page-locked memory.
        num_threads: Threads of this process that read ahead; for 0 workers.
    """

    def __init__(
        self,
        dataset: RobotDataset,
        places: range,
        batch_size: int,
        num_workers: int = 0,
        pin_memory: bool = False,
        num_threads: int = 0,
    ) -> None:
        starts = range(places.start, places.stop, batch_size)
        self._batches = [list(range(start, min(start + batch_size, places.stop))) for start in starts]
        reading = Reading(num_workers, num_threads, pin_memory=pin_memory)
        self._reader = open_reader(dataset, self._batches, batch_size, reading)

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._batches)

    def __iter__(self) -> Iterator[RobotBatch]:
        """Yield the batches."""
        return iter(self._reader)

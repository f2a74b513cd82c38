"""Batches read before they are asked for: by worker processes, or by threads of this process.

Both read into slots (`batch_slots`) and give the batches in order, so what comes out does not depend on who reads.
"""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from spear_lightning.batches import RobotBatch
from spear_lightning.errors import ConfigError
from spear_lightning.robot_data.batch_slots import BatchSlots
from spear_lightning.robot_data.dataset import RobotDataset
from spear_lightning.robot_data.worker_processes import WorkerLoader

HELD = 3
"""Batches the trainer holds at a time: the one it works on, the one fetched ahead, and one to spare."""

Places = Iterable[list[int]]
"""Of batch after batch; iterated anew by every pass."""


@dataclass(frozen=True)
class Reading:
    """Who reads.

    Attributes:
        num_workers: Worker processes; 0: this process.
        num_threads: Threads of this process, if there are no workers; 0: nothing is read ahead.
        prefetch: Batches each worker or thread prepares ahead.
        pin_memory: Whether batches are in page-locked memory.
    """

    num_workers: int = 0
    num_threads: int = 0
    prefetch: int = 2
    pin_memory: bool = False


def open_reader(dataset: RobotDataset, places: Places, batch_size: int, reading: Reading) -> Iterable[RobotBatch]:
    """Return batch after batch, as often as it is iterated.

    Args:
        dataset: Reads batches at places.
        places: Places of batch after batch.
        batch_size: Samples of a batch at most.
        reading: Who reads.

    Raises:
        ConfigError: If both processes and threads are wanted.
    """
    if reading.num_workers and reading.num_threads:
        raise ConfigError(
            "Batches are read either by worker processes or by threads",
            where="data.num_workers and data.num_threads",
            found=f"{reading.num_workers} and {reading.num_threads}",
            remedy="set one of them to 0",
        )
    if reading.num_workers:
        return WorkerReader(dataset, places, batch_size, reading)
    if reading.num_threads:
        return ThreadReader(dataset, places, batch_size, reading)
    return PromptReader(dataset, places, batch_size, reading)


class PromptReader:
    """Reads a batch when it is asked for.

    Args:
        dataset: Reads batches at places.
        places: Places of batch after batch.
        batch_size: Samples of a batch at most.
        reading: Whether memory is page-locked.
    """

    def __init__(self, dataset: RobotDataset, places: Places, batch_size: int, reading: Reading) -> None:
        self._dataset, self._places = dataset, places
        self._memory = own_memory(dataset, batch_size, HELD, reading.pin_memory)

    def __iter__(self) -> Iterator[RobotBatch]:
        """Yield the batches."""
        for places in self._places:
            batch = self._memory(len(places))
            self._dataset.fill(batch, places)
            yield batch


def own_memory(
    dataset: RobotDataset, batch_size: int, count: int, pin_memory: bool
) -> Callable[[int], RobotBatch]:
    """Return a function that returns memory of this process for a batch of some size."""
    if pin_memory:
        # Page-locked memory is torch's to use again: it knows when the copy to the GPU is done.
        return lambda size: dataset.empty(
            size, lambda shape, kind: torch.empty(shape, dtype=kind, pin_memory=True)
        )
    return BatchSlots(dataset, batch_size, count, shared=False).borrow


class WorkerReader:
    """Reads with processes; they stay from pass to pass.

    Args:
        dataset: Reads batches at places.
        places: Places of batch after batch.
        batch_size: Samples of a batch at most.
        reading: Processes, batches each prepares ahead, whether their memory is page-locked.
    """

    def __init__(
        self,
        dataset: RobotDataset,
        places: Places,
        batch_size: int,
        reading: Reading,
    ) -> None:
        ahead = reading.num_workers * reading.prefetch
        self._slots = BatchSlots(dataset, batch_size, ahead + HELD, shared=True)
        # Where the slots themselves cannot be, batches are copied once more.
        self._copies_to_pin = reading.pin_memory and not self._slots.lock_pages()
        writer, tasks = _SlotWriter(dataset, self._slots), _Tasks(places, self._slots)
        self._written: WorkerLoader[tuple[int | np.ndarray, int, list[str]]] = WorkerLoader(
            writer, tasks, reading.num_workers, reading.prefetch
        )

    def __iter__(self) -> Iterator[RobotBatch]:
        """Yield the batches.

        Raises:
            SpearError: What a worker raised, or that one is gone.
        """
        for slot, size, instructions in self._written:
            batch = self._slots.lend(slot, size, instructions)
            yield batch.pin_memory() if self._copies_to_pin else batch


class _Tasks:
    """What the workers are to do: (slot or None, places). Iterated by the trainer, which knows the slots."""

    def __init__(self, places: Places, slots: BatchSlots) -> None:
        self._places, self._slots = places, slots

    def __iter__(self) -> Iterator[tuple[int | None, list[int]]]:
        # A pass may have been left before its end; its workers are idle when the next one asks for its first task.
        self._slots.reclaim()
        for places in self._places:
            yield self._slots.take(), places


class _SlotWriter:
    """The data set in a worker: writes batches into their slots, and returns what is not tensors."""

    def __init__(self, dataset: RobotDataset, slots: BatchSlots) -> None:
        self._dataset, self._slots = dataset, slots

    def __getitem__(self, task: Any) -> Any:
        return self.__getitems__(task)

    def __getitems__(self, task: tuple[int | None, list[int]]) -> tuple[int | np.ndarray, int, list[str]]:
        slot, places = task
        # Without a slot the memory travels by value. torch would share tensors through files that have a name for
        # a moment, and stay if the process is killed in it.
        memory = self._slots.spare() if slot is None else slot
        batch = self._slots.open(memory, len(places))
        self._dataset.fill(batch, places)
        return memory, len(places), batch.instructions


class ThreadReader:
    """Reads with threads of this process: no copies between processes, and little memory.

    Decoding and resizing run outside of Python's lock; the little that is left under it slows the trainer's own
    Python down as samples per second grow.

    Args:
        dataset: Reads batches at places.
        places: Places of batch after batch.
        batch_size: Samples of a batch at most.
        reading: Threads, batches each prepares ahead, whether they are made in page-locked memory.
    """

    def __init__(
        self,
        dataset: RobotDataset,
        places: Places,
        batch_size: int,
        reading: Reading,
    ) -> None:
        self._places = places
        self._num_threads = reading.num_threads
        self._ahead = reading.num_threads * reading.prefetch
        self._memory = own_memory(dataset, batch_size, self._ahead + HELD, reading.pin_memory)
        self._dataset = dataset
        self._own = threading.local()

    def __iter__(self) -> Iterator[RobotBatch]:
        """Yield the batches.

        Raises:
            SpearError: What a thread raised.
        """
        waiting: deque[Future[RobotBatch]] = deque()
        pool = ThreadPoolExecutor(self._num_threads, "robot-data")
        try:
            for places in self._places:
                waiting.append(pool.submit(self._read, self._memory(len(places)), places))
                if len(waiting) > self._ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, batch: RobotBatch, places: list[int]) -> RobotBatch:
        if not hasattr(self._own, "dataset"):
            # Of this thread alone: it shall not wake others for small tensors.
            torch.set_num_threads(1)
            # Open files belong to a data set: each thread gets its own.
            self._own.dataset = copy.deepcopy(self._dataset)
        self._own.dataset.fill(batch, places)
        return batch

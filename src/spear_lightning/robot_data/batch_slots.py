"""Memory for a few batches that is used again and again: written in one process, handed out in another.

A batch of pictures is megabytes. New memory for each costs more than it seems: the system clears every page, and
what a worker process made must be copied and mapped anew. Slots are shared once. One is free again when the last
tensor that was made of it is gone, so nothing that anybody still holds is ever written over.
"""

from __future__ import annotations

import contextlib
import logging
import math
import weakref
from collections import deque

import numpy as np
import torch
from torch import Tensor

from spear_lightning.batches import RobotBatch
from spear_lightning.errors import ConfigError
from spear_lightning.robot_data.dataset import RobotDataset

log = logging.getLogger(__name__)

ALIGNMENT = 64
"""Bytes; of a cache line."""

_FOR_ALL_DEVICES = 1
"""cudaHostRegisterPortable."""


class BatchSlots:
    """Slots for batches of one size. What is shared has no name in the file system, so it cannot be left behind.

    Args:
        dataset: Whose batches; says their tensors.
        batch_size: Samples at most.
        count: Slots.
        shared: Whether worker processes write into the slots; they get the object as an argument.

    Raises:
        ConfigError: If there is not enough shared memory.
    """

    def __init__(self, dataset: RobotDataset, batch_size: int, count: int, shared: bool) -> None:
        self._dataset, self._batch_size = dataset, batch_size
        measure = _Carver(None)
        dataset.empty(batch_size, measure)
        self._memory = torch.empty((count, measure.used), dtype=torch.uint8)
        if shared:
            try:
                self._memory.share_memory_()
            except RuntimeError as error:
                raise ConfigError(
                    "There is not enough shared memory for the batches that workers prepare",
                    where="data.num_workers, data.prefetch",
                    found=error,
                    expected=f"{count} batches of {measure.used / 1e6:.1f} MB in /dev/shm",
                    remedy="give the container more (docker run --shm-size), lower both, or read in threads "
                    "(data.num_workers 0 and data.num_threads)",
                ) from error
        self._free = deque(range(count))
        self._written: set[int] = set()

    def lock_pages(self) -> bool:
        """Lock the slots in memory, once for all, so that a GPU can read them where they are.

        Returns:
            Whether the system permits it.
        """
        begin, driver = self._memory.data_ptr(), torch.cuda.cudart()
        code = int(driver.cudaHostRegister(begin, self._memory.nbytes, _FOR_ALL_DEVICES))
        if code == 0:
            weakref.finalize(self, driver.cudaHostUnregister, begin)
            return True
        log.warning("Batches go to the GPU more slowly: their memory cannot be page-locked (CUDA error %d)", code)
        # The error must be taken note of, or the next kernel would be blamed for it.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device="cuda")
        return False

    def take(self) -> int | None:
        """Return a slot that may be written; None if all are in use."""
        try:
            # The one that was freed last: it may still be in the processor's cache.
            slot = self._free.pop()
        except IndexError:
            return None
        self._written.add(slot)
        return slot

    def open(self, slot: int | np.ndarray, size: int) -> RobotBatch:
        """Return a slot, or memory of the size of one, as a batch of some samples, to be written into or read."""
        memory = torch.from_numpy(slot) if isinstance(slot, np.ndarray) else self._memory[slot]
        return self._dataset.empty(size, _Carver(memory))

    def spare(self) -> np.ndarray:
        """Return memory of the size of a slot, uint8, of this process alone: for when all slots are in use."""
        return np.empty(self._memory.shape[1], np.uint8)

    def lend(self, slot: int | np.ndarray, size: int, instructions: list[str]) -> RobotBatch:
        """Return the batch that was written into a slot; the slot is free when no tensor of it is left."""
        if isinstance(slot, np.ndarray):
            memory = slot
        else:
            # All tensors of the batch, and all views of them, hold this one object.
            memory = self._memory[slot].numpy()
            self._written.discard(slot)
            weakref.finalize(memory, self._free.append, slot).atexit = False
        batch = self.open(memory, size)
        batch.instructions = instructions
        return batch

    def borrow(self, size: int) -> RobotBatch:
        """Return a batch to be written into by this process: in a slot, or in other memory if all are in use."""
        slot = self.take()
        return self.lend(self.spare() if slot is None else slot, size, [""] * size)

    def reclaim(self) -> None:
        """Free the slots that were taken and never lent; nobody may be writing any more."""
        self._free.extend(self._written)
        self._written.clear()


class _Carver:
    """Allocates from a piece of memory, one part after the other; without one, only counts.

    Args:
        memory: uint8, flat.
    """

    def __init__(self, memory: Tensor | None) -> None:
        self._memory = memory
        self.used = 0

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        begin, count = self.used, math.prod(shape) * dtype.itemsize
        self.used += -(-count // ALIGNMENT) * ALIGNMENT
        if self._memory is None:
            return torch.empty(shape, dtype=dtype, device="meta")
        return self._memory[begin : begin + count].view(dtype).view(shape)

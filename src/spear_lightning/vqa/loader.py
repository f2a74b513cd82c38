"""Loaders of question batches: an endless resumable one for training, a finite one for validation.

Question batches vary in length, so they are not read into the fixed memory that robot batches have.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader

from spear_lightning.batches import VqaBatch
from spear_lightning.errors import CheckpointError
from spear_lightning.robot_data.loader import StreamBatches
from spear_lightning.robot_data.read_ahead import WORKER_START, as_is
from spear_lightning.vqa.dataset import VqaDataset


def open_loader(
    dataset: VqaDataset,
    batches: Iterable[list[int]],
    num_workers: int = 0,
    prefetch: int = 2,
    pin_memory: bool = False,
) -> DataLoader[VqaBatch]:
    """Return a loader of the batches of some places, in order.

    Args:
        dataset: Reads batches at places.
        batches: Places of batch after batch.
        num_workers: Worker processes, which stay from pass to pass; 0 reads in this process.
        prefetch: Batches each worker prepares ahead.
        pin_memory: Whether batches are put into page-locked memory.
    """
    options: dict[str, Any] = {}
    if num_workers:
        options = {
            "prefetch_factor": prefetch,
            "multiprocessing_context": WORKER_START,
            "persistent_workers": True,
        }
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=as_is,
        num_workers=num_workers,
        pin_memory=pin_memory,
        **options,
    )


class ResumableVqaLoader:
    """Iterates over epochs of a fixed number of batches; continues exactly where its state says.

    Workers run ahead, so what is saved is the number of batches handed out (as in `robot_data.loader`).

    Args:
        dataset: Reads batches at places of an endless stream.
        batch_size: Samples per process and step.
        epoch_batches: Batches after which an epoch ends.
        rank: This process.
        world_size: Number of processes.
        num_workers: Worker processes; 0 reads in this process.
        prefetch: Batches each worker prepares ahead.
        pin_memory: Whether batches are put into page-locked memory.
        data: Fingerprint of labels, tasks and tokens; a state of others is refused.
    """

    def __init__(
        self,
        dataset: VqaDataset,
        batch_size: int,
        epoch_batches: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        prefetch: int = 2,
        pin_memory: bool = False,
        data: str = "",
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self._data, self._epoch_batches = data, epoch_batches
        self._rank, self._world_size = rank, world_size
        self._reading = (num_workers, prefetch, pin_memory)
        self._given = 0
        self._running: Iterator[VqaBatch] | None = None

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        return self._epoch_batches

    def __iter__(self) -> Iterator[VqaBatch]:
        """Yield the rest of the current epoch; at its end the next iteration begins a new one."""
        if self._running is None:
            places = StreamBatches(self.batch_size, self._rank, self._world_size, self._given)
            self._running = iter(open_loader(self.dataset, places, *self._reading))
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
        own = {**self.state_dict(), "batches": state["batches"]}
        if state != own:
            raise CheckpointError(
                "The run to resume was trained on other questions",
                where="data",
                found=own,
                expected=state,
                remedy="restore labels, tasks, 3D tokens, and batch size times processes as they were; or start a "
                "new run from its weights with --model.init_from",
            )
        self._given = state["batches"]
        self._running = None

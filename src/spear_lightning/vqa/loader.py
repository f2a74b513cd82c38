"""Loaders of question batches: an endless resumable one for training, a finite one for validation.

Question batches vary in length, so they are not read into the fixed memory that robot batches have.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from spear_lightning.batches import VqaBatch
from spear_lightning.errors import CheckpointError
from spear_lightning.robot_data.resumable_stream import FinitePass, ResumableStream, StreamBatches
from spear_lightning.robot_data.worker_processes import WorkerLoader
from spear_lightning.vqa.dataset import VqaDataset


class ResumableVqaLoader(ResumableStream[VqaBatch]):
    """Iterates over epochs of a fixed number of batches; continues exactly where its state says.

    Args:
        dataset: Reads batches at places of an endless stream.
        batch_size: Samples per process and step.
        epoch_batches: Batches after which an epoch ends.
        rank: This process.
        world_size: Number of processes.
        num_workers: Worker processes; 0 reads in this process.
        prefetch: Batches each worker prepares ahead.
        device: GPU that batches are copied to, each while the one before is worked on; `None` leaves them in CPU
            memory.
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
        device: torch.device | None = None,
        data: str = "",
    ) -> None:
        super().__init__(batch_size, epoch_batches, rank, world_size, data, device)
        self.dataset = dataset
        self._num_workers, self._prefetch = num_workers, prefetch

    def open_at(self, places: StreamBatches) -> Iterable[VqaBatch]:
        """Return what reads the batches of some places, in order and without end."""
        pinned = self._device is not None
        return WorkerLoader(self.dataset, places, self._num_workers, self._prefetch, pin_memory=pinned)

    def check_state(self, state: dict[str, Any]) -> None:
        """Refuse other questions and another global batch size.

        Raises:
            CheckpointError: If one of them differs.
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


class FiniteVqaLoader(FinitePass[VqaBatch]):
    """Iterates over some places in order; the last batch may be smaller.

    Args:
        dataset: Reads batches at places.
        places: Which places.
        batch_size: Samples per batch.
        num_workers: Worker processes; 0 reads in this process. They stay: validation comes again and again.
        device: GPU that batches are copied to; `None` leaves them in CPU memory.
    """

    def __init__(
        self,
        dataset: VqaDataset,
        places: range,
        batch_size: int,
        num_workers: int = 0,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(
            places,
            batch_size,
            lambda batches: WorkerLoader(dataset, batches, num_workers, pin_memory=device is not None),
            device,
        )

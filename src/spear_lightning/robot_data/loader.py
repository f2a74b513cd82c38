"""Loaders of robot batches: an endless resumable one for training, a finite one for validation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from spear_lightning.batches import RobotBatch
from spear_lightning.errors import CheckpointError
from spear_lightning.robot_data.dataset import RobotDataset
from spear_lightning.robot_data.read_ahead import Reading, open_reader
from spear_lightning.robot_data.resumable_stream import FinitePass, ResumableStream, StreamBatches


class ResumableLoader(ResumableStream[RobotBatch]):
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
        device: GPU that batches are copied to, each while the one before is worked on; `None` leaves them in CPU
            memory.
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
        device: torch.device | None = None,
        data: str = "",
        num_threads: int = 0,
    ) -> None:
        super().__init__(batch_size, epoch_batches, rank, world_size, data, device)
        self.dataset = dataset
        self._reading = Reading(num_workers, num_threads, prefetch, pin_memory=device is not None)

    def open_at(self, places: StreamBatches) -> Iterable[RobotBatch]:
        """Return what reads the batches of some places, in order and without end."""
        return open_reader(self.dataset, places, self.batch_size, self._reading)

    def check_state(self, state: dict[str, Any]) -> None:
        """Refuse other data and another global batch size.

        Raises:
            CheckpointError: If one of them differs.
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


class FiniteLoader(FinitePass[RobotBatch]):
    """Iterates over some places in order; the last batch may be smaller.

    Args:
        dataset: Reads batches at places.
        places: Which places.
        batch_size: Samples per batch.
        num_workers: Worker processes; 0 reads in this process. They stay: validation comes again and again.
        device: GPU that batches are copied to; `None` leaves them in CPU memory.
        num_threads: Threads of this process that read ahead; for 0 workers.
    """

    def __init__(
        self,
        dataset: RobotDataset,
        places: range,
        batch_size: int,
        num_workers: int = 0,
        device: torch.device | None = None,
        num_threads: int = 0,
    ) -> None:
        reading = Reading(num_workers, num_threads, pin_memory=device is not None)
        super().__init__(
            places, batch_size, lambda batches: open_reader(dataset, batches, batch_size, reading), device
        )

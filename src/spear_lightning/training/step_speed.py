"""How fast a training is, and how much of its time it waits for data."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

GIB = 2**30


class StepSpeed(Callback):
    """Logs samples per second, the share of time spent waiting for batches, and the GPU's memory.

    Logged, each over the steps since it was logged last: `speed/samples_per_second` (all processes together),
    `speed/step_ms`, `speed/data_wait` (share of the time in which the trainer had no batch; in [0, 1]) and
    `speed/gpu_memory_gib` (largest allocation of the first process). Validation and the first step, which
    compiles, do not count. Clocks are read on the CPU and nothing waits for the GPU: its queue is short, so over
    many steps both take the same time; where data is late but the queue has not run dry, the GPU waits less than
    this says.

    Args:
        every_n_steps: Batches between logs.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        self.every_n_steps = every_n_steps
        self._asked: float | None = None
        self._reset()

    def _reset(self) -> None:
        self._batches, self._samples, self._waited, self._busy = 0, 0, 0.0, 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin anew."""
        self._asked = None
        self._reset()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note how long the batch was waited for."""
        self._given = perf_counter()
        self._waiting = 0.0 if self._asked is None else self._given - self._asked

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note how long the step took, and log."""
        now = perf_counter()
        if self._asked is not None:
            self._batches += 1
            self._samples += len(batch)
            self._waited += self._waiting
            self._busy += now - self._given
        if self._batches >= self.every_n_steps:
            self._log(trainer)
            self._reset()
        # What other callbacks do after this one is part of the wait: there is no batch in that time either.
        self._asked = now

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the validation out."""
        if self._asked is not None:
            self._asked = perf_counter()

    def _log(self, trainer: L.Trainer) -> None:
        seconds = self._waited + self._busy
        if not trainer.is_global_zero or seconds <= 0:
            return
        values = {
            "speed/samples_per_second": self._samples * trainer.world_size / seconds,
            "speed/step_ms": 1000 * seconds / self._batches,
            "speed/data_wait": self._waited / seconds,
        }
        device = trainer.strategy.root_device
        if device.type == "cuda":
            values["speed/gpu_memory_gib"] = torch.cuda.max_memory_allocated(device) / GIB
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)

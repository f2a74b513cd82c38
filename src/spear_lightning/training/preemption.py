"""Leave in good order when the machine is taken away: checkpoint, end, and be started again."""

from __future__ import annotations

import logging
import signal
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from spear_lightning.training.checkpoint_files import RunCheckpoint

log = logging.getLogger(__name__)


class StopOnSignal(Callback):
    """Saves a checkpoint and ends the training after the step in which a signal arrived at any process.

    All processes agree after every step, by one number that they sum; so they save together, wherever each of them
    was when the signal came. `--ckpt_path last` continues the run.

    Place it after callbacks that act at the end of a step, such as averages.

    Args:
        signals: Names of the signals.
    """

    def __init__(self, signals: tuple[str, ...] = ("SIGTERM", "SIGUSR1")) -> None:
        self.signals = [signal.Signals[name] for name in signals]
        self._received = False
        self._before: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen; Lightning's own handler would communicate in the middle of whatever is under way."""
        self._received = False
        self._before = {number: signal.signal(number, self._notice) for number in self.signals}

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and stop if any process was told to."""
        told = torch.tensor(float(self._received), device=pl_module.device)
        if float(trainer.strategy.reduce(told, reduce_op="sum")) == 0:
            return
        log.info("A signal asks for the end after step %d", trainer.global_step)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, RunCheckpoint):
                callback.save_now(trainer)
        trainer.should_stop = True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen no more."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

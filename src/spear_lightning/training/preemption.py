"""Leave in good order when the machine is taken away: checkpoint, end, and be started again."""

from __future__ import annotations

import logging
import signal
from types import FrameType
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from spear_lightning.training.checkpoint_files import RunCheckpoint
from spear_lightning.training.checkpoint_writing import finish_saving

log = logging.getLogger(__name__)


class StopOnSignal(Callback):
    """Saves a checkpoint and ends the training when a signal has arrived at any process.

    One process does so after the step in which the signal came. Several exchange one number between their CPUs
    after every step and look at it after the next, when it has long arrived: no GPU waits. So all of them save
    after the same step, at most two after the signal. `--ckpt_path last` continues the run.

    Place it after callbacks that act at the end of a step, such as averages.

    Args:
        signals: Names of the signals.

    Attributes:
        stopped: Whether it has ended the training.
    """

    def __init__(self, signals: tuple[str, ...] = ("SIGTERM", "SIGUSR1")) -> None:
        self.signals = [signal.Signals[name] for name in signals]
        self.stopped = False
        self._received = False
        self._before: dict[signal.Signals, Any] = {}
        self._last_step = 0
        self._group: dist.ProcessGroup | None = None
        self._told = torch.zeros(1)
        self._exchange: dist.Work | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen; Lightning's own handler would communicate in the middle of whatever is under way."""
        self._received = False
        self._before = {number: signal.signal(number, self._notice) for number in self.signals}
        self._last_step = trainer.global_step
        self._exchange = None
        if trainer.world_size > 1 and self._group is None:
            # Its own, since checkpoints are written in another thread, which communicates too.
            self._group = dist.new_group(backend="gloo")

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and stop if any process was told to."""
        if trainer.global_step == self._last_step:
            return  # gradients are being accumulated
        self._last_step = trainer.global_step
        if not self._anyone_told():
            return
        log.info("A signal asks for the end after step %d", trainer.global_step)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, RunCheckpoint):
                callback.save_now(trainer)
        self.stopped = trainer.should_stop = True
        # The time until the machine is taken away is short, and Lightning would validate before it ends.
        trainer.limit_val_batches = 0

    def _anyone_told(self) -> bool:
        if self._group is None:
            return self._received
        told = self._finish_exchange()
        self._told = torch.tensor([float(self._received)])
        self._exchange = dist.all_reduce(self._told, group=self._group, async_op=True)
        return told

    def _finish_exchange(self) -> bool:
        if self._exchange is None:
            return False
        self._exchange.wait()
        self._exchange = None
        return bool(self._told > 0)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen no more, when the last checkpoint is on disk: from now on a signal may kill."""
        self._finish_exchange()
        finish_saving(trainer)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

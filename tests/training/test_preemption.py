from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from spear_lightning.training.checkpoint_files import RunCheckpoint, WholeFileCheckpointIO, newest_checkpoint
from spear_lightning.training.ema import ExponentialMovingAverage
from spear_lightning.training.preemption import StopOnSignal


class Signals(Callback):
    """Sends this process a signal in the middle of a step, by default the fourth, and counts validations."""

    def __init__(self, number: signal.Signals, step: int = 3) -> None:
        self.number, self.step, self.validations = number, step, 0

    def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.validations += 1


def test_many_signals_leave_no_more_checkpoints_than_are_kept_and_cost_no_validation(
    tiny_module: Any, tmp_path: Path
) -> None:
    for step in (1, 4, 7):
        checkpoints, stop = RunCheckpoint(every_steps=2, keep=2), StopOnSignal()
        checkpoints.dirpath = str(tmp_path)
        last, signals = newest_checkpoint(tmp_path), Signals(signal.SIGTERM, step)
        trainer = L.Trainer(
            max_steps=20,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            val_check_interval=100,
            check_val_every_n_epoch=None,
            callbacks=[stop, checkpoints, signals],
            plugins=[WholeFileCheckpointIO()],
        )
        loaders = [DataLoader(torch.arange(200)), DataLoader(torch.arange(3))]
        trainer.fit(tiny_module(), *loaders, ckpt_path=None if last is None else str(last))
        assert stop.stopped
        assert signals.validations == 0
        assert trainer.global_step == step + 1
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step_0000006.ckpt", "step_0000008.ckpt"]


def test_a_signal_ends_the_run_with_a_checkpoint_that_continues_exactly(
    fit: Any, tiny_module: Any, tmp_path: Path
) -> None:
    def callbacks(name: str) -> list[Callback]:
        checkpoints = RunCheckpoint(every_steps=12)
        checkpoints.dirpath = str(tmp_path / name)
        return [ExponentialMovingAverage(decay=0.5), StopOnSignal(), checkpoints]

    fit(tiny_module(), callbacks("whole"))
    handler = signal.getsignal(signal.SIGTERM)
    trainer = fit(tiny_module(), [*callbacks("stopped"), Signals(signal.SIGTERM)])
    assert trainer.global_step == 4
    assert signal.getsignal(signal.SIGTERM) is handler
    path = newest_checkpoint(tmp_path / "stopped")
    assert path is not None
    assert path.name == "step_0000004.ckpt"
    fit(tiny_module(), callbacks("stopped"), ckpt_path=str(path))
    whole, resumed = (
        torch.load(tmp_path / name / "step_0000012.ckpt", weights_only=True) for name in ("whole", "stopped")
    )
    for entry in ("state_dict", "ema"):
        assert whole[entry].keys() == resumed[entry].keys()
        assert all(torch.equal(tensor, resumed[entry][name]) for name, tensor in whole[entry].items())

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from spear_lightning.training.checkpoint_files import RunCheckpoint, newest_checkpoint
from spear_lightning.training.ema import ExponentialMovingAverage
from spear_lightning.training.preemption import StopOnSignal


class Signals(Callback):
    """Sends this process a signal in the middle of the fourth step."""

    def __init__(self, number: signal.Signals) -> None:
        self.number = number

    def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            os.kill(os.getpid(), self.number)


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

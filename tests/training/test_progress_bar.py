"""The bar shows the loss of the last logged step, and nothing is read in the others."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from spear_lightning.training.progress_bar import LossProgressBar


class Shown(Callback):
    """Notes the loss of every step and what the bar shows after it; comes after the bar."""

    def __init__(self, bar: LossProgressBar) -> None:
        self.bar = bar
        self.losses: list[float] = []
        self.shown: list[float | None] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(float(outputs["loss"]))
        self.shown.append(self.bar.get_metrics(trainer, pl_module).get("train/loss"))


def test_the_loss_of_the_last_logged_step_is_shown(fit: Any, tiny_module: Any) -> None:
    bar = LossProgressBar()
    notes = Shown(bar)
    # Lightning calls progress bars in the order they are given.
    fit(tiny_module(), [bar, notes], max_steps=7, log_every_n_steps=3, enable_progress_bar=True)
    assert notes.shown == [None, None, *[notes.losses[2]] * 3, *[notes.losses[5]] * 2]


@pytest.mark.parametrize("every", [1, 0])
def test_every_step_or_none(fit: Any, tiny_module: Any, every: int) -> None:
    bar = LossProgressBar()
    notes = Shown(bar)
    fit(tiny_module(), [bar, notes], max_steps=3, log_every_n_steps=every, enable_progress_bar=True)
    assert notes.shown == (notes.losses if every else [None] * 3)
    assert all(torch.tensor(notes.losses).isfinite())

"""A progress bar that shows the loss without making every step wait for it."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar


class LossProgressBar(RichProgressBar):
    """Shows the loss of the last step that was logged (every `trainer.log_every_n_steps`).

    What a module logs for a bar of Lightning's is read from the GPU after every step, which must have done all its
    work by then, and has nothing to do until the next step is told to it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._loss: float | None = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read the loss where the loggers read it too."""
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and trainer.global_step % every == 0 and self.is_enabled:
            self._loss = float(outputs["loss"])
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Return what the bar shows."""
        shown = super().get_metrics(trainer, pl_module)
        return shown if self._loss is None else {**shown, "train/loss": self._loss}

"""The figures of the untrained model: where every curve begins."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import Callback


class FirstValidation(Callback):
    """Logs the validation before the first step, so that curves show what training changed.

    Lightning runs a sanity check on validation data before training and throws its figures away. With
    `trainer.num_sanity_val_steps: -1` that check covers all validation data, and this callback keeps its figures
    as step 0. A shorter check is not logged: it would not be comparable.
    """

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the figures of a full sanity check."""
        if not trainer.sanity_checking or trainer.num_sanity_val_steps != float("inf"):
            return
        metrics = {
            name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")
        }
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=0)

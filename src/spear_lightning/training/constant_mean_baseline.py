"""What the figures of SPEAR-VLM are worth: the same measures of answers that look at no image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import lightning as L
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table

from spear_lightning.errors import ConfigError
from spear_lightning.training.labelled_image_data_module import LabelledImageDataModule
from spear_lightning.vqa.constant_mean import ConstantMean
from spear_lightning.vqa.metrics import MEASURES, AnswerMetrics

if TYPE_CHECKING:
    from spear_lightning.training.vlm_module import VLMModule

NO_ANSWER = ("choice_accuracy", "naming_accuracy")
"""What the baseline has no answer to."""


class ConstantMeanBaseline(Callback):
    """Prints the table of a model's figures beside the baseline's at the end of `spear validate`, and logs them.

    The baseline answers every question with the mean of the answers to such questions about training images: the
    mean box, the mean distance, and so on. It is logged as `baseline/...`. While training it does nothing.

    Args:
        images: Training images whose answers the mean is taken of, at most.
    """

    def __init__(self, images: int = 5000) -> None:
        self.images = images
        self._baseline: ConstantMean | None = None
        self._metrics: AnswerMetrics | None = None

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the means.

        Raises:
            ConfigError: If the data are no labelled images.
        """
        if trainer.state.fn != "validate":
            return
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, LabelledImageDataModule) or data.answerer is None:
            raise ConfigError(
                "The baseline needs labelled images",
                where="ConstantMeanBaseline",
                found=type(data).__name__,
                expected="LabelledImageDataModule",
            )
        self._baseline = ConstantMean(data.answers(self.images))
        self._metrics = AnswerMetrics(data.answerer.require_tokens()).to(pl_module.device)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Answer the batch's questions."""
        if self._baseline is None or self._metrics is None:
            return
        (pixels,) = batch.images.values()
        answers = [self._baseline.answer(questions) for questions in batch.asked]
        self._metrics.update(answers, batch.asked, *pixels.shape[-2:])

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log and print."""
        if self._metrics is None:
            return
        figures = self._metrics.compute()
        baseline = {name: float(value) for name, value in figures.items() if name not in NO_ANSWER}
        self._baseline = self._metrics = None
        for logger in trainer.loggers:
            logged = {f"baseline/{name}": value for name, value in baseline.items()}
            logger.log_metrics(logged, trainer.global_step)
        if trainer.is_global_zero:
            found = {
                name.removeprefix("val/"): float(value)
                for name, value in trainer.callback_metrics.items()
                if name.startswith("val/")
            }
            scale = cast("VLMModule", pl_module).answerer.require_tokens().scale
            Console().print(comparison(found, baseline, "m" if scale == "metric" else "median depth"))


def comparison(model: dict[str, float], baseline: dict[str, float], unit: str) -> Table:
    """Return the table of figures, one row a measure.

    Args:
        model: Name -> figure of the model.
        baseline: Name -> figure of the baseline.
        unit: Of lengths.
    """
    table = Table(title=f"Held-out images; lengths in {unit}")
    table.add_column("measure")
    for column in ("model", "constant mean"):
        table.add_column(column, justify="right")
    for name in ("parse_rate", "coordinate_accuracy", *MEASURES):
        if name in model or name in baseline:
            table.add_row(name, *(f"{part[name]:.4f}" if name in part else "-" for part in (model, baseline)))
    return table

"""A picture of each validation's first batch, to TensorBoard and MLflow."""

from __future__ import annotations

import io
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class FirstBatchPicture(Callback):
    """Draws the first validation batch; the sanity check before training is left out.

    Args:
        samples: Samples of the picture.
    """

    topic: ClassVar[str]
    """What is shown: a part of the picture's name."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    @abstractmethod
    def draw(self, module: L.LightningModule, output: Any) -> Figure:
        """Return the picture of what a validation step returned."""

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw the first batch."""
        if batch_idx > 0 or trainer.sanity_checking or not trainer.is_global_zero or not trainer.loggers:
            return
        pixels = render(self.draw(pl_module, outputs))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(f"val/{self.topic}", pixels, trainer.global_step, dataformats="HWC")
            elif isinstance(logger, MLFlowLogger) and logger.run_id is not None:
                name = f"validation/{self.topic}_step_{trainer.global_step:07d}.png"
                logger.experiment.log_image(logger.run_id, pixels, artifact_file=name)


def render(figure: Figure) -> np.ndarray:
    """Return a figure as uint8 RGB (height, width, 3)."""
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return np.asarray(Image.open(buffer).convert("RGB"))

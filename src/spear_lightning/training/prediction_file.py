"""What `spear predict` leaves behind: one file with the results of all batches, and a word about it."""

from __future__ import annotations

import os
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import lightning as L
from lightning.pytorch.callbacks import Callback
from rich.console import Console, RenderableType

Kept = TypeVar("Kept")


class PredictionFile(Callback, Generic[Kept]):
    """Collects what is to be kept of each batch, and writes a file into the run's folder, whole or not at all.

    With several processes each writes its own file, NAME_RANK.
    """

    name: ClassVar[str]
    """Of the file, with its ending."""

    def __init__(self) -> None:
        self._kept: list[Kept] = []

    @abstractmethod
    def keep(self, batch: Any, outputs: Any) -> Kept:
        """Return what is to be kept of a batch and of what the model made of it."""

    @abstractmethod
    def write(self, kept: list[Kept], path: Path) -> None:
        """Write what was kept of all batches to a file of the right ending."""

    @abstractmethod
    def summary(self, kept: list[Kept], path: Path) -> RenderableType:
        """Return what is printed at the end; `path` is the file."""

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep a batch."""
        self._kept.append(self.keep(batch, outputs))

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the file and print the summary; nothing if there were no batches."""
        kept, self._kept = self._kept, []
        if not kept:
            return
        name = Path(self.name)
        rank = f"_{trainer.global_rank}" if trainer.world_size > 1 else ""
        path = Path(trainer.default_root_dir) / f"{name.stem}{rank}{name.suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp{name.suffix}")
        self.write(kept, temporary)
        os.replace(temporary, path)
        if trainer.is_global_zero:
            said = self.summary(kept, path)
            # A path in a sentence stays in one piece, to be copied; tables fit the terminal.
            Console().print(said, soft_wrap=isinstance(said, str))

"""When checkpoints are written, and how: whole or not at all, and never unpickling what is read."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from spear_lightning.errors import CheckpointError
from spear_lightning.policy.sharded_files import read_folder


class WholeFileCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its final name and renames it, so that a killed run leaves no half file.

    Lightning's own writer builds the file in memory and moves it from the system's temporary folder, which is no
    single step across file systems. Reading accepts tensors and plain values alone.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint, at once or not at all."""
        final = Path(path)
        final.parent.mkdir(parents=True, exist_ok=True)
        partial = final.with_name(f".{final.name}.partial")
        with partial.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, final)

    def load_checkpoint(
        self,
        path: Any,
        map_location: Callable | None = lambda storage, _: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint, also one that several processes have written together.

        Raises:
            CheckpointError: If the file is damaged or holds more than tensors and plain values.
        """
        if Path(path).is_dir():
            checkpoint = read_folder(Path(path), optimizer=True)
            checkpoint["state_dict"] = dict(checkpoint["state_dict"])
            return checkpoint
        try:
            return torch.load(path, map_location=map_location, weights_only=True)
        except (RuntimeError, ValueError, EOFError, OSError, UnpicklingError) as error:
            raise CheckpointError(
                "The checkpoint cannot be read", where=path, found=f"{type(error).__name__}: {error}"
            ) from error


class RunCheckpoint(ModelCheckpoint):
    """Checkpoints every so many optimizer steps, and at the end of training.

    Files are `step_NNNNNNN.ckpt` in `checkpoints/` of the run's folder (`trainer.default_root_dir`). They hold
    weights, averages, optimizer, schedule, the place in the data, and all that is needed to predict.

    Args:
        every_steps: Optimizer steps between checkpoints.
        keep: How many of the newest are kept; -1 keeps all.
    """

    def __init__(self, every_steps: int = 1000, keep: int = -1) -> None:
        # Keeping the newest is keeping the best by step.
        newest: dict[str, Any] = {"monitor": "step", "mode": "max"} if keep >= 0 else {}
        super().__init__(
            filename="step_{step:07d}",
            auto_insert_metric_name=False,
            every_n_train_steps=every_steps,
            save_top_k=keep,
            **newest,
        )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save every so many steps, and the last step of `max_steps`.

        Lightning resumes exactly from what is saved here; what is saved at the end of training counts a batch
        twice.
        """
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step == trainer.max_steps:
            self.save_now(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save a training that ended otherwise: by epochs or by time."""
        super().on_train_end(trainer, pl_module)
        self.save_now(trainer)

    def save_now(self, trainer: L.Trainer) -> None:
        """Save, unless this step was saved already; all processes must call it."""
        if self._last_global_step_saved == trainer.global_step:
            return
        step, epoch = torch.tensor(trainer.global_step), torch.tensor(trainer.current_epoch)
        path = self.format_checkpoint_name({"step": step, "epoch": epoch})
        trainer.save_checkpoint(path)
        self._last_global_step_saved = trainer.global_step


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint of the largest step in a folder, by name; of equal ones the youngest file."""

    def age(path: Path) -> tuple[int, int]:
        step = re.search(r"step_(\d+)", path.name)
        return int(step[1]) if step else -1, path.stat().st_mtime_ns

    return max(folder.glob("*.ckpt"), key=age, default=None)

"""When checkpoints are written, and how: whole or not at all, and never unpickling what is read."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from weakref import proxy

import lightning as L
import psutil
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from spear_lightning.errors import CheckpointError
from spear_lightning.policy.sharded_files import read_folder
from spear_lightning.training.checkpoint_writing import (
    IN_BACKGROUND,
    SaveUnderWay,
    begin_file,
    finish_saving,
    remove,
    save_under_way,
    write_file,
)

log = logging.getLogger(__name__)


class WholeFileCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its final name and renames it, so that a killed run leaves no half file.

    Lightning's own writer builds the file in memory and moves it from the system's temporary folder, which is no
    single step across file systems. Reading accepts tensors and plain values alone.
    """

    def __init__(self) -> None:
        self.save_under_way = SaveUnderWay()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint, whole or not at all.

        Args:
            checkpoint: Lightning's entries.
            path: The file.
            storage_options: `IN_BACKGROUND` to return when all is copied to CPU memory; else it is on disk. Where
                there is no room for the copy, the option does nothing.

        Raises:
            CheckpointError: If one that was begun earlier could not be written.
        """
        self.save_under_way.wait()
        final = Path(path)
        final.parent.mkdir(parents=True, exist_ok=True)
        if storage_options != IN_BACKGROUND or not self._has_room_for(checkpoint):
            write_file(checkpoint, final)
            return
        self.save_under_way.begin(begin_file(checkpoint, final, self.save_under_way.stager), final)

    def _has_room_for(self, checkpoint: dict[str, Any]) -> bool:
        if self.save_under_way.has_memory:
            return True
        sizes: dict[int, int] = {}
        apply_to_collection(checkpoint, Tensor, lambda tensor: sizes.update({tensor.data_ptr(): tensor.nbytes}))
        needed = sum(sizes.values())
        free = psutil.virtual_memory().available
        if needed > free / 2:
            log.warning(
                "A copy of the checkpoint would take %.1f of %.1f GiB free memory: training waits for the disk",
                needed / 2**30,
                free / 2**30,
            )
        return needed <= free / 2

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint, once the one that is being written is complete."""
        self.save_under_way.afterwards(lambda: remove(Path(path)))

    def teardown(self) -> None:
        """Wait for what is being written, and give the memory back."""
        self.save_under_way.close()

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
        keep: How many of the newest are kept, the end of training among them; -1 keeps all.
        asynchronous: Whether training goes on while a checkpoint is written. What is written is copied to CPU
            memory first, where the copy's room stays reserved: 16 bytes a trained parameter with averages, 4 a
            frozen one, divided among processes like the weights. The next checkpoint, and the end of training,
            wait until it is on disk; a failure ends the training. `False`: training waits every time.
    """

    def __init__(self, every_steps: int = 1000, keep: int = -1, asynchronous: bool = True) -> None:
        self.asynchronous = asynchronous
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
        """Save every so many steps, and the last step of `max_steps`; raise what befell a save in the background.

        Lightning resumes exactly from what is saved here; what is saved at the end of training counts a batch
        twice.
        """
        if under_way := save_under_way(trainer):
            under_way.check()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step == trainer.max_steps:
            self._save_once(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save a training that ended otherwise, by epochs or by time; return when all is on disk."""
        super().on_train_end(trainer, pl_module)
        self.save_now(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Let a save in the background complete; what ended the training is told, not what befell the save."""
        super().on_exception(trainer, pl_module, exception)
        try:
            finish_saving(trainer)
        except CheckpointError as error:
            log.error("%s", error)

    def save_now(self, trainer: L.Trainer) -> None:
        """Save, unless this step was saved already, and wait until it is on disk; all processes must call it."""
        self._save_once(trainer)
        finish_saving(trainer)
        trainer.strategy.barrier()

    def _save_once(self, trainer: L.Trainer) -> None:
        if self._last_global_step_saved == trainer.global_step:
            return
        now = {"step": torch.tensor(trainer.global_step), "epoch": torch.tensor(trainer.current_epoch)}
        if self.save_top_k > 0:
            # It takes the place of the oldest that is kept.
            self._save_topk_checkpoint(trainer, now)
        else:
            self._save_checkpoint(trainer, self.format_checkpoint_name(now))

    def _should_remove_checkpoint(self, trainer: L.Trainer, previous: str, current: str) -> bool:
        # Lightning never removes the one that a run was resumed from: every pre-emption would leave one for good.
        folder = Path(self.dirpath or "").absolute()
        return previous != current and folder in Path(previous).absolute().parents

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        # As Lightning does, but in the background; loggers may upload it, so they are told when it is complete.
        under_way = save_under_way(trainer)
        trainer.save_checkpoint(
            filepath, storage_options=IN_BACKGROUND if self.asynchronous and under_way else None
        )
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                notify = partial(logger.after_save_checkpoint, proxy(self))
                under_way.afterwards(notify) if under_way else notify()


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint of the largest step in a folder, by name; of equal ones the youngest file."""

    def age(path: Path) -> tuple[int, int]:
        step = re.search(r"step_(\d+)", path.name)
        return int(step[1]) if step else -1, path.stat().st_mtime_ns

    return max(folder.glob("*.ckpt"), key=age, default=None)

"""Write checkpoints while training goes on: what is to be written is copied to CPU memory first (staging)."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint._state_dict_stager import StateDictStager
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

from spear_lightning.errors import CheckpointError
from spear_lightning.policy.sharded_files import META_FILE, write_file_list

if TYPE_CHECKING:
    import lightning as L

IN_BACKGROUND = {"in_background": True}
"""Storage options of `trainer.save_checkpoint` that let it return before the checkpoint is on disk."""

FILE_BYTES = 2**27
"""Size at which a process begins another file: building one halts its Python, and takes as much memory again."""


class CopyOnCpu(AsyncStager):
    """Copies a checkpoint's tensors to CPU memory, and keeps that memory (page-locked beside a GPU) for next time.

    torch's `DefaultStager` does the same, but in torch 2.11 closes itself after its first copy.
    """

    _synchronize_after_execute = False

    def __init__(self) -> None:
        self._gpu = torch.cuda.is_available()
        self._copies = StateDictStager(pin_memory=self._gpu)

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return a copy of a nested dictionary, complete when this returns; the one before is overwritten."""
        copied: dict[str, Any] = self._copies.stage(state_dict, non_blocking=self._gpu)
        if self._gpu:
            torch.cuda.synchronize()
        return copied

    def synchronize_staging(self) -> None:
        """Do nothing: a copy is complete when `stage` returns."""

    def close(self) -> None:
        """Give the memory back."""
        self._copies.close()


class SaveUnderWay:
    """The one checkpoint that is being written while training goes on, its copy, and what must wait for it."""

    def __init__(self) -> None:
        self._stager: CopyOnCpu | None = None
        self._future: Future[Any] | None = None
        self._path = Path()
        self._afterwards: list[Callable[[], Any]] = []

    @property
    def has_memory(self) -> bool:
        """Whether there is memory for a copy already."""
        return self._stager is not None

    @property
    def stager(self) -> CopyOnCpu:
        """What copies checkpoints; it takes its memory when it is first used."""
        self._stager = self._stager or CopyOnCpu()
        return self._stager

    def begin(self, future: Future[Any], path: Path) -> None:
        """Take charge of a write; the one before must have been waited for."""
        self._future, self._path = future, path

    def afterwards(self, action: Callable[[], Any]) -> None:
        """Act when what is being written is complete, at once if nothing is; never if it fails."""
        if self._future is None:
            action()
        else:
            self._afterwards.append(action)

    def check(self) -> None:
        """Do what `wait` does if that takes no waiting."""
        if self._future is not None and self._future.done():
            self.wait()

    def wait(self) -> None:
        """Return when everything is on disk.

        Raises:
            CheckpointError: If the checkpoint could not be written.
        """
        if self._future is None:
            return
        # torch's own exception of many processes is no `Exception`.
        error = self._future.exception()
        self._future = None
        afterwards, self._afterwards = self._afterwards, []
        if error is not None:
            raise CheckpointError(
                "A checkpoint could not be written",
                where=self._path,
                found=f"{type(error).__name__}: {error}",
                remedy="see to the disk, then continue from the checkpoint before with --ckpt_path last",
            ) from error
        for action in afterwards:
            action()

    def close(self) -> None:
        """Wait, and give the copy's memory back.

        Raises:
            CheckpointError: If the checkpoint could not be written.
        """
        self.wait()
        if self._stager is not None:
            self._stager.close()
            self._stager = None


def save_under_way(trainer: L.Trainer) -> SaveUnderWay | None:
    """Return what is being written for a trainer; `None` if its writer cannot do so in the background."""
    writer: Any = trainer.strategy
    if not hasattr(writer, "save_under_way"):
        writer = writer.checkpoint_io
    return getattr(writer, "save_under_way", None)


def finish_saving(trainer: L.Trainer) -> None:
    """Return when a trainer's checkpoints are on disk.

    Raises:
        CheckpointError: If the last one could not be written.
    """
    if under_way := save_under_way(trainer):
        under_way.wait()


def partial_path(path: Path) -> Path:
    """Return under which name a checkpoint is written: hidden, and not found by whoever looks for checkpoints."""
    return path.with_name(f".{path.name}.partial")


def write_file(checkpoint: Any, path: Path) -> None:
    """Write a checkpoint to one file, whole or not at all."""
    partial = partial_path(path)
    with partial.open("wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def begin_file(checkpoint: dict[str, Any], path: Path, stager: CopyOnCpu) -> Future[None]:
    """Begin to write a checkpoint to one file; everything in it may change when this returns.

    Args:
        checkpoint: Nested plain values and tensors.
        path: The file's name once it is complete.
        stager: Copies the checkpoint; what it copied before must have been written.

    Returns:
        Done when the file is complete.
    """
    copied = stager.stage(checkpoint)
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
    future = executor.submit(write_file, copied, path)
    executor.shutdown(wait=False)
    return future


def begin_folder(
    tensors: dict[str, Tensor],
    plain: Mapping[str, Any],
    path: Path,
    stager: CopyOnCpu,
    group: dist.ProcessGroup | None = None,
) -> Future[Any]:
    """Begin to write a checkpoint to a folder, each process its share; all processes must call it.

    Tensors and values may change when it returns.

    Args:
        tensors: Names, the same in all processes, -> this process's shares.
        plain: All else, which the first process writes.
        path: The folder's name once it is complete.
        stager: Copies tensors; what it copied before must have been written.
        group: Processes, communicating between CPUs; nothing else may communicate in this group.

    Returns:
        Done in each process when the folder is complete, or failed if the writing failed in any.
    """
    values = io.BytesIO()
    torch.save(plain, values)
    writer = _FolderWriter(path, values.getvalue(), _files_of(tensors))
    future = dcp.async_save(tensors, storage_writer=writer, async_stager=stager, process_group=group)
    assert isinstance(future, Future)  # staging was not asked to go on in the background
    return future


def remove(path: Path) -> None:
    """Remove a checkpoint, under another name, so that a kill leaves no half folder that looks like one."""
    if path.is_dir():
        partial = partial_path(path)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(path.rename(partial))
    else:
        path.unlink(missing_ok=True)


class _FolderWriter(HuggingFaceStorageWriter):
    """Writes tensors under another name; when all processes have, the first adds the rest and gives the name."""

    def __init__(self, path: Path, plain: bytes, files: dict[str, int]) -> None:
        super().__init__(str(partial_path(path)), fqn_to_index_mapping=files, save_distributed=True)
        self.final_path = path
        self.plain = plain
        # Nothing has to come from a GPU: the thread that writes shall not touch one.
        self.per_thread_copy_ahead = 0

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Complete the folder; torch calls this in the first process, and tells all others how it ended."""
        super().finish(metadata, results)
        partial = partial_path(self.final_path)
        write_file_list(partial)
        with (partial / META_FILE).open("wb") as file:
            file.write(self.plain)
            file.flush()
            os.fsync(file.fileno())
        replaced = self.final_path.with_name(f".{self.final_path.name}.replaced")
        if self.final_path.exists():
            self.final_path.rename(replaced)
        partial.rename(self.final_path)
        remove(replaced)


def _files_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the number of the file that each tensor goes to, from 1."""
    files, file, filled = {}, 1, 0
    for name, tensor in tensors.items():
        size = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes
        if filled and filled + size > FILE_BYTES:
            file, filled = file + 1, 0
        files[name] = file
        filled += size
    return files

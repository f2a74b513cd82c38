"""The second of two processes that write checkpoints: it writes one, fails to write one, and dies writing one."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from spear_lightning.errors import CheckpointError
from spear_lightning.training import checkpoint_writing
from spear_lightning.training.checkpoint_writing import CopyOnCpu, SaveUnderWay, begin_folder


def join(folder: Path, rank: int) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)


def begin(folder: Path, step: int, save: SaveUnderWay) -> None:
    # Both processes have both tensors; torch lets each write one.
    tensors = {f"state_dict.{number}": torch.full((3,), float(step)) for number in range(2)}
    path = folder / f"step_{step}.ckpt"
    save.begin(begin_folder(tensors, {"global_step": step}, path, CopyOnCpu()), path)


def fail(*_: Any) -> None:
    raise OSError("No space left on device")


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def write_until_killed(folder: str) -> None:
    """What the second process does."""
    join(Path(folder), rank=1)
    writer, save = checkpoint_writing._FolderWriter, SaveUnderWay()
    for step, write_data in enumerate((writer.write_data, fail, die), start=1):
        writer.write_data = write_data  # type: ignore[method-assign]
        begin(Path(folder), step, save)
        with contextlib.suppress(CheckpointError):
            save.wait()

"""Finds what in a training step would make the process wait for a GPU, on a machine without one."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

READS = {
    aten._local_scalar_dense.default,  # item, float, int, bool, tolist
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.repeat_interleave.Tensor,
}
"""The GPU must have reached this point, for the process needs a value or a size."""

WRITES = {aten.lift_fresh.default}
"""A tensor is made of Python's numbers: from there it would be copied out of memory that is not page-locked."""

ON_THE_HOST = ("resumable_stream.py __iter__", "call.py _call_lightning_datamodule_hook")
"""The loader works in CPU memory, and a batch comes from there."""

INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class HostReads(TorchDispatchMode):
    """Notes where operations were called whose counterpart on a GPU is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = func in INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1])
        if func in READS or func in WRITES or masks:
            calls = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename][:-1]
            if not any(f"{Path(frame.filename).name} {frame.name}" in ON_THE_HOST for frame in calls):
                places = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in calls[-4:]]
                self.found.append(f"{func} < {' < '.join(reversed(places))}")
        return func(*args, **(kwargs or {}))


class StepWatch(Callback):
    """Watches everything between the begin of one training batch and that of the next, at one step."""

    found: ClassVar[list[str]] = []
    """Of the run that ended last."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.mode = HostReads()

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.mode.__enter__()
        elif trainer.global_step == self.step + 1:
            self.mode.__exit__(None, None, None)
            StepWatch.found = self.mode.found

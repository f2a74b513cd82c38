"""Worker processes of loaders: they start clean, end with the trainer, and say in one sentence what went wrong."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator
from multiprocessing import connection
from multiprocessing.context import BaseContext
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader

from spear_lightning.errors import SpearError

WORKER_START = "forkserver"
"""Workers forked from a clean server share no locks or threads with the trainer."""

PRELOADED = ["torch.utils.data", "roma", "spear_lightning.batches"]
"""What the server imports once, for all workers: torch, and its compiler with roma, take each of them seconds."""

Result = TypeVar("Result")


class WorkerLoader(Generic[Result]):
    """Reads batch after batch with processes that stay from pass to pass; with none, when asked for one.

    Args:
        dataset: Its `__getitems__` does a task and returns the result; travels to the processes.
        tasks: What is to be done; iterated anew by every pass.
        num_workers: Processes; 0 reads in this one.
        prefetch: Results each process prepares ahead.
        pin_memory: Whether results are put into page-locked memory.
    """

    def __init__(
        self, dataset: Any, tasks: Any, num_workers: int = 0, prefetch: int = 2, pin_memory: bool = False
    ) -> None:
        options: dict[str, Any] = {}
        if num_workers:
            options = {
                "prefetch_factor": prefetch,
                "multiprocessing_context": worker_context(),
                "worker_init_fn": _start,
                "persistent_workers": True,
            }
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=tasks,
            collate_fn=_as_is,
            num_workers=num_workers,
            pin_memory=pin_memory,
            **options,
        )

    def __iter__(self) -> Iterator[Result]:
        """Yield the results, in the tasks' order.

        Raises:
            SpearError: What a process raised, or that one is gone.
        """
        results = iter(self._loader)
        while True:
            try:
                result = next_result(results)
            except StopIteration:
                return
            yield result


def worker_context() -> BaseContext:
    """Return what starts worker processes."""
    context = multiprocessing.get_context(WORKER_START)
    # Without effect where a server runs already.
    context.set_forkserver_preload(PRELOADED)
    return context


def end_with_parent() -> None:
    """Let this process end when the one that wanted it is gone: a killed trainer cannot tell its workers.

    torch watches the parent of its workers, but that is the fork server.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "called in a process of multiprocessing"

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def next_result(results: Iterator[Any]) -> Any:
    """Return the next result; an error of a worker process loses the story of where it was raised."""
    try:
        return next(results)
    except SpearError as error:
        # torch puts the worker's traceback before the message.
        _, mark, message = str(error).rpartition(f"{type(error).__module__}.{type(error).__name__}: ")
        if not mark:
            raise
        raise type(error)(message) from None
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise SpearError(
            "A worker process that reads the data has died",
            where="data.num_workers",
            found=str(error).strip(),
            remedy="if the system was out of memory (`dmesg` tells), lower data.num_workers or data.prefetch; "
            "continue the run with --ckpt_path last",
        ) from None


def _start(_: int) -> None:
    end_with_parent()


def _as_is(batch: Any) -> Any:
    """Collate what are batches already."""
    return batch

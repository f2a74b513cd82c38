"""Labels are put together in processes of their own: fitting boxes is Python for the most part, and takes long."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from types import TracebackType

from spear_lightning.labeling.assembly import Evidence, ObjectFilter, assemble
from spear_lightning.labeling.object_label import BoxRecipe
from spear_lightning.labeling.records import ImageLabel, check_label
from spear_lightning.robot_data.worker_processes import end_with_parent

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""What a process's environment says for its libraries to use a thread each, whatever the parent's says.

They read it when they are loaded, which is before any code of ours could tell them.
"""


class BoxPool:
    """Calls `assemble` in other processes; use as a context manager.

    Args:
        processes: How many; 0: in the calling thread.
        recipe: How points become boxes.
        keep: Which objects are worth a label.
    """

    def __init__(self, processes: int, recipe: BoxRecipe, keep: ObjectFilter) -> None:
        self._recipe, self._keep = recipe, keep
        self._pool: ProcessPoolExecutor | None = None
        self._starts: list[Future[None]] = []
        if processes:
            # Started from scratch: a fork would take the GPU's and the threads' state along.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(processes, context, _start_worker)
            with _environment(ONE_THREAD):
                # A process is started for each of these, and is ready when the first image is.
                self._starts = [self._pool.submit(_nothing) for _ in range(processes)]

    def __enter__(self) -> BoxPool:
        return self

    def wait_for_start(self) -> None:
        """Wait until the processes can work.

        Raises:
            BrokenExecutor: If one of them cannot start.
        """
        for start in self._starts:
            start.result()

    def __call__(self, evidence: Evidence) -> ImageLabel:
        """Return the label of an image (see `assemble`), checked.

        Raises:
            DataError: If there is none.
        """
        if self._pool is None:
            return _assemble(evidence, self._recipe, self._keep)
        return self._pool.submit(_assemble, evidence, self._recipe, self._keep).result()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _assemble(evidence: Evidence, recipe: BoxRecipe, keep: ObjectFilter) -> ImageLabel:
    label = assemble(evidence, recipe, keep)
    check_label(label)
    return label


def _start_worker() -> None:
    import torch

    # There are as many processes as cores to use.
    torch.set_num_threads(1)
    end_with_parent()


def _nothing() -> None:
    """Let a process start."""


@contextmanager
def _environment(wanted: dict[str, str]) -> Iterator[None]:
    """Set variables of the environment that processes are started with."""
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

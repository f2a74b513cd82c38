"""Shards of a data set, each written by one process, with a progress bar that counts what is in them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

Result = TypeVar("Result")


def shards_in_parallel(
    write: Callable[[range], Result], shards: Sequence[range], processes: int, title: str
) -> Iterator[tuple[int, Result]]:
    """Write all shards; how many processes there are changes only the order in which they are done.

    Args:
        write: Writes one shard, given the numbers of its members; can be sent to another process.
        shards: Numbers of the members of each shard.
        processes: At most so many; one works in this process.
        title: What the progress bar counts.

    Yields:
        Number of a shard and what `write` returned, as they are done.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=sum(len(shard) for shard in shards))
        for number, result in _written(write, shards, min(processes, len(shards))):
            progress.advance(task, len(shards[number]))
            yield number, result


def _written(
    write: Callable[[range], Result], shards: Sequence[range], processes: int
) -> Iterator[tuple[int, Result]]:
    if processes <= 1:
        for number, shard in enumerate(shards):
            yield number, write(shard)
        return
    # Spawned: a fork of a process that runs torch threads can hang.
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(write, shard): number for number, shard in enumerate(shards)}
        try:
            for done in as_completed(waiting):
                yield waiting[done], done.result()
        finally:
            for future in waiting:
                future.cancel()

"""A line of steps that work at the same time: each has threads of its own, and short queues lie between them.

What one step waits for (a disk, a server, the GPU) another step uses. A step takes as many things as wait for it,
up to its batch size, and never waits to fill a batch.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from spear_lightning.errors import ConfigError

T = TypeVar("T")


@dataclass
class Stage(Generic[T]):
    """One step.

    Attributes:
        name: For reports.
        work: Does it, in place, to a batch; must not raise for what concerns single things.
        batch: Things in a batch at most.
        threads: Batches under way at the same time.
        busy_s: Seconds its threads spent working, added up.
    """

    name: str
    work: Callable[[list[T]], None]
    batch: int = 1
    threads: int = 1
    busy_s: float = field(default=0.0, compare=False)

    def __post_init__(self) -> None:
        if self.batch < 1 or self.threads < 1:
            raise ConfigError(
                "A step needs a thread, and batches of one thing at least",
                where=f"step {self.name}",
                found=f"{self.threads} threads, batches of {self.batch}",
                remedy="set `batch_size` and `parallel` of that part to 1 or more",
            )


class _Stopped(Exception):
    """The line was stopped."""


class _Belt(Generic[T]):
    """A bounded queue that is closed when its last writer is done, and stopped when anything goes wrong."""

    def __init__(self, length: int, writers: int) -> None:
        self._length, self._writers = length, writers
        self._things: deque[T] = deque()
        self._changed = threading.Condition()
        self._stopped = False

    def put(self, things: Iterable[T]) -> None:
        for thing in things:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or len(self._things) < self._length)
                if self._stopped:
                    raise _Stopped
                self._things.append(thing)
                self._changed.notify_all()

    def put_together(self, things: Sequence[T]) -> None:
        """Put a batch at once, as far as there is room: who takes it shall not get its first thing alone."""
        while things:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or len(self._things) < self._length)
                if self._stopped:
                    raise _Stopped
                room = self._length - len(self._things)
                self._things.extend(things[:room])
                things = things[room:]
                self._changed.notify_all()

    def take(self, most: int) -> list[T]:
        """Return 1 to `most` things; none at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._things or not self._writers)
            if self._stopped:
                raise _Stopped
            taken = [self._things.popleft() for _ in range(min(most, len(self._things)))]
            self._changed.notify_all()
            return taken

    def writer_is_done(self) -> None:
        with self._changed:
            self._writers -= 1
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


def run_stages(things: Iterable[T], stages: Sequence[Stage[T]]) -> Iterator[T]:
    """Send things through all steps; they come out in any order.

    Leaving the iterator early ends the threads once what they are doing is done.

    Args:
        things: Taken by a thread of its own, one after another, as there is room.
        stages: The steps.

    Yields:
        Each thing, after the last step.

    Raises:
        Exception: The first one that a step or the source of things raised.
    """
    belts: list[_Belt[T]] = []
    for number in range(len(stages) + 1):
        room = 2 * stages[number].batch * stages[number].threads if number < len(stages) else 4
        belts.append(_Belt(room, stages[number - 1].threads if number else 1))
    errors: list[BaseException] = []

    def guarded(target: Callable[[], None], out: _Belt[T]) -> None:
        try:
            target()
        except _Stopped:
            pass
        except BaseException as error:  # noqa: BLE001 - it is raised in the thread that iterates
            errors.append(error)
            for belt in belts:
                belt.stop()
        finally:
            out.writer_is_done()

    targets: list[tuple[Callable[[], None], _Belt[T]]] = [(lambda: belts[0].put(things), belts[0])]
    for stage, source, out in zip(stages, belts, belts[1:], strict=False):
        targets += [(_worker(stage, source, out), out)] * stage.threads
    threads = [threading.Thread(target=guarded, args=target, daemon=True) for target in targets]
    for thread in threads:
        thread.start()
    try:
        while taken := belts[-1].take(1):
            yield from taken
    except _Stopped:
        raise errors[0] from None
    finally:
        for belt in belts:
            belt.stop()
        for thread in threads:
            thread.join()


def _worker(stage: Stage[T], source: _Belt[T], out: _Belt[T]) -> Callable[[], None]:
    def work() -> None:
        while batch := source.take(stage.batch):
            start = time.perf_counter()
            stage.work(batch)
            stage.busy_s += time.perf_counter() - start
            out.put_together(batch)

    return work

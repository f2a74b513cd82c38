"""How a loader is timed: the same code for every contender. Needs nothing but the standard library."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any


def time_batches(
    open_loader: Callable[[], Iterator[int]], seconds: float, windows: int, warm_up: float
) -> dict[str, Any]:
    """Time a loader.

    Args:
        open_loader: Makes the loader; its iterator yields the number of samples of each batch.
        seconds: Measured time in all, after the warm-up.
        windows: Windows it is divided into.
        warm_up: Seconds that do not count.

    Returns:
        `first_batch_s` (from the call of `open_loader` to the first batch) and `windows` (samples/s of each).
    """
    start = time.perf_counter()
    batches = open_loader()
    next(batches)
    first_batch_s = time.perf_counter() - start
    _rate(batches, warm_up)
    rates = [_rate(batches, seconds / windows) for _ in range(windows)]
    return {"first_batch_s": first_batch_s, "windows": rates}


def _rate(batches: Iterator[int], seconds: float) -> float:
    """Return the samples/s of one window: it ends with the batch in which its time is up."""
    samples = 0
    start = time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        samples += next(batches)
    return samples / passed

"""How loaders are measured: the same code for every contender. Needs psutil only."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psutil

SAMPLING_S = 0.2
MEGABYTE = 1e6


def time_batches(
    open_loader: Callable[[], Iterator[int]], seconds: float, windows: int, warm_up: float
) -> dict[str, Any]:
    """Time a loader in this process.

    Args:
        open_loader: Makes the loader; its iterator yields the number of samples of each batch.
        seconds: Measured time in all, after the warm-up.
        windows: Windows it is divided into.
        warm_up: Seconds that do not count.

    Returns:
        `first_batch_s` (from the call of `open_loader` to the first batch), `windows` (samples/s of each), and
        `cpu_ms` (processor time of this process and its workers per sample: what other work on the machine
        disturbs least).
    """
    start = time.perf_counter()
    batches = open_loader()
    next(batches)
    first_batch_s = time.perf_counter() - start
    _pull(batches, warm_up)
    cpu_start = _cpu_seconds()
    pulled = [_pull(batches, seconds / windows) for _ in range(windows)]
    cpu_ms = 1000 * (_cpu_seconds() - cpu_start) / sum(samples for samples, _ in pulled)
    rates = [samples / passed for samples, passed in pulled]
    return {"first_batch_s": first_batch_s, "windows": rates, "cpu_ms": cpu_ms}


def _pull(batches: Iterator[int], seconds: float) -> tuple[int, float]:
    """Return the samples and the seconds of one window: it ends with the batch in which its time is up."""
    samples = 0
    start = time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        samples += next(batches)
    return samples, passed


def _cpu_seconds() -> float:
    this = psutil.Process()
    total = 0.0
    for process in (this, *this.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def run_measured(command: Sequence[str]) -> dict[str, Any]:
    """Run a program that prints JSON on its last line, and watch the memory of its whole process tree.

    Returns:
        The JSON, `rss_mb` (peak of the sum of resident memory: counts shared pages once per process) and `pss_mb`
        (the same with each shared page divided among its users; as `rss_mb` where the system does not tell).

    Raises:
        RuntimeError: If the program fails; holds what it wrote to stderr.
    """
    rss = pss = 0.0
    with tempfile.TemporaryFile("w+") as errors:
        program = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        while program.poll() is None:
            now_rss, now_pss = _memory(program.pid)
            rss, pss = max(rss, now_rss), max(pss, now_pss)
            time.sleep(SAMPLING_S)
        output, _ = program.communicate()
        if program.returncode != 0:
            errors.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed:\n{errors.read()[-4000:]}")
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result | {"rss_mb": rss / MEGABYTE, "pss_mb": pss / MEGABYTE}


def _memory(pid: int) -> tuple[float, float]:
    rss = pss = 0.0
    with contextlib.suppress(psutil.Error):
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                memory = process.memory_full_info()
                rss += memory.rss
                pss += getattr(memory, "pss", memory.rss)
    return rss, pss

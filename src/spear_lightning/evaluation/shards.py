"""Runs the harness's benchmarks: by its Python interface in this process, or by its command once per shard."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import yaml

from spear_lightning.errors import SpearError

Progress = Callable[[int, int], None]
"""Called with the episodes that are done and all there are, now and then."""

_POLL_SECONDS = 0.3
_LAST_LINES = 15


class EvaluationError(SpearError, RuntimeError):
    """An evaluation broke off, or some of its episodes did: nothing can be said of the success rate."""


@dataclass(frozen=True)
class HarnessRun:
    """One run of the harness.

    Attributes:
        config: What `vla-eval run --config` takes.
        folder: For its files.
        name: Identifies the run among the files.
        episodes: Episodes in all.
    """

    config: dict[str, Any]
    folder: Path
    name: str
    episodes: int


def run_here(run: HarnessRun, progress: Progress) -> dict[str, Any]:
    """Simulate in this process; returns the harness's aggregate of the one benchmark in the configuration."""
    from vla_eval.api import run as run_harness

    future: Future[list[dict[str, Any]]] = Future()

    def simulate() -> None:
        try:
            future.set_result(run_harness(run.config, output_dir=run.folder, eval_id=run.name, docker=False))
        except BaseException as error:  # noqa: BLE001 - raised where the result is awaited
            future.set_exception(error)

    with contextlib.redirect_stdout(io.StringIO()):
        # The harness runs an event loop, and a notebook's main thread has one already. Nobody waits for a daemon:
        # whoever interrupts is not kept until all episodes are done.
        Thread(target=simulate, daemon=True).start()
        while not wait([future], timeout=_POLL_SECONDS).done:
            progress(_episodes_done(run), run.episodes)
        aggregate: dict[str, Any] = future.result()[0]
    return aggregate


def run_shards(run: HarnessRun, processes: int, progress: Progress) -> dict[str, Any]:
    """Simulate in several processes, which take episodes from the harness's queue; returns its aggregate.

    Raises:
        EvaluationError: If a process fails.
    """
    from vla_eval.results.export import export_eval

    config = run.folder / f"{run.name}.yaml"
    config.write_text(yaml.safe_dump(run.config, sort_keys=False))
    command = [sys.executable, "-m", "vla_eval.cli.main", "run", "--no-docker", "--config", str(config)]
    command += ["--output-dir", str(run.folder), "--eval-id", run.name, "--num-shards", str(processes)]
    with contextlib.ExitStack() as stack:
        shards = [
            stack.enter_context(_shard([*command, "--shard-id", str(number)], _log_of(run, number)))
            for number in range(processes)
        ]
        while any(shard.poll() is None for shard in shards):
            _raise_if_failed(shards, run)
            progress(_episodes_done(run), run.episodes)
            time.sleep(_POLL_SECONDS)
        _raise_if_failed(shards, run)
    with contextlib.redirect_stdout(io.StringIO()):
        aggregate: dict[str, Any] = export_eval(run.folder, run.name)[0]
    return aggregate


def _log_of(run: HarnessRun, number: int) -> Path:
    return run.folder / f"{run.name}_shard_{number}.log"


@contextlib.contextmanager
def _shard(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    # A shard simulates; the accelerator belongs to the policy.
    environment = {**os.environ, **one_thread, "CUDA_VISIBLE_DEVICES": ""}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait()


def _raise_if_failed(shards: list[subprocess.Popen[bytes]], run: HarnessRun) -> None:
    for number, shard in enumerate(shards):
        # None while it runs.
        if shard.poll():
            log = _log_of(run, number)
            lines = log.read_text(errors="replace").splitlines()
            raise EvaluationError(
                "A simulating process failed",
                where=log,
                found=f"exit status {shard.returncode}; its last lines:\n" + "\n".join(lines[-_LAST_LINES:]),
            )


def _episodes_done(run: HarnessRun) -> int:
    """Read the harness's progress files; each tells of all shards together."""
    done = [0]
    for path in run.folder.glob("*.progress"):
        with contextlib.suppress(OSError, ValueError):
            done.append(int(json.loads(path.read_text())["completed"]))
    return max(done)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the harness's log lines for every episode away from ours; warnings still pass."""
    loggers = [logging.getLogger(name) for name in ("vla_eval", "websockets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

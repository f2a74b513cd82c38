"""What runs of the command line leave behind, read back, and how to kill one."""

from __future__ import annotations

import csv
import os
import signal
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from warm_start import WarmServer

from spear_lightning import cli


def run_until_killed(server: WarmServer, module: str, *runs: tuple[int, list[str]]) -> None:
    """Run `spear`, each time in a process of its own, that is killed when a module begins an optimizer step.

    Args:
        server: Starts the processes.
        module: Its class path.
        runs: Step that is the last, and arguments, of each run.
    """
    for last, arguments in runs:
        process = server.start("finished_runs:run_and_die", module, last, arguments)
        assert process.wait() == -signal.SIGKILL


def run_and_die(path: str, last: int, arguments: list[str]) -> int:
    """What `run_until_killed` runs in its processes."""
    where, _, name = path.rpartition(".")
    module = getattr(import_module(where), name)
    step = module.training_step

    def step_or_die(self: Any, batch: Any, batch_index: int) -> torch.Tensor:
        if self.trainer.global_step == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, batch, batch_index)

    module.training_step = step_or_die
    return cli.main(arguments)


def logged(run: Path, name: str) -> dict[int, str]:
    """Return step -> value as written, over all log files of a run, later ones first."""
    found: dict[int, str] = {}
    for path in sorted((run / "csv").glob("version_*/metrics.csv")):
        for row in csv.DictReader(path.open()):
            if row.get(name):
                found[int(row["step"])] = row[name]
    return found


def fit_like(twin: Path, root: Path, run: Path, *options: str) -> int:
    """Run `spear fit` with a twin's configuration, data under a root and everything else under a run's folder."""
    where = [f"--data.root={root}", f"--trainer.default_root_dir={run}", f"--trainer.logger.save_dir={run}"]
    return cli.main(["fit", f"--config={twin}", *where, *options])


def values_of(run: Path, name: str) -> list[float]:
    """Return the values that a run logged, by step."""
    found = logged(run, name)
    return [float(found[step]) for step in sorted(found)]


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:07d}.ckpt"


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint(run, step), weights_only=True)["state_dict"]

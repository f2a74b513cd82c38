"""What runs of the command line leave behind, read back, and how to kill one."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from spear_lightning import cli

DIE = """
import json, os, signal, sys
from importlib import import_module
from spear_lightning import cli, flow, models, training
where, _, name = sys.argv[1].rpartition(".")
module = getattr(import_module(where), name)
step = module.training_step
def run_and_die(last, arguments):
    def step_or_die(self, batch, batch_index):
        if self.trainer.global_step == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, batch, batch_index)
    module.training_step = step_or_die
    os._exit(cli.main(arguments))
for last, arguments in json.loads(sys.argv[2]):
    # What is forked has everything imported, which takes longer than the run.
    child = os.fork()
    if not child:
        run_and_die(last, arguments)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
"""


def run_until_killed(module: str, *runs: tuple[int, list[str]]) -> None:
    """Run `spear`, each time in a process of its own, that is killed when a module begins an optimizer step.

    Args:
        module: Its class path.
        runs: Step that is the last, and arguments, of each run.
    """
    command = [sys.executable, "-c", DIE, module, json.dumps(runs)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


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

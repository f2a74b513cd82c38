"""What runs of the command line leave behind, read back, and how to kill one."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

DIE = """
import os, signal, sys
from importlib import import_module
from spear_lightning import cli, flow, models, training
where, _, name = sys.argv[1].rpartition(".")
module = getattr(import_module(where), name)
step = module.training_step
def step_or_die(self, batch, batch_index):
    if self.trainer.global_step == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch, batch_index)
module.training_step = step_or_die
sys.exit(cli.main(sys.argv[3:]))
"""


def run_until_killed(module: str, step: int, *arguments: str) -> None:
    """Run `spear` in a process of its own that is killed when a module begins an optimizer step."""
    killed = subprocess.run(
        [sys.executable, "-c", DIE, module, str(step), *arguments],
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert killed.returncode == -signal.SIGKILL


def logged(run: Path, name: str) -> dict[int, str]:
    """Return step -> value as written, over all log files of a run, later ones first."""
    found: dict[int, str] = {}
    for path in sorted((run / "csv").glob("version_*/metrics.csv")):
        for row in csv.DictReader(path.open()):
            if row.get(name):
                found[int(row["step"])] = row[name]
    return found


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:07d}.ckpt"


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint(run, step), weights_only=True)["state_dict"]

"""`spear demo`: the main job from end to end on a laptop, in a few minutes and without a download.

Episodes -> index -> training -> checkpoint -> action chunks predicted in a fresh process.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import spear_lightning
from spear_lightning.errors import ConfigError, SpearError
from spear_lightning.robot_data.demo_episodes import write_demo_episodes

EXPERIMENT = Path("experiments/quickstart/vla.yaml")
RUN = Path("runs/quickstart_vla")
STORE = Path("runs/mlflow.db")
"""Where the experiment puts its run and MLflow's store."""


def main(arguments: list[str]) -> int:
    """Run the demo.

    Args:
        arguments: What follows `demo`.

    Returns:
        Exit status 0; errors are raised.
    """
    from spear_lightning.training.checkpoint_files import newest_checkpoint

    parser = argparse.ArgumentParser(prog="spear demo", description=__doc__)
    parser.add_argument(
        "--data", help="data root with a bridge_dataset folder; default: episodes made on the spot"
    )
    parser.add_argument("--out", default="demo", help="folder for runs (default: demo)")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps (default: 300)")
    options = parser.parse_args(arguments)
    experiment = find_experiment()
    started = time.monotonic()
    folder = Path(options.out).absolute() / time.strftime("%Y-%m-%d_%H-%M-%S")
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="spear_demo_") as temporary:
        root = Path(options.data).absolute() if options.data else Path(temporary)
        if options.data is None:
            say("1/4  writing 48 made-up episodes in RLDS format")
            write_demo_episodes(root)
        say(f"2/4  indexing {root}, then training for {options.steps} steps")
        # Relative paths of the experiment (its run folder, MLflow's store) end up in the demo's folder.
        spear(
            folder,
            "fit",
            f"--config={experiment}",
            f"--data.root={root}",
            f"--data.index_folder={Path(temporary) / 'indexes'}",
            f"--trainer.max_steps={options.steps}",
        )
        run = folder / RUN
        checkpoint = newest_checkpoint(run / "checkpoints")
        if checkpoint is None:
            raise SpearError("The training left no checkpoint", where=run / "checkpoints")
        say(f"3/4  predicting held-out action chunks in a fresh process from {checkpoint.name} alone")
        spear(folder, "predict", f"--ckpt_path={checkpoint}")
    say("4/4  what was learnt")
    report(run, folder / STORE)
    say(
        f"spear demo: trained, saved, reloaded and predicted in {time.monotonic() - started:.0f} s.\n"
        f"  pictures and curves: tensorboard --logdir {run}\n"
        f"  everything tracked:  mlflow ui --backend-store-uri sqlite:///{folder / STORE}\n"
        f"  predicted chunks:    {run / 'predictions.npz'}"
    )
    return 0


def find_experiment() -> Path:
    """Return the quickstart experiment of the checkout this package runs from.

    Raises:
        ConfigError: If there is none: the package was installed without its checkout.
    """
    checkout = Path(spear_lightning.__file__).parents[2]
    for folder in (Path(), checkout):
        if (folder / EXPERIMENT).is_file():
            return (folder / EXPERIMENT).absolute()
    raise ConfigError(
        "The demo's experiment is not there",
        where=EXPERIMENT,
        remedy="run the demo in a checkout of the repository",
    )


def spear(folder: Path, *arguments: str) -> None:
    """Run a verb in a process of its own, in a folder.

    Raises:
        SpearError: If it fails.
    """
    code = "import sys; from spear_lightning.cli import main; sys.exit(main())"
    # The demo keeps to its own folder, whatever tracking server the environment names.
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    result = subprocess.run([sys.executable, "-c", code, *arguments], cwd=folder, env=environment, check=False)
    if result.returncode:
        raise SpearError(
            f"`spear {arguments[0]}` failed",
            found=f"exit status {result.returncode}",
            remedy="see the message above",
        )


def report(run: Path, store: Path) -> None:
    """Print validation figures at the first and last validation, as MLflow has them."""
    from mlflow.tracking import MlflowClient
    from rich.console import Console
    from rich.table import Table

    from spear_lightning.training.tracking import RUN_ID_FILE

    client = MlflowClient(f"sqlite:///{store}")
    run_id = (run / RUN_ID_FILE).read_text()
    table = Table(title="Validation on held-out episodes")
    for column in ("", "first", "last"):
        table.add_column(column, justify="right")
    for name in ("val/loss", "val/translation_error_mm", "val/rotation_error_deg", "val/gripper_accuracy"):
        history = sorted(client.get_metric_history(run_id, name), key=lambda metric: metric.step)
        if history:
            table.add_row(name, f"{history[0].value:.3f}", f"{history[-1].value:.3f}")
    Console().print(table)


def say(text: str) -> None:
    """Write a line to the terminal."""
    sys.stdout.write(f"\n{text}\n")
    sys.stdout.flush()

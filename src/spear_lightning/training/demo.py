"""`spear demo`: the whole method on a laptop, in a few minutes and without a download.

Demonstrations in the embedded world -> training -> checkpoint -> closed loop in a fresh process, compared with the
script that gave the demonstrations and with chance.
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

EXPERIMENT = Path("experiments/quickstart/tabletop.yaml")
RUN = Path("runs/quickstart_tabletop")
STORE = Path("runs/mlflow.db")
"""Where the experiment puts its run and MLflow's store."""

TASK = "touch"
PROCESSES = 2


def main(arguments: list[str]) -> int:
    """Run the demo.

    Args:
        arguments: What follows `demo`.

    Returns:
        Exit status 0; errors are raised.
    """
    from spear_lightning.training.checkpoint_files import newest_checkpoint

    parser = argparse.ArgumentParser(
        prog="spear demo", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", default="demo", help="folder for runs")
    parser.add_argument("--demonstrations", type=_at_least_one, default=320, help="episodes to learn from")
    parser.add_argument("--steps", type=_at_least_one, default=960, help="optimizer steps")
    parser.add_argument("--episodes", type=_at_least_one, default=30, help="episodes to try the policy in")
    options = parser.parse_args(arguments)
    experiment = find_experiment()
    started = time.monotonic()
    folder = Path(options.out).absolute() / time.strftime("%Y-%m-%d_%H-%M-%S")
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="spear_demo_") as temporary:
        say(f'1/4  a script shows {options.demonstrations} times how to "{TASK} the OBJECT"')
        demonstrate(folder, Path(temporary), options.demonstrations)
        say(f"2/4  a policy learns from these demonstrations for {options.steps} steps")
        # Relative paths of the experiment (its run folder, MLflow's store) end up in the demo's folder.
        spear(
            folder,
            "fit",
            f"--config={experiment}",
            f"--data.root={temporary}",
            f"--data.index_folder={Path(temporary) / 'indexes'}",
            f"--trainer.max_steps={options.steps}",
            f"--trainer.val_check_interval={max(options.steps // 3, 1)}",
        )
    checkpoint = newest_checkpoint(folder / RUN / "checkpoints")
    if checkpoint is None:
        raise SpearError("The training left no checkpoint", where=folder / RUN / "checkpoints")
    say(f"3/4  the policy acts in {options.episodes} scenes that it never saw, and chance and the script do too")
    contestants = {
        # Five Euler steps of the flow instead of ten: time is short.
        "policy": [f"--checkpoint={checkpoint}", "--flow_steps=5"],
        "random": ["--policy=random"],
        "expert": ["--policy=expert"],
    }
    for name, contestant in contestants.items():
        evaluate(folder, name, contestant, options.episodes)
    say("4/4  what was learnt")
    report(folder, list(contestants))
    say(
        f"spear demo: demonstrated, trained, reloaded and acted in {time.monotonic() - started:.0f} s.\n"
        f"  films of the policy: {folder / 'policy' / 'episodes.gif'}\n"
        f"  pictures and curves: tensorboard --logdir {folder / RUN}\n"
        f"  everything tracked:  mlflow ui --backend-store-uri sqlite:///{folder / STORE}"
    )
    return 0


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")
    return int(text)


def find_experiment() -> Path:
    """Return the demo's experiment in the checkout this package runs from.

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


def demonstrate(folder: Path, root: Path, episodes: int) -> None:
    """Write demonstrations in RLDS format under a data root."""
    cameras = ("primary=112x84", "wrist=56x56")
    spear(
        folder,
        *("data", "tabletop", "--plain", "--tasks", TASK),
        *("--episodes", str(episodes), "--cameras", *cameras, "--out", str(root)),
    )


def evaluate(folder: Path, name: str, contestant: list[str], episodes: int) -> None:
    """Let one contestant act in held-out scenes; its result and films go to a folder of its name."""
    spear(
        folder,
        *("eval", "--plain", "--tasks", TASK, *contestant, "--episodes", str(episodes)),
        *("--processes", str(PROCESSES), "--out", name),
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


def report(folder: Path, contestants: list[str]) -> None:
    """Print validation figures at the first and last validation, as MLflow has them, and success rates."""
    from mlflow.tracking import MlflowClient
    from rich.console import Console
    from rich.table import Table

    from spear_lightning.evaluation.report import comparison_table, read_result
    from spear_lightning.training.tracking import RUN_ID_FILE

    client = MlflowClient(f"sqlite:///{folder / STORE}")
    run_id = (folder / RUN / RUN_ID_FILE).read_text()
    table = Table(title="Validation on held-out demonstrations")
    for column in ("", "first", "last"):
        table.add_column(column, justify="right")
    for name in ("val/loss", "val/translation_error_mm", "val/rotation_error_deg", "val/gripper_accuracy"):
        history = sorted(client.get_metric_history(run_id, name), key=lambda metric: metric.step)
        if history:
            table.add_row(name, f"{history[0].value:.3f}", f"{history[-1].value:.3f}")
    console = Console()
    console.print(table)
    console.print(comparison_table([read_result(folder / name) for name in contestants]))


def say(text: str) -> None:
    """Write a line to the terminal."""
    sys.stdout.write(f"\n{text}\n")
    sys.stdout.flush()

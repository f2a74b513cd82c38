"""Train the tabletop SPEAR-VLM in several variants, several times each, and print what held-out pictures say.

A variant is `experiments/tabletop/vlm.yaml` with changes merged after it. Runs of one variant differ in their
initial weights (`seed_everything`); data, its order and the pretrained encoders are the same. Each is asked for
boxes and key points of all held-out pictures at its end. The reference is the mean answer about training pictures.
Give it steps enough to learn to read the questions: after 3,000, seeds differ more than variants.

    python benchmarks/compare_vlms.py --data data --steps 8000 --seeds 0 1 2 --gpus 0 1 \
        --variants vlm vlm_moge_frozen vlm_moge_trained
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TextIO

import yaml
from rich.console import Console
from rich.table import Table

FOLDER = Path(__file__).resolve().parents[1] / "experiments" / "tabletop"
CHANGES = {
    "vlm": [],
    "vlm_float8": ["vlm_float8"],
    "vlm_no_objects": ["vlm_no_objects"],
    "vlm_moge_trained": ["vlm_moge_trained"],
    "vlm_moge_frozen": ["vlm_moge_trained", "vlm_moge_frozen"],
}
"""Variant -> the files that are merged after vlm.yaml."""

MEASURES = ("centre_error", "key_point_error", "vertex_error", "iou", "iou_at_0.25", "parse_rate")
"""Measures of the validation, by their names under `val/`; lengths in metres."""

ASKED = {"spear_lightning.vqa.object_tasks.BoxVertices": 1.0, "spear_lightning.vqa.object_tasks.KeyPoints": 1.0}
"""What held-out pictures are asked."""

ALL = 100_000
"""More pictures than are held out."""

console = Console(width=140)


def command(variant: str, seed: int, run: Path, options: argparse.Namespace) -> list[str]:
    """Return the command of one run."""
    logger = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(run), "name": "csv", "version": ""},
    }
    own = run / "logger.yaml"
    own.write_text(yaml.safe_dump({"trainer": {"logger": [logger]}}))
    files = [FOLDER / f"{name}.yaml" for name in ("vlm", *CHANGES[variant])]
    return [
        *(sys.executable, "-m", "spear_lightning.cli", "fit"),
        *(f"--config={file}" for file in (*files, own)),
        f"--seed_everything={seed}",
        f"--data.root={options.data}",
        f"--trainer.default_root_dir={run}",
        f"--trainer.max_steps={options.steps}",
        f"--trainer.val_check_interval={max(1, options.steps // 2)}",
        f"--data.num_workers={options.workers}",
        *options.more,
    ]


def validation(run: Path, options: argparse.Namespace) -> list[str]:
    """Return the command that asks the model of a run about all held-out pictures."""
    checkpoint = max((run / "checkpoints").glob("step_*.ckpt"))
    return [
        *(sys.executable, "-m", "spear_lightning.cli", "validate", f"--ckpt_path={checkpoint}"),
        f"--data.tasks={json.dumps(ASKED)}",
        f"--data.validation_samples={options.pictures}",
        *(option for option in options.more if option.startswith("--trainer.")),
    ]


def last_values(file: Path) -> dict[str, float]:
    """Return the last value of everything in a file of metrics."""
    found: dict[str, float] = {}
    with file.open() as lines:
        for row in csv.DictReader(lines):
            found |= {name: float(value) for name, value in row.items() if value and name != "phase"}
    return found


def work(
    tasks: queue.SimpleQueue[tuple[str, int]], gpu: str, options: argparse.Namespace, finished: list[Path]
) -> None:
    """Do runs on one GPU until none is left, and add those that succeeded to `finished`."""
    while True:
        try:
            variant, seed = tasks.get_nowait()
        except queue.Empty:
            return
        run = Path(options.out) / f"{variant}_{seed}"
        run.mkdir(parents=True)
        start = time.perf_counter()
        with (run / "log.txt").open("w") as log:
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}

            def call(words: list[str], log: TextIO = log, environment: dict[str, str] = environment) -> bool:
                done = subprocess.run(words, stdout=log, stderr=log, env=environment, check=False)
                return done.returncode == 0

            trained = call(command(variant, seed, run, options))
            spent = time.perf_counter() - start
            if trained:
                # The validation writes its figures under the same name.
                (run / "csv" / "metrics.csv").rename(run / "training.csv")
            succeeded = trained and call(validation(run, options))
            if succeeded:
                finished.append(run)
            told = "done" if succeeded else f"failed, see {run}/log.txt"
        console.print(f"{variant}, seed {seed}: {told}; training took {spent:.0f} s")


def main() -> None:
    """Do all runs, several at a time, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder that holds `labels`")
    parser.add_argument("--variants", nargs="+", choices=sorted(CHANGES), default=["vlm"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument(
        "--gpus", nargs="+", default=["0"], help="one run at a time each: two with CUDA graphs on one can crash"
    )
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--pictures", type=int, default=ALL, help="held-out pictures at most")
    parser.add_argument("--out", default="runs/compare_vlms")
    options, options.more = parser.parse_known_args()
    tasks: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
    for seed in options.seeds:
        for variant in options.variants:
            tasks.put((variant, seed))
    wanted = [f"{variant}_{seed}" for variant in options.variants for seed in options.seeds]
    there = [name for name in wanted if (Path(options.out) / name).exists()]
    if there:
        parser.error(f"{options.out} holds runs of these names already: {there}; choose another --out")
    finished: list[Path] = []
    threads = [threading.Thread(target=work, args=(tasks, gpu, options, finished)) for gpu in options.gpus]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    report(options, finished)
    sys.exit(len(finished) < len(options.seeds) * len(options.variants))


def report(options: argparse.Namespace, finished: list[Path]) -> None:
    """Print mean and standard deviation over seeds, and the reference."""
    table = Table(title=f"{options.steps} steps, seeds {options.seeds}: mean ± standard deviation")
    for column in ("", "runs", *MEASURES, "samples/s"):
        table.add_column(column)
    reference: dict[str, float] = {}
    for variant in options.variants:
        runs = [run for run in finished if run.name.rpartition("_")[0] == variant]
        values = [last_values(run / "training.csv") | last_values(run / "csv" / "metrics.csv") for run in runs]
        reference = next(iter(values), reference)
        keys = [*(f"val/{name}" for name in MEASURES), "speed/samples_per_second"]
        table.add_row(
            variant, str(len(runs)), *(spread([one[key] for one in values if key in one]) for key in keys)
        )
    mean = [f"{reference[f'baseline/{name}']:.4f}" if f"baseline/{name}" in reference else "" for name in MEASURES]
    table.add_row("the mean answer", "", *mean, "")
    console.print(table)


def spread(values: list[float]) -> str:
    """Return mean and standard deviation as text."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{deviation}"


if __name__ == "__main__":
    main()

"""Samples/s of our robot data loader against a tf.data pipeline that does the same work on the same cores.

Makes a data set (RLDS, Bridge V2's layout), checks that both give the same samples, measures both in turns, and
writes a Markdown file. TensorFlow is installed into an environment of its own on first use.

    .venv/bin/python benchmarks/load_robot_data.py
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

import numpy as np
from contender import HEADER, Contender, markdown
from loading_comparison import COPIES, Comparison
from measure import run_measured
from rich.console import Console
from rich.table import Table
from robot_episodes import film, scenes, write_episodes

HERE = Path(__file__).resolve().parent
TENSORFLOW = ("tensorflow-cpu>=2.15,<2.22", "psutil")
BATCH = 32
SAME_NUMBERS, SAME_LEVELS = 1e-4, 3.0

console = Console(width=120)


def tensorflow_python(folder: Path) -> str:
    """Return the interpreter of TensorFlow's environment; makes the environment if it is not whole."""
    python, done = folder / "bin" / "python", folder / ".installed"
    if not done.is_file():
        console.print(f"installing {TENSORFLOW[0]} into {folder} (once)")
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *TENSORFLOW], check=True)
        done.touch()
    return str(python)


class Bench:
    """The data sets and the contenders, in a temporary folder."""

    def __init__(self, options: argparse.Namespace, folder: Path, tensorflow: str) -> None:
        self.options, self.folder = options, folder
        self._tensorflow = [tensorflow, str(HERE / "tfdata_pipeline.py"), "--cores", str(options.cores)]
        self._ours = [sys.executable, str(HERE / "spear_pipeline.py"), "--index", str(folder / "index")]
        self._timing = ["--seconds", str(options.seconds), "--batch", str(BATCH)]

    def make_data(self) -> str:
        """Write the data set, and one of `COPIES` times the episodes; index both. Returns a description."""
        scene, what = scenes(self.options.photographs)
        external, second = (film(scene, self.options.episodes, self.options.steps, seed) for seed in (0, 1))
        sizes = [len(picture) for camera in (external, second) for episode in camera for picture in episode]
        for name, copies in (("once", 1), ("many", COPIES)):
            write_episodes(self.folder / name, external, second, copies)
        indexed = [run_measured(self.ours("index", name)) for name in ("once", "many")]
        return (
            f"{self.options.episodes} episodes x {self.options.steps} steps, two cameras of 256x256 JPEG "
            f"(quality 95, 4:2:0, {statistics.mean(sizes) / 1000:.1f} kB on average; {what}); indexed once in "
            f"{indexed[0]['opened_s']:.1f} s (x{COPIES}: {indexed[1]['opened_s']:.1f} s)"
        )

    @property
    def frames(self) -> int:
        """Samples of the data set: Bridge's first step and the last step of an episode start no chunk."""
        return int(self.options.episodes * (self.options.steps - 2))

    def ours(self, task: str, data: str, *more: str) -> list[str]:
        """Return the command for our side."""
        cores = str(self.options.cores)
        return [*self._ours, "--task", task, "--data", str(self.folder / data), "--cores", cores, *more]

    def tfdata(self, data: str, *more: str) -> list[str]:
        """Return the command for tf.data."""
        return [*self._tensorflow, "--data", str(self.folder / data), *more]

    def load(self, name: str, data: str, *more: str) -> Contender:
        """Return our loader, e.g. with some workers."""
        return Contender(name, self.ours("load", data, *more, *self._timing))

    def load_tfdata(self, name: str, data: str, buffer: int, *more: str) -> Contender:
        """Return tf.data with some shuffle buffer, tuned."""
        return Contender(name, self.tfdata(data, "--buffer", str(buffer), *self._timing, *more))

    def load_octo(self, name: str, data: str, buffer: int, *more: str) -> Contender:
        """Return tf.data as Octo and OpenVLA put it together."""
        python, _, *common = self.tfdata(data, "--buffer", str(buffer), *self._timing, *more)
        return Contender(name, [python, str(HERE / "octo_pipeline.py"), *common])

    def limit(self, name: str) -> Contender:
        """Return what decoding and resizing alone reach."""
        return Contender(name, self.ours("limit", "once", *self._timing))

    def check(self) -> str:
        """Compare the first samples of both sides.

        Raises:
            RuntimeError: If they differ: figures of different work mean nothing.
        """
        files = [self.folder / "ours.npz", self.folder / "tfdata.npz"]
        count = str(min(64, self.frames))
        for command, file in zip((self.ours("check", "once"), self.tfdata("once")), files, strict=True):
            subprocess.run(
                [*command, "--batch", count, "--check", str(file)], check=True, stderr=subprocess.DEVNULL
            )
        ours, theirs = (dict(np.load(file)) for file in files)
        numbers = max(float(np.abs(ours[key] - theirs[key]).max()) for key in ("state", "actions"))
        levels = [float(np.abs(ours[key] - theirs[key].astype(float)).mean()) for key in ("external", "second")]
        same_types = all(ours[key].dtype == theirs[key].dtype for key in ours)
        same_masks = np.array_equal(ours["mask"], theirs["mask"])
        text = (
            f"{count} samples of both: states and actions differ by at most {numbers:.1e}, masks "
            f"{'are equal' if same_masks else 'DIFFER'}, pictures by {levels[0]:.2f} and {levels[1]:.2f} of 255 "
            "levels on average (decoder and rounding)"
        )
        if not (numbers < SAME_NUMBERS and max(levels) < SAME_LEVELS and same_masks and same_types):
            raise RuntimeError(f"The two pipelines do not do the same work: {text}")
        return text


def machine(cores: int, results: list[dict[str, Any]]) -> str:
    """Describe the processor and the versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    model = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    versions: dict[str, str] = {}
    for result in results:
        versions |= result["versions"]
    return f"{model}, {cores} of {os.cpu_count()} cores; " + ", ".join(f"{k} {v}" for k, v in versions.items())


def code_version() -> str:
    """Return the commit of the code that is measured, and whether files differ from it: people edit meanwhile."""
    code = [f"src/spear_lightning/{part}" for part in ("robot_data", "geometry", "batches.py")]
    commands = (["log", "-1", "--format=%h", "--", *code], ["status", "--porcelain", *code])
    answers = [subprocess.run(["git", "-C", HERE.parent, *c], capture_output=True, text=True) for c in commands]
    if any(answer.returncode for answer in answers):
        return "unknown (no git checkout)"
    commit, changes = (answer.stdout.strip() for answer in answers)
    return f"commit {commit}" + (", with uncommitted changes" if changes else "")


def report(rows: list[Contender], comparison: Comparison, facts: list[str], options: argparse.Namespace) -> str:
    """Return the Markdown file."""
    today = datetime.date.today().isoformat()
    command = shlex.join(["python", "benchmarks/load_robot_data.py", *sys.argv[1:]])
    return "\n".join(
        [
            f"# Loading robot data, {options.cores} cores, {today}",
            "",
            *(f"- {fact}" for fact in facts),
            "",
            *markdown(HEADER, [row.row() for row in rows]),
            "",
            "How many times as fast, by samples/s (in brackets: by CPU time per sample); a column per reference:",
            "",
            *markdown(comparison.ratio_header(), comparison.ratio_rows()),
            "",
            f"Command: `{command}`. What the columns mean: [README](../README.md#load_robot_data).",
            "",
        ]
    )


def new_result(cores: int) -> Path:
    """Return a file for today's result that does not exist yet."""
    name = f"{datetime.date.today().isoformat()}_load_robot_data_{cores}cores"
    names = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
    return next(path for path in (HERE / "results" / f"{each}.md" for each in names) if not path.exists())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=60)
    parser.add_argument("--steps", type=int, default=40, help="steps of an episode, at least 8")
    parser.add_argument(
        "--seconds", type=float, default=3, help="measured time of every run, after 2 s of warm-up"
    )
    parser.add_argument("--rounds", type=int, default=2, help="rounds of the contenders that are compared")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--output", type=Path, help="default: results/DATE_load_robot_data_Ncores.md")
    parser.add_argument(
        "--photographs",
        type=Path,
        default=HERE.parent.parent / "shared" / "data" / "photographs",
        help="folder of pictures to cut frames from; without it, textures are made",
    )
    parser.add_argument("--tensorflow", type=Path, default=HERE / ".venv-tensorflow", help="its environment")
    return parser.parse_args()


def main() -> int:
    """Run the benchmark."""
    options = parse_arguments()
    start = time.perf_counter()
    version = code_version()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan
    if hasattr(os, "sched_setaffinity"):
        # Inherited by everything that is started from here.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    tensorflow = tensorflow_python(options.tensorflow)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder), tensorflow)
        with console.status("making episodes"):
            data = bench.make_data()
            same = bench.check()
        console.print(f"Same work: {same}.")
        comparison = Comparison(bench)
        comparison.measure(options.rounds)
    rows, findings = comparison.rows(), comparison.findings()
    results = [measured for contender in rows for measured in contender.rounds]
    if version != code_version():
        version += f"; CHANGED DURING THE RUN to {code_version()}: the figures belong to no version"
    facts = [
        f"Code: {version}.",
        f"Machine: {machine(options.cores, results)}.",
        f"Data: {data}.",
        f"Same work: {same}.",
        *findings,
        f"{options.rounds} rounds of the compared ones, in turns; whole run {time.perf_counter() - start:.0f} s; "
        f"load average before it {load:.1f}: other work lowers all figures, CPU times least.",
    ]
    table = Table(*HEADER)
    for contender in rows:
        table.add_row(*contender.row())
    console.print(table)
    ratios = Table(*comparison.ratio_header())
    for cells in comparison.ratio_rows():
        ratios.add_row(*cells)
    console.print(ratios)
    for fact in facts:
        console.print(f"- {fact}", highlight=False)
    output = options.output or new_result(options.cores)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(report(rows, comparison, facts, options))
    console.print(f"written: {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

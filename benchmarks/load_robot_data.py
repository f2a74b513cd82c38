"""Samples/s of our robot data loader against a tf.data pipeline that does the same work on the same cores.

Makes a data set (RLDS, Bridge V2's layout), checks that both give the same samples, measures both in turns, and
writes a Markdown file. TensorFlow is installed into an environment of its own on first use.

    .venv/bin/python benchmarks/load_robot_data.py
"""

from __future__ import annotations

import argparse
import datetime
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from measure import run_measured
from rich.console import Console
from rich.table import Table
from robot_episodes import film, scenes, write_episodes

HERE = Path(__file__).resolve().parent
TENSORFLOW = ("tensorflow-cpu>=2.15,<2.22", "psutil")
GOAL = 5.0
BATCH = 32
COPIES = 8
OPENVLA_BUFFER = 256_000
SAME_NUMBERS, SAME_LEVELS = 1e-4, 3.0

console = Console(width=120)


@dataclass
class Contender:
    """One way to load, and what was measured of it in one or more rounds."""

    name: str
    command: list[str]
    rounds: list[dict[str, Any]] = field(default_factory=list)

    def measure(self) -> None:
        """Run once more."""
        with console.status(self.name):
            self.rounds.append(run_measured(self.command))

    def median(self, key: str) -> float:
        """Return the median over rounds of a figure."""
        return statistics.median(measured[key] for measured in self.rounds)

    @property
    def windows(self) -> list[float]:
        """Samples/s of all windows of all rounds."""
        return [rate for measured in self.rounds for rate in measured["windows"]]

    @property
    def rate(self) -> float:
        """Median samples/s."""
        return statistics.median(self.windows)

    def row(self) -> list[str]:
        """Return the figures for the table."""
        first = self.rounds[0]["first_batch_s"]
        return [
            self.name,
            f"{self.rate:,.0f}",
            f"{min(self.windows):,.0f}-{max(self.windows):,.0f}",
            f"{self.median('cpu_ms'):.2f}",
            "-" if first is None else f"{self.median('first_batch_s'):.1f}",
            f"{self.median('rss_mb'):,.0f}",
            f"{self.median('pss_mb'):,.0f}",
        ]


HEADER = ["loader", "samples/s", "windows", "CPU ms/sample", "first batch s", "peak RSS MB", "peak PSS MB"]


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

    def load(self, name: str, data: str, workers: int) -> Contender:
        """Return our loader with some workers."""
        return Contender(name, self.ours("load", data, "--workers", str(workers), *self._timing))

    def load_tfdata(self, name: str, data: str, buffer: int, *more: str) -> Contender:
        """Return tf.data with some shuffle buffer."""
        return Contender(name, self.tfdata(data, "--buffer", str(buffer), *self._timing, *more))

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


def compare(bench: Bench) -> tuple[list[Contender], list[str]]:
    """Measure everything; returns the rows and what follows from them."""
    cores, frames = bench.options.cores, bench.frames
    ours = bench.load(f"ours, {cores} workers", "once", cores)
    tfdata = bench.load_tfdata(f"tf.data, buffer {frames:,}", "once", frames)
    limit = bench.limit(f"decode + resize alone, {cores} processes")
    # In turns: other work on the machine then disturbs all alike.
    for _ in range(bench.options.rounds):
        for contender in (limit, ours, tfdata):
            contender.measure()
    many = bench.load(f"ours, {cores} workers, {COPIES}x the episodes", "many", cores)
    full = bench.load_tfdata(
        f"tf.data, {COPIES}x the episodes, buffer {COPIES * frames:,}", "many", COPIES * frames
    )
    lanczos = bench.load_tfdata("tf.data, Lanczos as Octo and OpenVLA", "once", frames, "--resize", "lanczos3")
    others = [bench.load("ours, in-process", "once", 0), lanczos, many, full]
    if cores > 1:
        others.insert(0, bench.load("ours, 1 worker", "once", 1))
    for contender in others:
        contender.measure()
    split = others.index(lanczos)
    return [limit, ours, *others[:split], many, tfdata, full, lanczos], [
        *ratios(ours, tfdata, limit),
        f"Against tf.data with the Lanczos filter that Octo and OpenVLA use: {ours.rate / lanczos.rate:.2f}x; by "
        f"CPU time {lanczos.median('cpu_ms') / ours.median('cpu_ms'):.2f}x.",
        *memory(ours, many, tfdata, full, frames),
    ]


def ratios(ours: Contender, tfdata: Contender, limit: Contender) -> list[str]:
    """Say how our loader stands to tf.data and to the limit."""

    def paired(a: Contender, b: Contender) -> tuple[float, str]:
        # Round by round: medians over all rounds would compare a quiet one of a with a busy one of b.
        rounds = zip(a.rounds, b.rounds, strict=True)
        each = [statistics.median(x["windows"]) / statistics.median(y["windows"]) for x, y in rounds]
        cpu = b.median("cpu_ms") / a.median("cpu_ms")
        ratio = statistics.median(each)
        return (
            ratio,
            f"{ratio:.2f}x ({min(each):.2f}-{max(each):.2f} over {len(each)} rounds), {cpu:.2f}x by CPU time",
        )

    ratio, text = paired(ours, tfdata)
    share, share_text = paired(ours, limit)
    return [
        f"Ours / tf.data: {text}. The goal of {GOAL:g}x is {'met' if ratio >= GOAL else 'not met'}.",
        f"Ours / decode and resize alone: {share_text}; that is {100 * (1 - share):.0f} % below this limit.",
        f"Decode and resize alone / tf.data: {paired(limit, tfdata)[1]}: more than a loader that decodes and "
        "resizes like this can reach.",
    ]


def memory(ours: Contender, many: Contender, tfdata: Contender, full: Contender, frames: int) -> list[str]:
    """Say how memory and start-up grow with the data."""
    added = (COPIES - 1) * frames
    kilobytes = (full.median("rss_mb") - tfdata.median("rss_mb")) * 1000 / added
    start = (full.median("first_batch_s") - tfdata.median("first_batch_s")) / added
    more = many.median("rss_mb") - ours.median("rss_mb")
    return [
        f"{COPIES}x the episodes: ours {more:+.0f} MB ({more * 1000 / added:.1f} kB a frame); tf.data, with a "
        f"buffer of all frames, {kilobytes * added / 1000:+,.0f} MB ({kilobytes:.1f} kB a frame).",
        f"At OpenVLA's buffer of {OPENVLA_BUFFER:,} frames that would be about "
        f"{kilobytes * OPENVLA_BUFFER / 1e6:.0f} GB a process and {start * OPENVLA_BUFFER:.0f} s to fill it "
        "(extrapolated, files in the page cache).",
    ]


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
    """Return the commit that is measured, and whether the package differs from it: people edit while runs last."""
    commands = (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "src"])
    answers = [subprocess.run(["git", "-C", HERE.parent, *c], capture_output=True, text=True) for c in commands]
    if any(answer.returncode for answer in answers):
        return "unknown (no git checkout)"
    commit, changes = (answer.stdout.strip() for answer in answers)
    return f"commit {commit}" + (", with uncommitted changes in src" if changes else "")


def report(rows: list[Contender], facts: list[str], options: argparse.Namespace) -> str:
    """Return the Markdown file."""
    table = [HEADER, ["---"] * len(HEADER), *(contender.row() for contender in rows)]
    today = datetime.date.today().isoformat()
    command = shlex.join(["python", "benchmarks/load_robot_data.py", *sys.argv[1:]])
    return "\n".join(
        [
            f"# Loading robot data, {options.cores} cores, {today}",
            "",
            *(f"- {fact}" for fact in facts),
            "",
            *("| " + " | ".join(cells) + " |" for cells in table),
            "",
            f"Command: `{command}`. What the columns mean: [README](../README.md#load_robot_data).",
            "",
        ]
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=60)
    parser.add_argument("--steps", type=int, default=40, help="steps of an episode, at least 8")
    parser.add_argument(
        "--seconds", type=float, default=4, help="measured time of every run, after 2 s of warm-up"
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the contenders that are compared")
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
        rows, findings = compare(bench)
    results = [measured for contender in rows for measured in contender.rounds]
    if version != code_version():
        raise RuntimeError("The package was changed during the run: its figures belong to no version")
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
    for fact in facts:
        console.print(f"- {fact}", highlight=False)
    name = f"{datetime.date.today().isoformat()}_load_robot_data_{options.cores}cores.md"
    output = options.output or HERE / "results" / name
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(report(rows, facts, options))
    console.print(f"written: {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

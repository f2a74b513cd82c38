"""`spear label`: images in, 3D labels out; `spear label stats` and `spear label report` look at them.

Several processes share a run if a launcher starts them, for example `torchrun --nproc_per_node 8 $(which spear)
label --config FILE`, SLURM's srun, or Lightning's `fabric run`. It may go on later with another number of them.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.resources import files
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from spear_lightning.errors import ConfigError
from spear_lightning.labeling.work_split import WorkSplit

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from spear_lightning.labeling.pipeline import Tally

IMPATIENT = "impatient.yaml"
"""The configuration behind `--images`, beside this file."""

WITH_PARTS = tuple(
    f"{__package__}.{name}" for name in ("depth_files", "gemini", "local_detectors", "sam2", "video_source")
)
"""Modules whose classes the help lists, and which need no path in front of their names."""


def main(arguments: list[str]) -> int:
    """Run `spear label ...`.

    Args:
        arguments: What follows `label`.

    Returns:
        Exit status 0; errors are raised.
    """
    looking = {"stats": _stats, "report": _report}
    if arguments and arguments[0] in looking:
        return looking[arguments[0]](arguments[1:])
    return _label(arguments)


def _label(arguments: Sequence[str]) -> int:
    from spear_lightning.labeling.pipeline import LabelingRun

    parser = label_parser()
    options = parser.parse_args(with_images(arguments))
    # Boxes are fitted with it: if it is missing, this is said before models are loaded and replies are paid.
    import scipy  # noqa: F401

    config = parser.instantiate(options)
    run = LabelingRun(**{name: config[name] for name in signature(LabelingRun).parameters})
    split = WorkSplit.from_environment()
    with _progress(split) as (bar, console):
        logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=console)])
        task = bar.add_task("", total=None, failed=0, costs="")

        def show(tally: Tally) -> None:
            done = tally.labelled + tally.failed
            bar.update(task, total=tally.images, completed=done, failed=tally.failed, costs=tally.costs)

        tally = run.run(split, config.retry_failed, show, config.device)
    Console().print(_summary(tally, run.out, split))
    return 0


def label_parser() -> ArgumentParser:
    """Return the parser of `spear label`, whose options are those of `LabelingRun` and its parts."""
    from jsonargparse import ArgumentParser

    from spear_lightning.labeling.pipeline import LabelingRun

    for module in WITH_PARTS:
        import_module(module)
    parser = ArgumentParser(prog="spear label", description=__doc__)
    parser.add_argument("--config", action="config", help="experiment, e.g. experiments/labeling/egoexo4d.yaml")
    parser.add_argument("--images", help="label this folder; what is not said is as in labeling/impatient.yaml")
    parser.add_argument("--names", nargs="+", help="with --images: what to look for")
    parser.add_argument("--retry_failed", action="store_true", help="try again what failed before")
    parser.add_argument(
        "--device", type=str | None, help="where to compute; default: this process's GPU, or the CPU"
    )
    parser.add_class_arguments(LabelingRun)
    return parser


def with_images(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with what `--images FOLDER` and `--names NAME ...` stand for put before the others.

    Raises:
        ConfigError: If there are names without a folder.
    """
    short = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    short.add_argument("--images")
    short.add_argument("--names", nargs="+")
    given, others = short.parse_known_args(list(arguments))
    if given.images is None:
        if given.names is not None:
            raise ConfigError(
                "What to look for is said with --images alone",
                where="--names",
                found=given.names,
                remedy=f"with --config, give --detector.names='{json.dumps(given.names)}'",
            )
        return list(arguments)
    folder = Path(given.images)
    meant = [
        f"--config={files(__package__).joinpath(IMPATIENT)}",
        f"--source.folder={folder}",
        f"--out={Path('runs') / 'labels' / folder.resolve().name}",
    ]
    if given.names:
        meant.append(f"--detector.names={json.dumps(given.names)}")
    return [*meant, *others]


@contextmanager
def _progress(split: WorkSplit) -> Iterator[tuple[Progress, Console]]:
    console = Console(stderr=True)
    columns = (
        TextColumn("images"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[failed]} failed"),
        TextColumn("{task.fields[costs]}"),
    )
    # One bar is enough; the other processes have as much to do.
    with Progress(*columns, console=console, transient=True, disable=split.rank != 0) as bar:
        yield bar, console


def _summary(tally: Tally, out: str, split: WorkSplit) -> Table:
    share = f" (process {split.rank} of {split.world_size})" if split.world_size > 1 else ""
    table = Table(title=f"{out}{share}", show_header=False)
    table.add_row("labelled", f"{tally.labelled} of {tally.images} images that were to be labelled")
    table.add_row("failed", f"{tally.failed}" + (", see failures-*.jsonl; --retry_failed" if tally.failed else ""))
    if tally.skipped:
        table.add_row("failed before", f"{tally.skipped}, not tried again; --retry_failed does")
    table.add_row("objects", f"{tally.objects}, and {tally.dropped} detections without a box")
    if tally.seconds:
        table.add_row("speed", f"{(tally.labelled + tally.failed) / tally.seconds:.2f} images/s")
        busy = ", ".join(f"{step} {spent / tally.seconds:.2f}" for step, spent in tally.busy_s.items())
        table.add_row("threads at work", f"{busy} (on average)")
    if tally.costs:
        table.add_row("costs, estimated", tally.costs)
    return table


def _stats(arguments: Sequence[str]) -> int:
    from spear_lightning.labeling.label_statistics import measure, statistics_tables

    parser = argparse.ArgumentParser(prog="spear label stats", description="What a folder of labels holds.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--names", type=int, default=20, help="most frequent names to list (default: 20)")
    options = parser.parse_args(arguments)
    for table in statistics_tables(measure(options.folder), options.names):
        Console().print(table)
    return 0


def _report(arguments: Sequence[str]) -> int:
    from spear_lightning.labeling.report import write_report

    parser = argparse.ArgumentParser(
        prog="spear label report", description="A page to judge labels by: pictures with masks and 3D boxes."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, help="default: FOLDER/report.html")
    parser.add_argument("--images", type=int, default=50, help="pictures, drawn at random (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--width", type=int, default=640, help="of the pictures, pixels (default: 640)")
    options = parser.parse_args(arguments)
    out = options.out or options.folder / "report.html"
    write_report(options.folder, out, options.images, options.seed, options.width)
    Console().print(f"Report: {out}", soft_wrap=True)
    return 0

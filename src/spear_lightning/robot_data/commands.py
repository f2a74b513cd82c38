"""`spear data`: index robot data sets, look into them, measure and check a mixture."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from spear_lightning.errors import ConfigError
from spear_lightning.geometry import quaternions
from spear_lightning.robot_data.dataset_entry import DatasetEntry
from spear_lightning.robot_data.dataset_folder import DatasetFolder, open_folder
from spear_lightning.robot_data.episode_index import EpisodeIndex
from spear_lightning.robot_data.experiment_options import (
    camera_options,
    mixture_options,
    normalizer_clamp,
    read_data_options,
)
from spear_lightning.robot_data.index_build import BESIDE, build_index, index_path
from spear_lightning.robot_data.index_store import DESCRIPTION
from spear_lightning.robot_data.registry import entry_for_folder, entry_of, read_registry
from spear_lightning.robot_data.robot_mixture import RobotMixture

WIDTH = 160
"""Characters in a line of tables that are not printed to a terminal."""


def main(arguments: list[str]) -> int:
    """Run `spear data ...`.

    Args:
        arguments: What follows `data`.

    Returns:
        Exit status: 1 if `check` found a data set that cannot be used, else 0; errors are raised.
    """
    options = _parser().parse_args(arguments)
    return options.run(options) or 0


def _parser() -> argparse.ArgumentParser:
    elsewhere = "`spear data tabletop` makes a data set: see its own --help."
    parser = argparse.ArgumentParser(prog="spear data", description=__doc__, epilog=elsewhere)
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    index = verbs.add_parser("index", help="read an RLDS folder once and write its index")
    index.set_defaults(run=_index)
    _add_folder_options(index)
    index.add_argument("--workers", type=int, help="processes; default: one per core")
    index.add_argument(
        "--verify_images", action="store_true", help="decode every image instead of looking at its ends"
    )

    show = verbs.add_parser("show", help="print what an RLDS folder holds and what its index found")
    show.set_defaults(run=_show)
    _add_folder_options(show)
    show.add_argument("--episodes", type=int, default=5, help="episodes to list (default: 5)")

    statistics = verbs.add_parser("statistics", help="compute the quantiles of an experiment's mixture")
    statistics.set_defaults(run=_statistics)
    _add_experiment_options(statistics)

    check = verbs.add_parser("check", help="look through an experiment's mixture before training on it")
    check.set_defaults(run=_check)
    _add_experiment_options(check)
    check.add_argument("--report", default="data_check.html", help="HTML file to write (default: data_check.html)")
    check.add_argument("--examples", type=int, default=3, help="frames to show of every data set (default: 3)")
    return parser


def _add_experiment_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        required=True,
        action="append",
        help="experiment, e.g. experiments/quickstart/vla.yaml; several merge from left to right",
    )
    parser.add_argument("--root", help="data root instead of the experiment's")
    parser.add_argument("--index_folder", help="folder of indexes instead of the experiment's")


def _add_folder_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", help="one data set: an RLDS folder such as bridge_dataset/1.0.0, or a LeRobot folder"
    )
    parser.add_argument("--dataset", help="registry id of its conventions; default: found by its name")
    parser.add_argument("--registry", help="YAML file of your own registry entries")
    parser.add_argument("--split", default="train", help="default: train")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--beside", action="store_true", help="keep the index in PATH/spear_index")
    place.add_argument(
        "--index_folder", help="keep indexes there; default: $SPEAR_CACHE_DIR/indexes or ~/.cache/..."
    )


def _resolve(options: argparse.Namespace) -> tuple[DatasetFolder, DatasetEntry, Path | None]:
    folder = open_folder(options.path)
    known = read_registry(options.registry)
    if options.dataset:
        entry = entry_of(options.dataset, known)
    else:
        entry = entry_for_folder(folder.path, folder.name, known)
    if not options.beside:
        return folder, entry, Path(options.index_folder) if options.index_folder else None
    if not isinstance(folder.path, Path):
        raise ConfigError(
            "An index cannot be kept in a bucket: it is mapped into memory",
            where="--beside",
            found=folder.path,
            remedy="leave --beside out, or say where with --index_folder",
        )
    return folder, entry, folder.path / BESIDE


def _index(options: argparse.Namespace) -> None:
    folder, entry, root = _resolve(options)
    path = index_path(folder, options.split, entry, root)
    done = (path / DESCRIPTION).is_file()
    console = Console()
    if done and (not options.verify_images or EpisodeIndex(path).description["images_verified"]):
        console.print("The index is up to date.")
    else:
        build_index(folder, options.split, entry, root, options.workers, options.verify_images)
    console.print(_report(EpisodeIndex(path)))
    console.print(f"Index: {path}", soft_wrap=True)


def _show(options: argparse.Namespace) -> None:
    folder, entry, root = _resolve(options)
    path = index_path(folder, options.split, entry, root)
    if not (path / DESCRIPTION).is_file():
        build_index(folder, options.split, entry, root)
    index = EpisodeIndex(path)
    console = Console()
    console.print(_report(index))
    table = Table(title="Episodes")
    for column in ("episode", "steps", "path length (m)", "turned (deg)", "instruction"):
        table.add_column(column, justify="left" if column == "instruction" else "right")
    for episode in range(min(options.episodes, index.num_episodes)):
        pose_T7 = torch.from_numpy(np.array(index.pose[slice(*index.episode_starts[episode : episode + 2])]))
        length = torch.linalg.vector_norm(pose_T7[1:, :3] - pose_T7[:-1, :3], dim=-1).sum()
        turned = torch.rad2deg(quaternions.rotation_angle(pose_T7[1:, 3:], pose_T7[:-1, 3:]).sum())
        instruction = index.instructions[index.instruction_ids[episode]]
        table.add_row(str(episode), str(len(pose_T7)), f"{length:.3f}", f"{turned:.1f}", instruction)
    console.print(table)


def _report(index: EpisodeIndex) -> Table:
    """Return what was indexed, and what was left out and why."""
    about = index.description
    table = Table(title=f"{about['name']} {about['version']} {about['split']}", show_header=False)
    pose_N7 = np.asarray(index.pose[:: max(1, len(index) // 200_000)])
    rows: dict[str, Any] = {
        "episodes": f"{index.num_episodes:,}",
        "frames": f"{len(index):,} at {index.rate_hz:g} Hz",
        "frames that may start a chunk": f"{len(index.samples):,}",
        "instructions": f"{len(set(index.instructions) - {''}):,} distinct",
        "position (m), 1 % to 99 %": " | ".join(
            f"{axis} {low:.3f} to {high:.3f}"
            for axis, low, high in zip("xyz", *np.quantile(pose_N7[:, :3], (0.01, 0.99), axis=0), strict=True)
        ),
    }
    for camera in index.cameras:
        rows[f"camera {camera}"] = f"in {100 * index.camera_present(camera).mean():.0f} % of the episodes"
    for problem, count in about["problems"].items():
        rows[problem] = f"{count:,}, first in {about['problem_examples'][problem]}"
    if not about["problems"]:
        rows["problems"] = "none"
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table


def _experiment_data(options: argparse.Namespace) -> dict[str, Any]:
    data = read_data_options(options.config)
    given = {"root": options.root, "index_folder": options.index_folder}
    return data | {name: value for name, value in given.items() if value}


def _check(options: argparse.Namespace) -> int:
    from spear_lightning.robot_data.check_report import tables, write_report
    from spear_lightning.robot_data.data_check import check_mixture

    data = _experiment_data(options)
    clamp = normalizer_clamp(options.config)
    findings = check_mixture(mixture_options(data), camera_options(data), clamp, options.examples)
    # In a file or a pipe nobody minds long lines.
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    for table in tables(findings):
        console.print(table)
    path = Path(options.report)
    write_report(path, findings, f"{', '.join(options.config)}: data under {data['root']}")
    console.print(f"Example frames: {path}", soft_wrap=True)
    return 0 if all(each.usable for each in findings.datasets) else 1


def _statistics(options: argparse.Namespace) -> None:
    data = _experiment_data(options)
    mixture = RobotMixture(**mixture_options(data))
    statistics = mixture.statistics()
    table = Table(title=f"{mixture.chunks.mode} translations and positions, 1 % to 99 %, metres")
    for column in ("", "x", "y", "z"):
        table.add_column(column, justify="right")
    for name in ("translation", "position"):
        low, high = getattr(statistics, f"{name}_low"), getattr(statistics, f"{name}_high")
        table.add_row(name, *(f"{a:.4f} to {b:.4f}" for a, b in zip(low, high, strict=True)))
    shares = Table(title="Mixture")
    for column in ("data set", "frames", "share of the samples", "frames measured"):
        shares.add_column(column, justify="right")
    for source, share in zip(mixture.training, mixture.shares, strict=True):
        measured = statistics.samples[source.index.dataset]
        shares.add_row(source.index.dataset, f"{len(source):,}", f"{100 * share:.2f} %", f"{measured:,}")
    console = Console()
    console.print(shares)
    console.print(table)

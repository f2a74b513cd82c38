"""`spear data tabletop`: demonstrations, labelled images and pictures with depth of the embedded world."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from spear_lightning.errors import ConfigError
from spear_lightning.worlds.tabletop.demonstrations import (
    IMAGE_SIZES,
    DemonstrationPlan,
    check_demonstrations,
    write_demonstrations,
)
from spear_lightning.worlds.tabletop.tasks import TASKS


def main(arguments: list[str]) -> int:
    """Run `spear data tabletop`.

    Args:
        arguments: What follows `data tabletop`.

    Returns:
        Exit status 0; errors are raised.

    Raises:
        ConfigError: If nothing was asked for, or an option is wrong.
    """
    _run(_parser().parse_args(arguments))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="spear data tabletop", description=__doc__)
    parser.add_argument("--out", required=True, help="data root: the data set goes to OUT/tabletop/1.0.0")
    parser.add_argument("--episodes", type=int, default=0, help="demonstrations of the scripted experts")
    parser.add_argument(
        "--labelled_images", type=int, default=0, help="images with exact 3D labels, to OUT/labels"
    )
    parser.add_argument(
        "--depth_pictures",
        type=int,
        default=0,
        help="pictures by cameras of all kinds with exact depth, as large as those of primary, to OUT/depth",
    )
    parser.add_argument(
        "--tasks", nargs="+", help=f"demonstrations: episodes take turns (default: {' '.join(TASKS)})"
    )
    parser.add_argument(
        "--cameras",
        nargs="+",
        default=[f"{name}={width}x{height}" for name, (width, height) in IMAGE_SIZES.items()],
        help="NAME=WIDTHxHEIGHT of primary, secondary, wrist (default: %(default)s)",
    )
    parser.add_argument("--distractors", nargs=2, type=int, help="demonstrations: fewest, most (default: 1 2)")
    parser.add_argument(
        "--plain",
        action="store_true",
        default=None,
        help="demonstrations in the easy world: one table and light, cameras in the same place, no distractors",
    )
    parser.add_argument("--seed", type=int, default=0, help="two runs with one seed write the same bytes")
    parser.add_argument("--processes", type=int, help="default: one per core")
    return parser


def _run(options: argparse.Namespace) -> None:
    if max(options.episodes, options.labelled_images, options.depth_pictures) < 1:
        raise ConfigError(
            "There is nothing to write",
            expected="--episodes N, --labelled_images N, --depth_pictures N, or several",
        )
    of_episodes = ("tasks", "distractors", "plain")
    for_episodes = [f"--{name}" for name in of_episodes if getattr(options, name) is not None]
    if (options.labelled_images or options.depth_pictures) and for_episodes:
        raise ConfigError(
            "Images with labels or depth show all of the world",
            where=" ".join(for_episodes),
            remedy="leave these options to a call that writes demonstrations alone",
        )
    tasks, plain = options.tasks or list(TASKS), bool(options.plain)
    sizes = dict(camera_size(text) for text in options.cameras)
    fewest, most = (0, 0) if plain else options.distractors or (1, 2)
    if (options.labelled_images or options.depth_pictures) and "primary" not in sizes:
        raise ConfigError(
            "Images with labels or depth are as large as those of the camera primary",
            where="--cameras",
            found=options.cameras,
            expected="primary=WxH among them",
        )
    out, console = Path(options.out), Console()
    plan = DemonstrationPlan(options.episodes, tuple(tasks), sizes, options.seed, (fewest, most), plain)
    _check(options, plan, out)
    if options.episodes:
        folder = write_demonstrations(out, plan, options.processes)
        console.print(f"{options.episodes} demonstrations: {folder}", soft_wrap=True)
    if options.labelled_images:
        from spear_lightning.worlds.tabletop.labelled_images import write_labelled_images

        folder = out / "labels"
        write_labelled_images(folder, options.labelled_images, options.seed, sizes["primary"], options.processes)
        console.print(f"{options.labelled_images} labelled images: {folder}", soft_wrap=True)
    if options.depth_pictures:
        from spear_lightning.worlds.tabletop.depth_pictures import write_depth_pictures

        folder = out / "depth"
        write_depth_pictures(folder, options.depth_pictures, options.seed, sizes["primary"], options.processes)
        console.print(f"{options.depth_pictures} pictures with depth: {folder}", soft_wrap=True)


def _check(options: argparse.Namespace, plan: DemonstrationPlan, out: Path) -> None:
    """Refuse what a part cannot do before another is written."""
    if options.episodes:
        check_demonstrations(out, plan)
    if options.labelled_images:
        from spear_lightning.worlds.tabletop.labelled_images import check_labelled_images

        check_labelled_images(out / "labels", options.labelled_images)
    if options.depth_pictures:
        from spear_lightning.worlds.tabletop.depth_pictures import check_depth_pictures

        check_depth_pictures(out / "depth", options.depth_pictures, options.seed, plan.image_sizes["primary"])


def camera_size(text: str) -> tuple[str, tuple[int, int]]:
    """Parse NAME=WIDTHxHEIGHT.

    Raises:
        ConfigError: If it is something else.
    """
    name, _, size = text.partition("=")
    width, _, height = size.partition("x")
    if not (name and width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise ConfigError(
            "A camera's size cannot be understood", where="--cameras", found=text, expected="NAME=WxH"
        )
    return name, (int(width), int(height))

"""`spear eval`: success rates of a checkpoint, an expert or chance in the embedded world, and their comparison."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, get_args

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from spear_lightning.errors import ConfigError
from spear_lightning.evaluation import shards
from spear_lightning.evaluation.protocol import EvalResult, SuccessMode
from spear_lightning.evaluation.report import (
    RESULT_FILE,
    comparison_table,
    read_result,
    result_table,
    write_result,
)

OF_CHECKPOINTS = ("weights", "execute_steps", "flow_steps", "noise_seed", "device")
"""Options that mean nothing to a scripted policy."""


def main(arguments: list[str]) -> int:
    """Run `spear eval ...`.

    Args:
        arguments: What follows `eval`.

    Returns:
        Exit status 0; errors are raised.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = _parser().parse_args(arguments)
    if options.compare:
        Console().print(comparison_table([read_result(path) for path in options.compare]))
        return 0
    if (options.checkpoint is None) == (options.policy is None):
        raise ConfigError(
            "Say what to evaluate",
            where="--checkpoint, --policy",
            expected="either --checkpoint FILE or --policy expert|random",
        )
    of_checkpoints = [f"--{name}" for name in OF_CHECKPOINTS if getattr(options, name) is not None]
    if options.policy is not None and of_checkpoints:
        raise ConfigError(
            "A scripted policy has no weights and predicts no chunks",
            where=" ".join(of_checkpoints),
            remedy="leave these options out",
        )
    names = [name for name, _ in options.cameras or []]
    if len(set(names)) < len(names):
        raise ConfigError("A camera has one size", where="--cameras", found=names, expected="each camera once")
    folder = options.out
    if (folder / RESULT_FILE).exists():
        raise ConfigError(
            "The folder already holds a result", where=folder, remedy="name another with --out, or delete it"
        )
    # Not in the folder of the result, which may hold anything. One that is interrupted may still be written to.
    with TemporaryDirectory(prefix="spear_eval_", ignore_cleanup_errors=True) as frames:
        with _progress() as progress:
            result = _evaluate(options, folder, progress, Path(frames))
        path = write_result(result, folder)
        console = Console()
        console.print(result_table(result))
        if options.recorded:
            from spear_lightning.evaluation.contact_sheet import draw_episodes

            for picture in draw_episodes(result, Path(frames), folder):
                console.print(f"-> {picture}")
    console.print(f"-> {path}")
    return 0


def _evaluate(options: argparse.Namespace, folder: Path, progress: shards.Progress, frames: Path) -> EvalResult:
    from spear_lightning.evaluation.harness import (
        PLAIN_TABLETOP,
        TABLETOP,
        EvaluationPlan,
        describe_server,
        evaluate_policy,
        evaluate_scripted,
        require_harness,
    )

    plan = EvaluationPlan(
        tasks=tuple(options.tasks) if options.tasks else None,
        episodes=options.episodes,
        seed=options.seed,
        processes=options.processes,
        success_mode=options.success,
        hold_steps=options.hold_steps,
        cameras=dict(options.cameras) if options.cameras else None,
        recorded=options.recorded,
        benchmark=PLAIN_TABLETOP if options.plain else TABLETOP,
    )
    require_harness()
    if options.policy is not None:
        return evaluate_scripted(options.policy, plan, folder, progress, frames)
    import torch

    from spear_lightning.policy import read_checkpoint
    from spear_lightning.policy.vla_eval_server import CheckpointServer

    if options.device != "cpu" and torch.cuda.is_available():
        # The cores are for the simulating processes; torch's idle threads would spin on them.
        torch.set_num_threads(1)
    averaged = bool(read_checkpoint(options.checkpoint).get("ema"))
    wanted: Literal["ema", "raw"] = options.weights or "ema"
    server = CheckpointServer(
        str(options.checkpoint),
        wanted,
        options.device,
        options.execute_steps,
        options.flow_steps,
        options.noise_seed or 0,
    )
    weights = wanted if averaged else "raw"
    return evaluate_policy(
        server, describe_server(server, str(options.checkpoint), weights), plan, folder, progress, frames
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="spear eval", description=__doc__)
    what = parser.add_argument_group("what is evaluated")
    what.add_argument("--checkpoint", type=Path, help="a checkpoint written by `spear fit`")
    what.add_argument(
        "--weights", choices=("ema", "raw"), help="averaged or optimizer's weights; default: averaged"
    )
    what.add_argument("--policy", choices=("expert", "random"), help="a scripted one instead of a checkpoint")
    what.add_argument("--execute_steps", type=int, help="actions of a chunk before the next; default: half of it")
    what.add_argument("--flow_steps", type=int, help="Euler steps of the flow; default: the policy's own")
    what.add_argument("--noise_seed", type=int, help="seed of the policy's noise; default: 0")
    what.add_argument("--device", help="where the policy runs; default: a GPU if there is one")
    how = parser.add_argument_group("how")
    how.add_argument("--tasks", nargs="+", help="names of tasks; default: all")
    how.add_argument("--episodes", type=int, default=75, help="episodes of each task; default: 75")
    how.add_argument("--seed", type=int, default=0, help="which block of held-out episodes; default: 0")
    how.add_argument(
        "--success",
        choices=get_args(SuccessMode),
        default="held",
        help="when an episode is a success; default: held",
    )
    how.add_argument(
        "--hold_steps", type=int, default=5, help="control steps that a task must stay done for; default: 5"
    )
    how.add_argument("--processes", type=int, default=1, help="processes that simulate; default: 1")
    how.add_argument(
        "--cameras",
        nargs="+",
        type=_camera,
        metavar="NAME=WIDTHxHEIGHT",
        help="render at the size of the training data; default: at the size the policy sees",
    )
    how.add_argument("--plain", action="store_true", help="the easy world: see `spear data tabletop --plain`")
    out = parser.add_argument_group("results")
    out.add_argument(
        "--out",
        type=Path,
        default=Path("runs/eval"),
        help="folder for the result and its pictures; default: runs/eval",
    )
    out.add_argument("--recorded", type=int, default=6, help="episodes of each task that are filmed; default: 6")
    out.add_argument(
        "--compare", nargs="+", type=Path, metavar="RESULT", help="print results side by side instead"
    )
    return parser


def _camera(text: str) -> tuple[str, tuple[int, int]]:
    name, _, size = text.partition("=")
    width, _, height = size.partition("x")
    if not name or not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form primary=160x120")
    return name, (int(width), int(height))


@contextmanager
def _progress() -> Iterator[shards.Progress]:
    columns = (
        TextColumn("episodes"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("episodes", total=None)
        yield lambda done, of: bar.update(task, completed=done, total=of)

"""Results on paper: the table in the terminal, the JSON file, and the comparison of several results."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from rich.table import Table

from spear_lightning.errors import DataError
from spear_lightning.evaluation.intervals import Rate, wilson
from spear_lightning.evaluation.protocol import Contestant, Episode, EvalResult, require_same_protocol

RESULT_FILE = "result.json"


def rate_of(episodes: Sequence[Episode]) -> Rate:
    """Return the share of successes with its 95 % interval."""
    return wilson(sum(episode.success for episode in episodes), len(episodes))


def result_table(result: EvalResult) -> Table:
    """Return success per task with 95 % Wilson interval, by the first and the last moment, and episode lengths."""
    protocol = result.protocol
    table = Table(
        title=f"{title_of(result.contestant)} in {protocol.world} {protocol.world_version}",
        caption=f"success: {_explain(result)}; in brackets 95 % Wilson intervals; "
        f"steps: mean length of an episode, first at: mean step at which it was done first; "
        f"{len(result.episodes)} episodes in {result.wall_seconds:.0f} s",
    )
    for column in ("task", "n", "success", "ever", "at end", "steps", "first at"):
        table.add_column(column, justify="left" if column == "task" else "right", no_wrap=True)
    groups = [(task, result.of_task(task)) for task in protocol.tasks]
    for name, episodes in groups if len(groups) == 1 else [*groups, ("all", list(result.episodes))]:
        reached = [item.first_success_step for item in episodes if item.first_success_step is not None]
        table.add_row(
            name,
            str(len(episodes)),
            str(rate_of(episodes)),
            _share([item.first_success for item in episodes]),
            _share([item.final_success for item in episodes]),
            f"{mean(item.steps for item in episodes):.1f}",
            f"{mean(reached):.1f}" if reached else "-",
            end_section=name == protocol.tasks[-1],
        )
    return table


def comparison_table(results: Sequence[EvalResult]) -> Table:
    """Return the success per task of several results side by side.

    Raises:
        ConfigError: If they were not measured in the same way.
    """
    protocol = require_same_protocol(results)
    table = Table(
        title=f"success in {protocol.world} {protocol.world_version}, {protocol.episodes} episodes a task",
        caption=f"success: {_explain(results[0])}; in brackets 95 % Wilson intervals",
    )
    table.add_column("task")
    for result in results:
        table.add_column(title_of(result.contestant), justify="right")
    for task in protocol.tasks:
        table.add_row(task, *(str(rate_of(result.of_task(task))) for result in results))
    return table


def title_of(contestant: Contestant) -> str:
    """Return how a row or column is called."""
    if contestant.name != "policy":
        return contestant.name
    return f"{Path(contestant.source).name} ({contestant.weights}, {contestant.execute_steps} steps a chunk)"


def _explain(result: EvalResult) -> str:
    protocol = result.protocol
    if protocol.success_mode == "first":
        return "done at any time"
    return f"done for {protocol.hold_steps} steps in a row, or at the last step"


def _share(values: Sequence[bool]) -> str:
    return f"{100 * mean(values):.0f} %"


def write_result(result: EvalResult, folder: Path) -> Path:
    """Write `result.json` into a folder, whole or not at all; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RESULT_FILE
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(result.to_dict(), indent=1) + "\n")
    os.replace(temporary, path)
    return path


def read_result(path: str | Path) -> EvalResult:
    """Read a result; a folder stands for its `result.json`.

    Raises:
        DataError: If there is none, or it is not by this version.
    """
    path = Path(path)
    path = path / RESULT_FILE if path.is_dir() else path
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(
            "There is no readable result", where=path, found=error, expected="a result.json of `spear eval`"
        ) from error
    return EvalResult.from_dict(values, where=path)

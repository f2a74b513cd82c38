from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from rich.table import Table

from spear_lightning.errors import ConfigError, DataError
from spear_lightning.evaluation.contact_sheet import contact_sheet, draw_episodes, pick_footage, play_beside
from spear_lightning.evaluation.protocol import (
    Contestant,
    Episode,
    EvalProtocol,
    EvalResult,
    require_same_protocol,
)
from spear_lightning.evaluation.report import comparison_table, read_result, result_table, write_result

PROTOCOL = EvalProtocol("tabletop", "1", "mujoco 4", ("touch", "stack"), 4, 0, 2**40, 5.0, "held", 5)
OUTCOMES = {"touch": [True, True, True, False], "stack": [False, False, True, False]}
LENGTHS = {"touch": 10, "stack": 20}


@pytest.fixture
def result() -> EvalResult:
    episodes = [
        Episode(
            task=task,
            number=number,
            seed=2**40 + number,
            success=done,
            # One stack fell over again.
            first_success=done or (task == "stack" and number == 1),
            final_success=done,
            first_success_step=6 + number if done or (task == "stack" and number == 1) else None,
            steps=LENGTHS[task] + number,
        )
        for task, outcomes in OUTCOMES.items()
        for number, done in enumerate(outcomes)
    ]
    return EvalResult(
        PROTOCOL, Contestant("policy", "a.ckpt", "ema", "12ab"), tuple(episodes), {"python": "3"}, 12.5
    )


def printed(table: Table) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    return console.file.getvalue()


def cells(table: Table) -> list[list[str]]:
    return [list(row) for row in zip(*(column.cells for column in table.columns), strict=True)]


def test_the_table_counts_each_way_of_success(result: EvalResult) -> None:
    rows = cells(result_table(result))
    assert rows[0] == ["touch", "4", "75 % [30, 95]", "75 %", "75 %", "11.5", "7.0"]
    assert rows[1] == ["stack", "4", "25 % [5, 70]", "50 %", "25 %", "21.5", "7.5"]
    assert rows[2] == ["all", "8", "50 % [22, 78]", "62 %", "50 %", "16.5", "7.2"]
    assert "95 % Wilson" in printed(result_table(result))


def test_a_result_survives_its_file(result: EvalResult, tmp_path: Path) -> None:
    path = write_result(result, tmp_path / "new")
    assert read_result(path) == result
    assert read_result(path.parent) == result
    assert [entry.name for entry in path.parent.iterdir()] == ["result.json"]
    # What a person writes into the file stays.
    values = json.loads(path.read_text())
    values["episodes"][3]["failure"] = "pushed it away"
    path.write_text(json.dumps(values))
    assert read_result(path).episodes[3].failure == "pushed it away"


@pytest.mark.parametrize("text", ["", "{", "{}", '{"protocol": {"tasks": ["a"]}}', "[]"])
def test_other_files_are_no_results(text: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(DataError):
        read_result(tmp_path)
    with pytest.raises(DataError, match="no readable result"):
        read_result(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    "change",
    [
        {"world": "kitchen"},
        {"world_version": "2"},
        {"simulator": "mujoco 5"},
        {"tasks": ("touch",)},
        {"episodes": 5},
        {"seed": 1},
        {"first_episode_seed": 0},
        {"control_hz": 10.0},
        {"success_mode": "first"},
        {"hold_steps": 1},
    ],
)
def test_other_protocols_are_not_compared(result: EvalResult, change: dict) -> None:
    other = replace(result, protocol=replace(PROTOCOL, **change))
    with pytest.raises(ConfigError, match=rf"(?s)not measured in the same way.*{next(iter(change))}"):
        comparison_table([result, other])


def test_tasks_in_another_order_are_compared(result: EvalResult) -> None:
    other = replace(result, protocol=replace(PROTOCOL, tasks=PROTOCOL.tasks[::-1]))
    assert cells(comparison_table([result, other]))[0] == ["touch", "75 % [30, 95]", "75 % [30, 95]"]
    assert cells(comparison_table([other, result]))[0][0] == "stack"


def test_other_contestants_are(result: EvalResult) -> None:
    other = replace(
        result,
        contestant=Contestant("random"),
        episodes=tuple(replace(episode, success=False) for episode in result.episodes),
    )
    assert require_same_protocol([result, other]) == PROTOCOL
    table = comparison_table([result, other])
    assert cells(table)[0] == ["touch", "75 % [30, 95]", "0 % [0, 49]"]
    assert [column.header for column in table.columns][2] == "random"


def store(folder: Path, task: str, number: int, length: int) -> None:
    folder.mkdir(exist_ok=True)
    frames = np.full((length, 30, 40, 3), 10 * number, np.uint8)
    # A film leaves out frames that repeat.
    frames += np.arange(length, dtype=np.uint8)[:, None, None, None]
    frames[-1] = 200
    np.savez_compressed(folder / f"{task}_{number:05d}.npz", frames=frames, instruction=f"{task} the können")


def test_successes_and_failures_are_shown(result: EvalResult, tmp_path: Path) -> None:
    frames = tmp_path / "frames"
    for task in OUTCOMES:
        for number in range(4):
            store(frames, task, number, 5 + number)
    shown = pick_footage(result, frames, successes=2, failures=1)
    assert [(item.episode.task, item.episode.number) for item in shown] == [
        ("touch", 0), ("touch", 1), ("touch", 3), ("stack", 0), ("stack", 2),
    ]  # fmt: skip
    files = draw_episodes(result, frames, tmp_path, successes=2, failures=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["episodes.gif", "episodes.png", "frames"]
    with Image.open(files[1]) as film:
        assert film.n_frames == 8
        assert film.info["duration"] == 200
    sheet = np.asarray(contact_sheet(shown, columns=3))
    assert sheet.shape[0] > 5 * 30
    assert sheet.shape[1] > 3 * 40
    # The last column shows the last frames.
    assert (sheet[20, -20] == 200).all()
    film_pages = play_beside(shown)
    assert (np.asarray(film_pages[-1])[30, 30] == 200).all()
    assert (np.asarray(film_pages[0])[30, 30] == 0).all()
    # The first one succeeded, the third failed; both are over.
    assert tuple(np.asarray(film_pages[-1])[5, 6]) == (46, 160, 67)
    assert tuple(np.asarray(film_pages[-1])[5, 6 + 2 * 50]) == (207, 34, 46)


def test_nothing_recorded_is_nothing_drawn(result: EvalResult, tmp_path: Path) -> None:
    assert draw_episodes(result, tmp_path / "none", tmp_path) == []
    assert list(tmp_path.iterdir()) == []

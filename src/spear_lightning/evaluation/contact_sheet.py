"""Pictures of episodes: a contact sheet with a row for each, and all playing beside each other in a GIF."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from spear_lightning.evaluation.protocol import Episode, EvalResult

SHEET, FILM = "episodes.png", "episodes.gif"

_GREEN, _RED, _PAPER, _INK = (46, 160, 67), (207, 34, 46), (255, 255, 255), (20, 20, 20)
_CAPTION, _FRAME, _GAP = 14, 3, 4
_FILM_COLUMNS = 4


@dataclass(frozen=True)
class Footage:
    """A recorded episode.

    Attributes:
        episode: Its outcome.
        instruction: What the robot was told.
        frames: uint8 (T, height, width, 3), one at the start and one after each control step.
    """

    episode: Episode
    instruction: str
    frames: np.ndarray

    @property
    def colour(self) -> tuple[int, int, int]:
        """Green for a success, red for a failure."""
        return _GREEN if self.episode.success else _RED


def draw_episodes(
    result: EvalResult, frames: Path, folder: Path, successes: int = 2, failures: int = 2
) -> list[Path]:
    """Draw some successes and failures of each task.

    Args:
        result: The outcomes.
        frames: Where the benchmark left the pictures of recorded episodes.
        folder: For `episodes.png` and `episodes.gif`.
        successes: Most of each task.
        failures: Most of each task.

    Returns:
        The files that were written; none if nothing was recorded.
    """
    shown = pick_footage(result, frames, successes, failures)
    if not shown:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    sheet, film = folder / SHEET, folder / FILM
    _write(sheet, [contact_sheet(shown)])
    _write(film, play_beside(shown), milliseconds=round(1000 / result.protocol.control_hz))
    return [sheet, film]


def pick_footage(result: EvalResult, frames: Path, successes: int, failures: int) -> list[Footage]:
    """Return the first successes and failures of each task of which there are pictures."""
    shown = []
    for task in result.protocol.tasks:
        left = {True: successes, False: failures}
        for episode in result.of_task(task):
            path = frames / f"{task}_{episode.number:05d}.npz"
            if left[episode.success] == 0 or not path.is_file():
                continue
            left[episode.success] -= 1
            with np.load(path, allow_pickle=False) as stored:
                shown.append(Footage(episode, str(stored["instruction"]), stored["frames"]))
    return shown


def contact_sheet(shown: Sequence[Footage], columns: int = 8) -> Image.Image:
    """Return a picture with a row for each episode, its moments evenly spaced from the first to the last."""
    height = max(item.frames.shape[1] for item in shown)
    width = max(item.frames.shape[2] for item in shown)
    row_height = height + _CAPTION + 2 * _GAP
    sheet = Image.new("RGB", (columns * (width + _GAP) + _GAP, len(shown) * row_height + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for row, item in enumerate(shown):
        top = row * row_height + _GAP
        draw.rectangle((_GAP, top, _GAP + 8, top + 9), fill=item.colour)
        draw.text((_GAP + 13, top - 1), caption(item), fill=_INK)
        moments = np.linspace(0, len(item.frames) - 1, columns).round().astype(int)
        for column, moment in enumerate(moments):
            place = (_GAP + column * (width + _GAP), top + _CAPTION)
            sheet.paste(Image.fromarray(item.frames[moment]), place)
    return sheet


def play_beside(shown: Sequence[Footage]) -> list[Image.Image]:
    """Return the frames of a film in which all episodes play at once; one that is over turns green or red."""
    height = max(item.frames.shape[1] for item in shown) + 2 * _FRAME
    width = max(item.frames.shape[2] for item in shown) + 2 * _FRAME
    columns = min(_FILM_COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    film = []
    for moment in range(max(len(item.frames) for item in shown)):
        page = Image.new("RGB", (columns * (width + _GAP) + _GAP, rows * (height + _GAP) + _GAP), _PAPER)
        draw = ImageDraw.Draw(page)
        for index, item in enumerate(shown):
            left = _GAP + index % columns * (width + _GAP)
            top = _GAP + index // columns * (height + _GAP)
            last = len(item.frames) - 1
            if moment >= last:
                draw.rectangle((left, top, left + width - 1, top + height - 1), fill=item.colour)
            page.paste(Image.fromarray(item.frames[min(moment, last)]), (left + _FRAME, top + _FRAME))
        film.append(page)
    return film


def caption(item: Footage) -> str:
    """Return one line about an episode."""
    episode = item.episode
    outcome = "success" if episode.success else "failure"
    if episode.first_success and not episode.success:
        outcome += f" (done after {episode.first_success_step} steps, not at the end)"
    if episode.failure:
        outcome += f": {episode.failure}"
    text = f"{episode.task} {episode.number}, {episode.steps} steps, {outcome}: {item.instruction}"
    # PIL's built-in font knows no more.
    return text.encode("latin-1", "replace").decode("latin-1")


def _write(path: Path, pages: Sequence[Image.Image], milliseconds: int = 200) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    kind = path.suffix[1:]
    rest = (
        {"save_all": True, "append_images": pages[1:], "duration": milliseconds, "loop": 0}
        if kind == "gif"
        else {}
    )
    pages[0].save(temporary, format=kind, **rest)
    os.replace(temporary, path)

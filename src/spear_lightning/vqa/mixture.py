"""Which questions are asked how often, and how they are put together into one example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from spear_lightning.errors import ConfigError
from spear_lightning.labeling.records import ObjectLabel
from spear_lightning.vqa.coordinate_tokens import CoordinateTokens, Numbers
from spear_lightning.vqa.task import Answer, QuestionAnswer, Scene, Task

LINE = "\n"
"""Between the questions of an example, and between its answers."""

ATTEMPTS = 4
"""Further tasks that are tried where the planned one cannot ask about the scene."""


@dataclass(frozen=True)
class Example:
    """Questions about one image, asked and answered together.

    Attributes:
        pairs: Questions with answers, about different objects.
    """

    pairs: tuple[QuestionAnswer, ...]

    @property
    def question(self) -> str:
        """All questions, one a line."""
        return LINE.join(pair.question for pair in self.pairs)

    @property
    def answer(self) -> str:
        """All answers, one a line, in the order of the questions."""
        return LINE.join(pair.answer for pair in self.pairs)


def load_task(path: str) -> Task:
    """Make the task of a class path.

    Raises:
        ConfigError: If there is no such class, or it is no task.
    """
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError("There is no such task", where="data.tasks", found=path, expected=error) from error
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise ConfigError(
            "This is not a task", where="data.tasks", found=path, expected=f"a class of {Task.path()}"
        )
    return found()


class TaskMixture:
    """Draws examples: one to `max_pairs` questions, each of a task drawn by weight, about different objects.

    Args:
        weights: Class path of a task -> weight, positive.
        max_pairs: Most questions of an example.

    Attributes:
        tasks: The tasks, in the order of the weights.

    Raises:
        ConfigError: If a path is no task, or a weight is not positive.
    """

    def __init__(self, weights: Mapping[str, float], max_pairs: int = 4) -> None:
        wrong = {path: weight for path, weight in weights.items() if not (np.isfinite(weight) and weight > 0)}
        if wrong or not weights or max_pairs < 1:
            raise ConfigError(
                "A mixture of tasks needs positive weights and at least one question an example",
                where="data.tasks",
                found=wrong or f"{len(weights)} tasks, {max_pairs} questions",
                remedy="leave tasks out that are not wanted",
            )
        self.tasks = [load_task(path) for path in weights]
        self._shares = np.array(list(weights.values())) / sum(weights.values())
        self._upper = self._shares.cumsum()
        self._upper /= self._upper[-1]
        self._max_pairs = max_pairs

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that tell one mixture from another."""
        shares = {task.path(): share for task, share in zip(self.tasks, self._shares.tolist(), strict=True)}
        return {"shares": shares, "max_pairs": self._max_pairs}

    def numbers(self) -> dict[Numbers, float]:
        """Return what the 3D tokens may have to say -> the share of tasks that ask for it."""
        shares: dict[Numbers, float] = {}
        for task, share in zip(self.tasks, self._shares.tolist(), strict=True):
            shares[task.numbers] = shares.get(task.numbers, 0.0) + share
        return shares

    def plan(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Draw which tasks examples shall have, before their images are known.

        Returns:
            int64 (count, max_pairs): numbers of tasks, -1 after an example's last.
        """
        drawn = self._draw((count, self._max_pairs), rng)
        pairs = rng.integers(1, self._max_pairs + 1, count)
        return np.where(np.arange(self._max_pairs) < pairs[:, None], drawn, -1)

    def _draw(self, shape: int | tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
        """Draw numbers of tasks by weight, as `rng.choice` does, which checks the weights each time."""
        return np.searchsorted(self._upper, rng.random(shape), side="right")

    def fitted(self, plans: np.ndarray, available: np.ndarray) -> np.ndarray:
        """Leave out of plans the tasks for which an image has no objects left.

        Args:
            plans: (count, max_pairs) numbers of tasks.
            available: (count,) how many objects of each image can be asked about.

        Returns:
            The plans, with -1 where a task is left out; the first one stays, since others may take its place.
        """
        needed = np.array([*(task.objects for task in self.tasks), 0])[plans]
        kept, left = plans.copy(), available - needed[:, 0]
        for place in range(1, plans.shape[1]):
            fits = needed[:, place] <= left
            kept[~fits, place] = -1
            left = left - np.where(fits, needed[:, place], 0)
        return kept

    def ask(self, scene: Scene, plan: Sequence[int], rng: np.random.Generator) -> Example:
        """Ask the planned tasks about a scene, each about objects that no other has asked about.

        Where a planned task cannot ask, others are tried; where none can, the question falls out.

        Args:
            scene: The scene.
            plan: Numbers of tasks; -1 is left out.
            rng: Source of randomness.

        Returns:
            The example, which may be without questions.
        """
        free = scene.nameable()
        pairs = []
        for planned in plan:
            if planned < 0:
                continue
            for number in (planned, *self._draw(ATTEMPTS, rng).tolist()):
                pair, used = self._try(self.tasks[number], scene, free, rng)
                if pair is not None:
                    pairs.append(pair)
                    free = [item for item in free if all(item is not other for other in used)]
                    break
        return Example(tuple(pairs))

    @staticmethod
    def _try(
        task: Task, scene: Scene, free: list[ObjectLabel], rng: np.random.Generator
    ) -> tuple[QuestionAnswer | None, list[ObjectLabel]]:
        suited = [item for item in free if task.suits(scene, item)] if task.objects else []
        if len(suited) < task.objects:
            return None, []
        items = [suited[index] for index in rng.choice(len(suited), task.objects, replace=False)] if suited else []
        return task.ask(scene, items, rng), items


def read_answers(
    text: str, tasks: Sequence[Task], tokens: CoordinateTokens, height: int, width: int
) -> list[Answer | None]:
    """Read the answers of an example; None for each that does not parse.

    Args:
        text: What the model wrote: one line per question.
        tasks: The tasks of the questions.
        tokens: The 3D tokens.
        height: Rows of the image.
        width: Columns of the image.

    Returns:
        One entry per task. If the number of lines is wrong, no line can be trusted to answer its question: all
        are None.
    """
    lines = text.strip(LINE).split(LINE)
    if len(lines) != len(tasks):
        return [None] * len(tasks)
    return [task.parse(line, tokens, height, width) for task, line in zip(tasks, lines, strict=True)]

"""The baseline that looks at no image: every question gets the mean of what answers to such questions say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from spear_lightning.batches import TrueAnswer
from spear_lightning.errors import DataError
from spear_lightning.vqa.task import Answer


class ConstantMean:
    """Answers with the mean of each task's numbers; of two objects it never says which.

    Args:
        answers: What answers about training images say (`question_data.training_answers`).

    Raises:
        DataError: If there are none.
    """

    def __init__(self, answers: Iterable[TrueAnswer]) -> None:
        sums: dict[str, tuple[np.ndarray | float, int]] = {}
        for answer in answers:
            total, count = sums.get(answer.task, (0.0, 0))
            sums[answer.task] = (total + answer.values, count + 1)
        if not sums:
            raise DataError("There are no answers to take the mean of", where="ConstantMean")
        self._means = {task: Answer(np.asarray(total / count)) for task, (total, count) in sums.items()}

    def answer(self, questions: Sequence[TrueAnswer]) -> list[Answer | None]:
        """Return an answer to each question; None for a task that no training answer was about."""
        return [self._means.get(question.task) for question in questions]

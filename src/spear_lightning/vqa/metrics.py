"""How good answers are (spec section 4): accuracy of 3D tokens, and errors of what generated answers say."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from spear_lightning.batches import TrueAnswer, VqaBatch
from spear_lightning.vqa.coordinate_tokens import CoordinateTokens
from spear_lightning.vqa.mixture import load_task, read_answers
from spear_lightning.vqa.task import Answer, Task

MEASURES = (
    "centre_error",
    "vertex_error",
    "key_point_error",
    "relation_error",
    "relative_distance_error",
    "pixel_point_error",
    "projection_error_pixels",
    "choice_accuracy",
    "naming_accuracy",
    "iou",
    "iou_at_0.25",
    "iou_at_0.5",
)
"""What tasks report about parsed answers.

Errors are lengths in units of the batch's `unit`, but for the relative ones and the pixels; `iou` is the overlap
of oriented boxes, `iou_at_T` the share of boxes with at least T.
"""

NOT_PARSED = {"choice_accuracy": 0.0, "naming_accuracy": 0.0, "iou": 0.0, "iou_at_0.25": 0.0, "iou_at_0.5": 0.0}
"""What an answer that does not parse counts as; errors have no such value, and are means over parsed answers."""


class CoordinateAccuracy(Metric):
    """Share of the answers' 3D tokens that are predicted exactly, given the true tokens before them."""

    higher_is_better = True
    full_state_update = False
    correct: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("correct", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, target: Tensor, coordinate_mask: Tensor) -> None:
        """Count.

        Args:
            predicted: int64 (B, L), the most likely id AT each place (shifted to the target).
            target: int64 (B, L) true ids.
            coordinate_mask: bool (B, L), where the target is a 3D token of an answer.
        """
        self.correct += ((predicted == target) & coordinate_mask).sum()
        self.total += coordinate_mask.sum()

    def compute(self) -> Tensor:
        """Return the share; NaN if there were none."""
        return self.correct / self.total


class AnswerMetrics(Metric):
    """Errors of generated answers, each task's under the names of `MEASURES`, and the share that parses.

    Args:
        tokens: The 3D tokens.
    """

    full_state_update = False
    sums: Tensor
    counts: Tensor
    parsed: Tensor
    asked: Tensor

    def __init__(self, tokens: CoordinateTokens) -> None:
        super().__init__()
        self._tokens = tokens
        self._tasks: dict[str, Task] = {}
        zeros = torch.zeros(len(MEASURES), dtype=torch.float64)
        self.add_state("sums", zeros, dist_reduce_fx="sum")
        self.add_state("counts", zeros.clone(), dist_reduce_fx="sum")
        self.add_state("parsed", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("asked", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self,
        answers: Sequence[str | Sequence[Answer | None]],
        asked: Sequence[Sequence[TrueAnswer]],
        height: int,
        width: int,
    ) -> None:
        """Read answers and compare them with the truth.

        Args:
            answers: B texts that the model wrote; or for each sample what was read of them already.
            asked: What they should say (`VqaBatch.asked`).
            height: Rows of the images the model saw.
            width: Columns.
        """
        for answer, questions in zip(answers, asked, strict=True):
            tasks = [self._task(question.task) for question in questions]
            found = answer
            if isinstance(found, str):
                found = read_answers(found, tasks, self._tokens, height, width) if tasks else []
            for task, one, question in zip(tasks, found, questions, strict=True):
                self._count(task, one, Answer(question.values, question.choice))

    def _task(self, path: str) -> Task:
        if path not in self._tasks:
            self._tasks[path] = load_task(path)
        return self._tasks[path]

    def _count(self, task: Task, answer: Answer | None, truth: Answer) -> None:
        self.asked += 1
        if answer is None:
            own = task.errors(truth, truth)
            errors = {name: value for name, value in NOT_PARSED.items() if name in own}
        else:
            self.parsed += 1
            errors = task.errors(answer, truth)
        for name, value in errors.items():
            self.sums[MEASURES.index(name)] += value
            self.counts[MEASURES.index(name)] += 1

    def compute(self) -> dict[str, Tensor]:
        """Return "parse_rate" and the mean of every measure that was taken."""
        means = {
            name: (self.sums[index] / self.counts[index]).to(torch.float32)
            for index, name in enumerate(MEASURES)
            if self.counts[index] > 0
        }
        return {"parse_rate": self.parsed / self.asked, **means}


class TaskLosses(Metric):
    """Mean cross entropy of the answers' tokens of each task, under the name of the task's class.

    Args:
        tasks: Class paths of the tasks.
    """

    higher_is_better = False
    full_state_update = False
    sums: Tensor
    counts: Tensor

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__()
        self._tasks = list(tasks)
        zeros = torch.zeros(len(self._tasks), dtype=torch.float64)
        self.add_state("sums", zeros, dist_reduce_fx="sum")
        self.add_state("counts", zeros.clone(), dist_reduce_fx="sum")

    def update(self, losses: Tensor, batch: VqaBatch, line_break: int) -> None:
        """Add the losses of a batch.

        Args:
            losses: float (T,), of the answers' tokens, row by row.
            batch: The batch, on the same device.
            line_break: Id of the token that ends all answers of a sample but the last.
        """
        counts = [len(questions) for questions in batch.asked]
        known = {task: number for number, task in enumerate(self._tasks)}
        tasks = [known[question.task] for questions in batch.asked for question in questions]
        first_B = torch.tensor([0, *counts]).cumsum(0)[:-1].to(losses.device)
        # Which answer of its sample a token belongs to; a line break belongs to the answer it ends.
        breaks_BL = (batch.input_ids == line_break) & batch.answer_mask
        line_BL = breaks_BL.cumsum(dim=1) - breaks_BL.long()
        answer_T = (first_B[:, None] + line_BL)[batch.answer_mask]
        task_T = torch.tensor(tasks, dtype=torch.int64, device=losses.device)[answer_T]
        self.sums.index_add_(0, task_T, losses.double())
        self.counts.index_add_(0, task_T, torch.ones_like(losses, dtype=torch.float64))

    def compute(self) -> dict[str, Tensor]:
        """Return the means of the tasks that occurred."""
        return {
            task.rpartition(".")[2]: (self.sums[number] / self.counts[number]).to(torch.float32)
            for number, task in enumerate(self._tasks)
            if self.counts[number] > 0
        }

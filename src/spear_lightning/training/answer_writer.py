"""`spear predict` of SPEAR-VLM: writes questions, answers and what the answers should be to one file."""

from __future__ import annotations

import json
from pathlib import Path

from spear_lightning.batches import VqaBatch
from spear_lightning.training.prediction_file import PredictionFile

Rows = list[dict[str, int | str]]


class AnswerWriter(PredictionFile[Rows]):
    """Collects the answers of all batches and writes `answers.jsonl` (see `PredictionFile`).

    A line is one sample: `position` in the stream of samples, `question`, `answer` ("" if it came to no end) and
    `true_answer`, each with one line a question.
    """

    name = "answers.jsonl"

    def keep(self, batch: VqaBatch, outputs: list[str]) -> Rows:
        """Return the texts of a batch."""
        return [
            {"position": position, "question": question, "answer": answer, "true_answer": true}
            for position, question, answer, true in zip(
                batch.position.tolist(), batch.questions, outputs, batch.answers, strict=True
            )
        ]

    def write(self, kept: list[Rows], path: Path) -> None:
        """Write one line a sample."""
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for rows in kept for row in rows)
        path.write_text("".join(lines), encoding="utf-8")

    def summary(self, kept: list[Rows], path: Path) -> str:
        """Return how many there are, and where."""
        return f"{sum(map(len, kept))} answers: {path}"

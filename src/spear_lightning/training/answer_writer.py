"""`spear predict` of SPEAR-VLM: writes questions, answers and what the answers should be to one file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from rich.console import Console


class AnswerWriter(Callback):
    """Collects the answers of all batches and writes `answers.jsonl` into the run's folder.

    A line is one sample: `position` in the stream of samples, `question`, `answer` ("" if it came to no end) and
    `true_answer`, each with one line a question. With several processes each writes its own file,
    `answers_RANK.jsonl`.
    """

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the texts of a batch."""
        for position, question, answer, true in zip(
            batch.position.tolist(), batch.questions, outputs, batch.answers, strict=True
        ):
            self._rows.append({"position": position, "question": question, "answer": answer, "true_answer": true})

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the file and say where it is."""
        suffix = f"_{trainer.global_rank}" if trainer.world_size > 1 else ""
        path = Path(trainer.default_root_dir) / f"answers{suffix}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self._rows))
        os.replace(temporary, path)
        count, self._rows = len(self._rows), []
        if trainer.is_global_zero:
            Console().print(f"{count} answers: {path}", soft_wrap=True)

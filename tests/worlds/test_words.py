"""The words of the tabletop policy's prompt are the world's words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from spear_lightning.models import PromptTokenizer
from spear_lightning.worlds.tabletop.tasks import TASKS

EXPERIMENT = Path(__file__).parents[2] / "experiments" / "tabletop" / "vla.yaml"


@pytest.mark.parametrize("task", sorted(TASKS))
def test_instructions_are_read_in_words_and_whole(task: str) -> None:
    config = yaml.safe_load(EXPERIMENT.read_text())["model"]["init_args"]["policy"]["init_args"]
    prompt = PromptTokenizer(**config["prompt"]["init_args"])
    assert len(prompt) <= config["vla"]["init_args"]["vlm"]["init_args"]["language"]["vocab_size"]
    rng = np.random.default_rng(0)
    texts = [TASKS[task].sample(rng).instruction for _ in range(100)]
    ids, mask = prompt.encode(texts)
    after_bytes = 259
    for row, real in zip(ids.tolist(), mask.sum(1).tolist(), strict=True):
        bos, *words, newline = row[:real]
        assert (bos, newline) == (2, 3 + ord("\n"))
        assert min(words) >= after_bytes
    assert prompt.cut_prompts == 0
    assert len({tuple(row) for row in ids.tolist()}) == len(set(texts))

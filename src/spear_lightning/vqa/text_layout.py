"""Examples as token ids in PaliGemma's prefix-LM layout: bos, questions, newline | answers, eos | padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from spear_lightning.errors import ConfigError
from spear_lightning.vqa.coordinate_tokens import token_names
from spear_lightning.vqa.mixture import Example

MULTIPLE = 16
"""Lengths of batches are rounded up to multiples of this, so that few shapes occur."""


class Vocabulary(Protocol):
    """Text -> token ids: what the layout needs of a tokenizer (`models.prompt.Vocabulary` has it)."""

    @property
    def pad(self) -> int:
        """Id of padding."""

    @property
    def bos(self) -> int:
        """Id of the start of a text."""

    @property
    def eos(self) -> int | None:
        """Id of the end of an answer."""

    @property
    def newline(self) -> list[int]:
        """Ids of a line break."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts, without special tokens."""

    def __len__(self) -> int:
        """Ids there are."""


class TextRows(NamedTuple):
    """Texts of a batch; see `VqaBatch`."""

    input_ids: Tensor
    token_mask: Tensor
    answer_mask: Tensor
    coordinate_mask: Tensor


class TextLayout:
    """Lays out examples.

    Args:
        vocabulary: The tokenizer, to which the 3D tokens have been added.
        bins: How many 3D tokens there are.
        max_length: Tokens of a sample at most.

    Attributes:
        dropped: Questions left out so far in this process, because the sample would have been too long.

    Raises:
        ConfigError: If the tokenizer has no end of text, or splits 3D tokens.
    """

    def __init__(self, vocabulary: Vocabulary, bins: int, max_length: int = 384) -> None:
        ids = vocabulary.encode(token_names(bins))
        if vocabulary.eos is None or any(len(part) != 1 for part in ids):
            raise ConfigError(
                "The tokenizer cannot write 3D answers",
                where="prompt.tokenizer",
                found="no end-of-text token"
                if vocabulary.eos is None
                else f"{bins} 3D tokens are several ids each",
                expected="an end-of-text token, and one id for each 3D token",
                remedy="add the 3D tokens: PromptTokenizer.add_tokens(token_names())",
            )
        self._vocabulary, self._eos, self._max_length = vocabulary, vocabulary.eos, max_length
        self._is_coordinate = np.zeros(len(vocabulary), bool)
        self._is_coordinate[[part[0] for part in ids]] = True
        self.dropped = 0

    def shortened(self, example: Example) -> Example:
        """Return an example without its last questions, as many as it is too long by: answers are never cut."""
        while example.pairs and self.length(example) > self._max_length:
            example = Example(example.pairs[:-1])
            self.dropped += 1
        return example

    def length(self, example: Example) -> int:
        """Return the number of tokens of an example without padding."""
        return sum(map(len, self._rows([example])[0]))

    def lay_out(self, examples: Sequence[Example]) -> TextRows:
        """Return the texts of examples as a batch, padded to the longest.

        An example without questions is bos, newline without an answer: nothing of it is predicted.
        """
        rows = self._rows(examples)
        longest = max(len(question) + len(answer) for question, answer in rows)
        length = -(-longest // MULTIPLE) * MULTIPLE
        ids_BL = np.full((len(rows), length), self._vocabulary.pad, np.int64)
        ends_B, starts_B = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
        for row, (question, answer) in enumerate(rows):
            starts_B[row], ends_B[row] = len(question), len(question) + len(answer)
            ids_BL[row, : ends_B[row]] = [*question, *answer]
        place_L = np.arange(length)
        tokens_BL = place_L < ends_B[:, None]
        answers_BL = tokens_BL & (place_L >= starts_B[:, None])
        coordinates_BL = answers_BL & self._is_coordinate[ids_BL]
        return TextRows(*(torch.from_numpy(part) for part in (ids_BL, tokens_BL, answers_BL, coordinates_BL)))

    def _rows(self, examples: Sequence[Example]) -> list[tuple[list[int], list[int]]]:
        vocabulary = self._vocabulary
        questions = vocabulary.encode([example.question for example in examples])
        answers = vocabulary.encode([example.answer for example in examples])
        return [
            (
                [vocabulary.bos, *question, *vocabulary.newline],
                [*answer, self._eos] if example.pairs else [],
            )
            for example, question, answer in zip(examples, questions, answers, strict=True)
        ]

"""Examples as token ids in PaliGemma's prefix-LM layout: bos, questions, newline | answers, eos | padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
    """Text -> token ids: what the layout needs of a tokenizer (`models.vocabulary.Vocabulary` has it)."""

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


@dataclass(frozen=True)
class Text:
    """Token ids of an example.

    Attributes:
        example: The example.
        question: Ids of bos, questions, newline.
        answer: Ids of answers, eos; none if nothing is asked.
    """

    example: Example
    question: list[int]
    answer: list[int]

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.question) + len(self.answer)


class TextLayout:
    """Lays out examples.

    Args:
        vocabulary: The tokenizer, to which the 3D tokens have been added.
        bins: How many 3D tokens there are.
        max_length: Tokens of a sample at most.
        one_length: Whether every batch is padded to `max_length`, so that all have one shape.

    Attributes:
        dropped: Questions left out so far in this process, because the sample would have been too long.

    Raises:
        ConfigError: If the tokenizer has no end of text, or splits 3D tokens.
    """

    def __init__(self, vocabulary: Vocabulary, bins: int, max_length: int = 384, one_length: bool = False) -> None:
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
        self._one_length = one_length
        self.dropped = 0

    def shortened(self, example: Example) -> Text:
        """Encode an example without its last questions, as many as it is too long by: answers are never cut."""
        text = self.encode(example)
        while text.example.pairs and len(text) > self._max_length:
            text = self.encode(Example(text.example.pairs[:-1]))
            self.dropped += 1
        return text

    def encode(self, example: Example) -> Text:
        """Return the token ids of an example."""
        vocabulary = self._vocabulary
        question, answer = vocabulary.encode([example.question, example.answer])
        return Text(
            example,
            [vocabulary.bos, *question, *vocabulary.newline],
            [*answer, self._eos] if example.pairs else [],
        )

    def lay_out(self, texts: Sequence[Text]) -> TextRows:
        """Return texts as a batch, padded to the longest, or to `max_length` where there is to be one length.

        An example without questions is bos, newline without an answer: nothing of it is predicted.
        """
        longest = max(map(len, texts))
        length = self._max_length if self._one_length else -(-longest // MULTIPLE) * MULTIPLE
        ids_BL = np.full((len(texts), length), self._vocabulary.pad, np.int64)
        ends_B, starts_B = np.zeros(len(texts), np.int64), np.zeros(len(texts), np.int64)
        for row, text in enumerate(texts):
            starts_B[row], ends_B[row] = len(text.question), len(text)
            ids_BL[row, : len(text)] = text.question + text.answer
        place_L = np.arange(length)
        tokens_BL = place_L < ends_B[:, None]
        answers_BL = tokens_BL & (place_L >= starts_B[:, None])
        coordinates_BL = answers_BL & self._is_coordinate[ids_BL]
        return TextRows(*(torch.from_numpy(part) for part in (ids_BL, tokens_BL, answers_BL, coordinates_BL)))

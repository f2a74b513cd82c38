"""The language model's prompt: instruction -> token ids (spec section 4).

The whole prompt is [image tokens | bos, instruction, newline]; the image tokens are the VLM's business.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from spear_lightning.errors import CheckpointError, ConfigError
from spear_lightning.models.vocabulary import BYTE, ByteVocabulary, PretrainedVocabulary, Vocabulary

log = logging.getLogger(__name__)

SCHEMA = 1
"""Version of the JSON form."""


class PromptTokenizer:
    """Turns instructions into the text part of the prompt: bos, instruction, newline, then padding.

    The length is fixed, so that the network sees one shape, unless `multiple` allows several. A prompt that is too
    long loses the end of its instruction, not the newline; `cut_prompts` counts them, and the first is reported in
    the log.

    Args:
        tokenizer: "byte" for UTF-8 bytes, which needs no files; otherwise a hub id or a folder, such as
            `google/paligemma-3b-pt-224`.
        max_length: Tokens of a prompt, padding included.
        words: Words that become one token each wherever they stand, blanks in them included: a small model that
            learns from few sentences need not learn to spell. The longest that fits is taken.
        multiple: Pad the prompts of a batch to the longest of them, rounded up to a multiple of this; `null` pads
            all to `max_length`. Saves work on padding, and costs a compilation for each length.
    """

    def __init__(
        self,
        tokenizer: str = BYTE,
        max_length: int = 48,
        words: Sequence[str] = (),
        multiple: int | None = None,
    ) -> None:
        vocabulary = ByteVocabulary() if tokenizer == BYTE else PretrainedVocabulary.load(tokenizer)
        if "" in words:
            raise ConfigError("A token needs a text", where="prompt.words", found="an empty word")
        vocabulary.add(words)
        if multiple is not None and multiple < 1:
            raise ConfigError(
                "Prompts cannot be padded to such a multiple",
                where="prompt.multiple",
                found=multiple,
                expected="at least 1, or null",
            )
        self._set_up(tokenizer, max_length, vocabulary, words, multiple)

    def _set_up(
        self,
        name: str,
        max_length: int,
        vocabulary: Vocabulary,
        words: Sequence[str],
        multiple: int | None = None,
    ) -> None:
        fixed = 1 + len(vocabulary.newline)
        if max_length <= fixed:
            raise ConfigError(
                "A prompt of this length has no room for an instruction",
                where="prompt.max_length",
                found=max_length,
                expected=f"more than {fixed}",
            )
        self.tokenizer = name
        self.max_length = max_length
        self.vocabulary = vocabulary
        self.words = list(words)
        self.multiple = multiple
        self.cut_prompts = 0

    def __len__(self) -> int:
        return len(self.vocabulary)

    def add_tokens(self, names: Sequence[str], first_id: int = 0) -> int:
        """Make words, such as the 3D tokens, one token each; they travel with the tokenizer.

        Args:
            names: The words; those that are tokens already are left as they are.
            first_id: Least id of the new ones, such as the number of rows of the pretrained embedding.

        Returns:
            How many were new: the embedding needs as many more rows.
        """
        self.vocabulary.reserve(first_id)
        return self.vocabulary.add(names)

    def require_ids_of(self, trained: PromptTokenizer, whose: str) -> None:
        """Check that this gives the ids of another tokenizer, going by its words and by a few sentences.

        Args:
            trained: The one that embeddings about to be loaded were trained with.
            whose: It is, for the error.

        Raises:
            CheckpointError: If it does not: the embeddings would stand for other words.
        """
        probe = ["Put the red-ish cup on plate 7.", "über"]
        same = self.vocabulary.encode(probe) == trained.vocabulary.encode(probe)
        if not same or self.words != trained.words:
            raise CheckpointError(
                f"The policy's tokenizer is not the {whose}'s",
                where="policy.prompt.tokenizer, policy.prompt.words",
                found=f"{self.tokenizer}, words {self.words}",
                expected=f"{trained.tokenizer}, words {trained.words}",
            )

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode instructions.

        Args:
            texts: B instructions; "" is allowed. Each is encoded once, however often it is there.

        Returns:
            Token ids, int64 (B, L), and a mask, bool (B, L), False for padding (at the right). L is `max_length`,
            or less where `multiple` is set.
        """
        vocabulary = self.vocabulary
        room = self.max_length - 1 - len(vocabulary.newline)
        # In a batch of robot data many have the same.
        count_of = Counter(texts)
        number_of = {text: number for number, text in enumerate(count_of)}
        known_UL = np.full((len(count_of), self.max_length), vocabulary.pad, np.int64)
        lengths_U = np.empty(len(count_of), np.int64)
        for number, (text, ids) in enumerate(zip(count_of, vocabulary.encode(list(count_of)), strict=True)):
            if len(ids) > room:
                self._count_cut(text, len(ids), room, count_of[text])
            prompt = [vocabulary.bos, *ids[:room], *vocabulary.newline]
            known_UL[number, : len(prompt)] = prompt
            lengths_U[number] = len(prompt)
        length = self.max_length
        if self.multiple is not None:
            longest = int(lengths_U.max(initial=1))
            length = min(length, math.ceil(longest / self.multiple) * self.multiple)
        row_B = np.fromiter((number_of[text] for text in texts), np.int64, len(texts))
        input_ids = torch.empty((len(texts), length), dtype=torch.int64)
        mask = torch.empty((len(texts), length), dtype=torch.bool)
        input_ids.numpy()[:] = known_UL[row_B, :length]
        mask.numpy()[:] = np.arange(length) < lengths_U[row_B, None]
        return input_ids, mask

    def _count_cut(self, text: str, length: int, room: int, times: int) -> None:
        if self.cut_prompts == 0:
            log.warning(
                "An instruction of %d tokens is cut to %d, and so will be others (prompt.max_length=%d): %r",
                length,
                room,
                self.max_length,
                text,
            )
        self.cut_prompts += times

    def to_json(self) -> str:
        """Return everything needed to encode as now, without files or a network."""
        values = {"schema": SCHEMA, "tokenizer": self.tokenizer, "max_length": self.max_length}
        words = {"words": self.words} if self.words else {}
        multiple = {"multiple": self.multiple} if self.multiple is not None else {}
        return json.dumps({**values, **words, **multiple, **self.vocabulary.to_dict()})

    @classmethod
    def from_json(cls, text: str) -> PromptTokenizer:
        """Rebuild from `to_json`'s text.

        Raises:
            CheckpointError: If the text does not come from `to_json`.
        """
        from tokenizers import Tokenizer

        try:
            values = json.loads(text)
            if values["schema"] != SCHEMA:
                raise ValueError(f"schema {values['schema']}, known is {SCHEMA}")
            vocabulary: Vocabulary = ByteVocabulary(values.get("added"), values.get("size", 259))
            if "backend" in values:
                tokenizer = Tokenizer.from_str(values["backend"])
                vocabulary = PretrainedVocabulary(tokenizer, values["pad"], values["bos"], values.get("eos"))
            prompt = cls.__new__(cls)
            words, multiple = values.get("words", []), values.get("multiple")
            prompt._set_up(values["tokenizer"], values["max_length"], vocabulary, words, multiple)
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                "The stored tokenizer cannot be read", found=f"{type(error).__name__}: {error}"
            ) from error
        return prompt

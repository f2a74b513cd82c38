"""The language model's prompt: instruction -> token ids (spec section 4).

The whole prompt is [image tokens | bos, instruction, newline]; the image tokens are the VLM's business.
"""

from __future__ import annotations

import json
import logging
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from spear_lightning.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger(__name__)

BYTE = "byte"
"""Name of the tokenizer that needs no files."""

SCHEMA = 1
"""Version of the JSON form."""


class Vocabulary(ABC):
    """Text -> token ids, and the ids of the prompt's fixed parts.

    Attributes:
        pad: Id of padding.
        bos: Id of the start of a text.
        eos: Id of the end of an answer; None where the tokenizer has none.
        newline: Ids of a line break.
    """

    pad: int
    bos: int
    eos: int | None
    newline: list[int]

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts, without special tokens."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without padding, bos and eos."""

    @abstractmethod
    def add(self, names: Sequence[str]) -> int:
        """Make words one token each, whatever surrounds them; return how many were new."""

    @abstractmethod
    def reserve(self, count: int) -> None:
        """Let words that are added later get ids from `count` on; does nothing if there are as many already."""

    @abstractmethod
    def __len__(self) -> int:
        """Ids there are, reserved ones among them."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return plain values from which the vocabulary can be rebuilt."""


class ByteVocabulary(Vocabulary):
    """UTF-8 bytes after Gemma's special tokens, 0 padding, 1 end, 2 start: 3 + b is byte b; then added words."""

    pad = 0
    eos = 1
    bos = 2
    first_byte = 3

    def __init__(self, added: Mapping[str, int] | None = None, size: int = first_byte + 256) -> None:
        self.newline = [self.first_byte + ord("\n")]
        self._added: dict[str, int] = {}
        self._size = size
        self._learn(dict(added or {}))

    def add(self, names: Sequence[str]) -> int:
        """Give words an id each, after all ids there are."""
        new = [name for name in dict.fromkeys(names) if name not in self._added]
        self._learn({name: self._size + place for place, name in enumerate(new)})
        self._size += len(new)
        return len(new)

    def _learn(self, words: Mapping[str, int]) -> None:
        self._added.update(words)
        self._words = {number: name for name, number in self._added.items()}
        # Words and single bytes are found in one pass; Latin-1 has a character for each byte.
        names = {_as_latin(name): number for name, number in self._added.items()}
        self._pieces = re.compile("|".join([*([_any_of(sorted(names))] if names else []), r"[\x00-\xff]"]))
        self._ids = {**{chr(byte): self.first_byte + byte for byte in range(256)}, **names}

    def reserve(self, count: int) -> None:
        """Leave ids out."""
        self._size = max(self._size, count)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return one id a byte, and one for each added word."""
        ids = self._ids
        return [[ids[piece] for piece in self._pieces.findall(_as_latin(text))] for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text; bytes that are no UTF-8 become the replacement character, reserved ids nothing."""
        after = self.first_byte + 256
        encoded = b"".join(
            self._words.get(number, "").encode() if number >= after else bytes([number - self.first_byte])
            for number in ids
            if number >= self.first_byte
        )
        return encoded.decode("utf-8", errors="replace")

    def __len__(self) -> int:
        return self._size

    @property
    def added(self) -> dict[str, int]:
        """The added words and their ids."""
        return dict(self._added)

    def to_dict(self) -> dict[str, Any]:
        """Return the added words, if there are any: there is one byte vocabulary otherwise."""
        return {"added": self.added, "size": self._size} if self._added else {}


def _as_latin(text: str) -> str:
    """Return the bytes of a text in UTF-8, each as a character."""
    return text.encode("utf-8").decode("latin-1")


def _any_of(words: Sequence[str]) -> str:
    """Return a pattern of the longest of some words that fits.

    Common beginnings are shared: alternatives are tried one by one, and there are thousands of numbered tokens.

    Args:
        words: Sorted, each once.
    """
    if words == [""]:
        return ""
    branches = [
        re.escape(first) + _any_of([word[1:] for word in group])
        for first, group in groupby([word for word in words if word], key=itemgetter(0))
    ]
    pattern = branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"
    # A word that others begin with comes last, so that none of these hides behind it.
    return f"(?:{pattern})?" if words[0] == "" else pattern


class PretrainedVocabulary(Vocabulary):
    """A tokenizer of the `tokenizers` library, such as PaliGemma's.

    Args:
        tokenizer: The tokenizer.
        pad: Id of padding.
        bos: Id of the start of a text.
        eos: Id of the end of a text, if there is one.
    """

    def __init__(self, tokenizer: Tokenizer, pad: int, bos: int, eos: int | None = None) -> None:
        self.tokenizer = tokenizer
        # The prompt is cut and padded here, not by settings that a file may carry.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.pad = pad
        self.bos = bos
        self.eos = eos
        self.newline = self.encode(["\n"])[0]

    @classmethod
    def load(cls, name: str) -> PretrainedVocabulary:
        """Load a tokenizer from the hub or a folder.

        Args:
            name: Hub id or folder.

        Raises:
            ConfigError: If there is none, or it has no fast form or no bos token.
        """
        from transformers import AutoTokenizer

        try:
            loaded = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError, ImportError) as error:
            raise ConfigError(
                "The tokenizer cannot be loaded",
                where="prompt.tokenizer",
                found=f"{name}: {str(error).strip().splitlines()[0]}",
                expected=f"'{BYTE}', a hub id, or a folder with tokenizer.json",
                remedy="check the name and the network; for gated ones accept the licence on the hub and run "
                "`hf auth login`",
            ) from error
        backend = getattr(loaded, "backend_tokenizer", None)
        if backend is None or loaded.bos_token_id is None:
            raise ConfigError(
                "The tokenizer cannot form a prompt",
                where="prompt.tokenizer",
                found=f"{name}: {type(loaded).__name__}, bos token {loaded.bos_token_id}",
                expected="a fast tokenizer (tokenizer.json) with a bos token",
            )
        pad = 0 if loaded.pad_token_id is None else loaded.pad_token_id
        return cls(backend, pad, loaded.bos_token_id, loaded.eos_token_id)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids."""
        special = (self.pad, self.bos, self.eos)
        return str(self.tokenizer.decode([number for number in ids if number not in special], False))

    def add(self, names: Sequence[str]) -> int:
        """Add words to the tokenizer."""
        from tokenizers import AddedToken

        # Not normalised: Gemma's normaliser would turn spaces beside them into parts of them.
        new = [AddedToken(name, normalized=False) for name in names if self.tokenizer.token_to_id(name) is None]
        return int(self.tokenizer.add_tokens(new))

    def reserve(self, count: int) -> None:
        """Fill up with words that no text holds: the library numbers words without a gap."""
        self.add([f"<reserved_{number}>" for number in range(len(self), count)])

    def __len__(self) -> int:
        return int(self.tokenizer.get_vocab_size(with_added_tokens=True))

    def to_dict(self) -> dict[str, Any]:
        """Return the whole tokenizer."""
        return {"pad": self.pad, "bos": self.bos, "eos": self.eos, "backend": self.tokenizer.to_str()}


class PromptTokenizer:
    """Turns instructions into the text part of the prompt: bos, instruction, newline, then padding.

    The length is fixed, so that the network sees one shape. A prompt that is too long loses the end of its
    instruction, not the newline; `cut_prompts` counts them, and the first is reported in the log.

    Args:
        tokenizer: "byte" for UTF-8 bytes, which needs no files; otherwise a hub id or a folder, such as
            `google/paligemma-3b-pt-224`.
        max_length: Tokens of a prompt, padding included.
        words: Words that become one token each wherever they stand, blanks in them included: a small model that
            learns from few sentences need not learn to spell. The longest that fits is taken.
    """

    def __init__(self, tokenizer: str = BYTE, max_length: int = 48, words: Sequence[str] = ()) -> None:
        vocabulary = ByteVocabulary() if tokenizer == BYTE else PretrainedVocabulary.load(tokenizer)
        if "" in words:
            raise ConfigError("A token needs a text", where="prompt.words", found="an empty word")
        vocabulary.add(words)
        self._set_up(tokenizer, max_length, vocabulary, words)

    def _set_up(self, name: str, max_length: int, vocabulary: Vocabulary, words: Sequence[str]) -> None:
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

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode instructions.

        Args:
            texts: B instructions; "" is allowed. Each is encoded once, however often it is there.

        Returns:
            Token ids, int64 (B, max_length), and a mask, bool (B, max_length), False for padding (at the
            right).
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
        row_B = np.fromiter((number_of[text] for text in texts), np.int64, len(texts))
        input_ids = torch.empty((len(texts), self.max_length), dtype=torch.int64)
        mask = torch.empty((len(texts), self.max_length), dtype=torch.bool)
        input_ids.numpy()[:] = known_UL[row_B]
        mask.numpy()[:] = np.arange(self.max_length) < lengths_U[row_B, None]
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
        return json.dumps({**values, **words, **self.vocabulary.to_dict()})

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
            prompt._set_up(values["tokenizer"], values["max_length"], vocabulary, values.get("words", []))
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                "The stored tokenizer cannot be read", found=f"{type(error).__name__}: {error}"
            ) from error
        return prompt

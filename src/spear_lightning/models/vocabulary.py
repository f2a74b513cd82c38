"""Vocabularies: text <-> token ids, by bytes or by a pretrained tokenizer; both take words of their own."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from spear_lightning.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BYTE = "byte"
"""Name of the tokenizer that needs no files."""


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

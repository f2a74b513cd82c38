"""Our tokenizers as files that transformers reads: `AutoTokenizer.from_pretrained(folder)` gives the same ids."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from spear_lightning.models.vocabulary import ByteVocabulary, PretrainedVocabulary, Vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast


def save_tokenizer(vocabulary: Vocabulary, folder: str | Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`.

    Args:
        vocabulary: The tokenizer with all words that were added to it.
        folder: Where to; it exists.
    """
    for_transformers(vocabulary).save_pretrained(folder)


def for_transformers(vocabulary: Vocabulary) -> PreTrainedTokenizerFast:
    """Return a tokenizer of transformers that gives the same ids, without adding bos or eos by itself."""
    from transformers import PreTrainedTokenizerFast

    if isinstance(vocabulary, PretrainedVocabulary):
        backend = vocabulary.tokenizer
    elif isinstance(vocabulary, ByteVocabulary):
        backend = byte_tokenizer(vocabulary)
    else:
        raise TypeError(f"no tokenizer of transformers is like {type(vocabulary).__name__}")
    names = {
        name: backend.id_to_token(number)
        for name, number in (
            ("pad_token", vocabulary.pad),
            ("bos_token", vocabulary.bos),
            ("eos_token", vocabulary.eos),
        )
        if number is not None
    }
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)


def byte_tokenizer(vocabulary: ByteVocabulary) -> Tokenizer:
    """Return the tokenizer of UTF-8 bytes as one of the `tokenizers` library: byte-level BPE without merges."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    names = {"<pad>": vocabulary.pad, "<eos>": vocabulary.eos, "<bos>": vocabulary.bos}
    names |= {symbol: vocabulary.first_byte + byte for byte, symbol in enumerate(byte_symbols())}
    # Reserved ids need names there: the library numbers words without a gap.
    taken = set(names.values()) | set(vocabulary.added.values())
    names |= {f"<reserved_{number}>": number for number in range(len(vocabulary)) if number not in taken}
    names |= vocabulary.added
    tokenizer = Tokenizer(models.BPE(vocab=names, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in vocabulary.added])
    return tokenizer


def byte_symbols() -> list[str]:
    """Return the printable character by which byte-level BPE writes each byte (GPT-2's table).

    Printable bytes stand for themselves; the others follow from character 256 on.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]

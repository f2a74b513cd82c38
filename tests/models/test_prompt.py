"""Prompts: layout, cutting, and tokenizers that travel as JSON."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from spear_lightning.errors import CheckpointError, ConfigError
from spear_lightning.models import PromptTokenizer

TEXTS = ["put the carrot on the plate", "", "légume 🥕"]


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> str:
    """A byte-level BPE without merges but with a word of its own, saved as transformers does."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<pad>", "<eos>", "<bos>", *symbols]
    tokenizer = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken("carrot")])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    fast.save_pretrained(tmp_path)
    return str(tmp_path)


def test_byte_prompts_are_bos_text_newline_padding() -> None:
    input_ids, mask = PromptTokenizer(max_length=8).encode(["abc", ""])
    assert input_ids.tolist() == [[2, 100, 101, 102, 13, 0, 0, 0], [2, 13, 0, 0, 0, 0, 0, 0]]
    assert mask.tolist() == [[True] * 5 + [False] * 3, [True] * 2 + [False] * 6]
    assert input_ids.dtype == torch.int64
    assert mask.dtype == torch.bool
    assert len(PromptTokenizer()) == 259


@pytest.mark.parametrize(
    ("texts", "length"),
    # A prompt is two tokens longer than its text; the longest decides, and none is longer than `max_length`.
    [(["ab"], 4), (["abc"], 8), (["abc", "abcdef"], 8), (["abcdefg", ""], 10), (["a" * 40], 10), ([], 4)],
)
def test_prompts_may_be_as_short_as_a_batch_allows(texts: list[str], length: int) -> None:
    fixed, trimmed = PromptTokenizer(max_length=10), PromptTokenizer(max_length=10, multiple=4)
    expected, real = fixed.encode(texts)
    for prompt in (trimmed, PromptTokenizer.from_json(trimmed.to_json())):
        ids, mask = prompt.encode(texts)
        assert ids.shape == mask.shape == (len(texts), length)
        assert torch.equal(ids, expected[:, :length])
        assert torch.equal(mask, real[:, :length])
        assert not real[:, length:].any()


def test_every_byte_has_an_id_of_its_own() -> None:
    prompt = PromptTokenizer(max_length=1200)
    input_ids, _ = prompt.encode(["".join(map(chr, range(1, 800)))])
    assert int(input_ids.max()) < len(prompt)
    assert bytes((input_ids[0, 1:] - 3).clamp(min=0).tolist()).startswith(bytes(range(1, 128)))


def test_words_are_one_token_each_and_travel_along() -> None:
    prompt = PromptTokenizer(max_length=10, words=["put the", " red", " on", " on the", " mug"])
    # Words come after the 259 ids of bytes and special tokens; the longest that fits is taken.
    text = "put the red mug on the tin"
    expected = [2, 259, 260, 263, 262, *(3 + byte for byte in b" tin"), 3 + ord("\n")]
    for tokenizer in (prompt, PromptTokenizer.from_json(prompt.to_json())):
        ids, mask = tokenizer.encode([text])
        assert ids[0].tolist() == expected
        assert mask.all()
        assert tokenizer.vocabulary.decode(expected[:-1]) == text
        assert len(tokenizer) == 264
    with pytest.raises(ConfigError, match="empty word"):
        PromptTokenizer(words=[""])


@pytest.mark.parametrize("kind", ["byte", "folder"])
def test_long_prompts_lose_their_end_but_not_the_newline(
    kind: str, tokenizer_folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = PromptTokenizer("byte" if kind == "byte" else tokenizer_folder, max_length=6)
    whole = PromptTokenizer(prompt.tokenizer, max_length=64)
    with caplog.at_level(logging.WARNING):
        cut, mask = prompt.encode(["abcdefghij", "abcd", "klmnop"])
    long, _ = whole.encode(["abcdefghij"])
    newline = whole.encode([""])[0][0, 1]
    assert cut[0].tolist() == [*long[0, :5].tolist(), int(newline)]
    assert mask.all()
    assert prompt.cut_prompts == 2
    assert len(caplog.records) == 1
    assert "10 tokens is cut to 4" in caplog.text


def test_a_tokenizer_from_a_folder(tokenizer_folder: str) -> None:
    prompt = PromptTokenizer(tokenizer_folder, max_length=40)
    reference = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    input_ids, mask = prompt.encode(TEXTS)
    for row, text in enumerate(TEXTS):
        expected = [2, *reference(text, add_special_tokens=False).input_ids, *reference("\n").input_ids]
        assert input_ids[row][mask[row]].tolist() == expected
        assert set(input_ids[row][~mask[row]].tolist()) <= {0}
    assert len(prompt) == len(reference) == 3 + 256 + 1


@pytest.mark.parametrize("kind", ["byte", "folder"])
def test_json_carries_the_whole_tokenizer(kind: str, tokenizer_folder: str) -> None:
    prompt = PromptTokenizer("byte" if kind == "byte" else tokenizer_folder, max_length=33)
    text = prompt.to_json()
    for path in Path(tokenizer_folder).iterdir():
        path.unlink()
    rebuilt = PromptTokenizer.from_json(text)
    for found, expected in zip(rebuilt.encode(TEXTS), prompt.encode(TEXTS), strict=True):
        assert torch.equal(found, expected)
    assert (len(rebuilt), rebuilt.max_length, rebuilt.tokenizer) == (len(prompt), 33, prompt.tokenizer)
    assert rebuilt.to_json() == text


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"schema": 2}', '{"schema": 1, "tokenizer": "byte", "max_length": "x"}']
)
def test_foreign_json_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match=r"stored tokenizer"):
        PromptTokenizer.from_json(text)


def test_configurations_that_cannot_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"more than 2"):
        PromptTokenizer(max_length=2)
    with pytest.raises(ConfigError, match=r"(?s)prompt.multiple.*0.*at least 1"):
        PromptTokenizer(multiple=0)
    with pytest.raises(ConfigError, match=r"(?s)cannot be loaded.*prompt.tokenizer"):
        PromptTokenizer(str(tmp_path))
    plain = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=plain).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"bos token"):
        PromptTokenizer(str(tmp_path))


@settings(deadline=None, max_examples=60)
@given(st.sets(st.text("ab <é.", min_size=1, max_size=4), min_size=1, max_size=9), st.text("ab <é.x", max_size=24))
def test_added_words_are_found_as_by_trying_the_longest_first(words: set[str], text: str) -> None:
    prompt = PromptTokenizer()
    prompt.add_tokens(sorted(words))
    (found,) = prompt.vocabulary.encode([text])
    expected: list[int] = []
    place = 0
    while place < len(text):
        fitting = [word for word in words if text.startswith(word, place)]
        word = max(fitting, key=len, default=text[place])
        expected += [259 + sorted(words).index(word)] if fitting else [3 + byte for byte in word.encode()]
        place += len(word)
    assert found == expected
    assert prompt.vocabulary.decode(found) == text

"""Quantisers within half a bin, and 3D tokens as whole words of both kinds of tokenizer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from spear_lightning.errors import CheckpointError, ConfigError, DataError
from spear_lightning.labeling.records import ImageLabel
from spear_lightning.labeling.store import LabelStore
from spear_lightning.models.prompt import PromptTokenizer
from spear_lightning.vqa.coordinate_tokens import CoordinateTokens, Quantizer, token_names

finite = st.floats(-100, 100, allow_nan=False, width=32)


@given(arrays.arrays(np.float64, st.integers(2, 300), elements=finite), st.integers(1, 40))
def test_fitted_bins_err_by_half_a_bin_at_most(values: np.ndarray, bins: int) -> None:
    if values.min() == values.max():
        with pytest.raises(DataError, match="cannot be fitted"):
            Quantizer.fit(values, bins)
        return
    quantizer = Quantizer.fit(values, bins, tails=0)
    assert len(quantizer) == bins
    assert not quantizer.outside(values).any()
    found = quantizer.encode(values)
    assert (np.abs(quantizer.decode(found) - values) <= quantizer.half_width(found) * (1 + 1e-9)).all()
    np.testing.assert_array_equal(quantizer.encode(quantizer.decode(np.arange(bins))), np.arange(bins))


def test_fitted_bins_are_used_equally_often_and_fine_where_values_are_dense() -> None:
    values = np.random.default_rng(0).normal(size=200_000)
    quantizer = Quantizer.fit(values, 64)
    used = np.bincount(quantizer.encode(values), minlength=64) / len(values)
    np.testing.assert_allclose(used, 1 / 64, rtol=0.05)
    widths = quantizer.half_width(np.arange(64))
    assert widths[32] < widths[8] < widths[0]
    # Median edge, and quartiles of the normal distribution.
    np.testing.assert_allclose(quantizer.edges[[16, 32, 48]], [-0.6745, 0, 0.6745], atol=0.01)


def test_uniform_bins_and_values_outside() -> None:
    tokens = CoordinateTokens(Quantizer.uniform(-1, 3, 1024), "metric")
    values = np.array([-1, 3, -1.5, 7, 0.5])
    text = tokens.text(values)
    assert text.startswith("<3d_0000><3d_1023><3d_0000><3d_1023>")
    assert (tokens.encoded, tokens.clamped) == (5, 2)
    found = tokens.values(text)
    assert found is not None
    np.testing.assert_allclose(found, np.clip(values, -1, 3), atol=2 / 1024)
    assert tokens.values("<3d_0001> <3d_0002>") is not None
    for wrong in ("<3d_0001>,", "<3d_001>", "<3d_1024>", "3d_0001", "<3d_00001>"):
        assert tokens.values(wrong) is None


def test_wrong_bins_are_refused() -> None:
    with pytest.raises(ConfigError, match="must increase"):
        Quantizer(np.array([0.0, 1.0, 1.0]))
    wrong: Any = "feet"
    with pytest.raises(ConfigError, match="median_depth or metric"):
        CoordinateTokens(Quantizer.uniform(0, 1), wrong)


def test_plain_values_carry_everything(tokens: CoordinateTokens) -> None:
    rebuilt = CoordinateTokens.from_dict(json.loads(json.dumps(tokens.to_dict())))
    np.testing.assert_array_equal(rebuilt.quantizer.edges, tokens.quantizer.edges)
    assert rebuilt.scale == tokens.scale
    for wrong in ({}, {"schema": 2}, {"schema": 1, "scale": "feet", "edges": [0, 1]}):
        with pytest.raises(CheckpointError, match="3D tokens cannot be read"):
            CoordinateTokens.from_dict(wrong)


def test_fitting_to_labels_covers_what_answers_are_made_of(
    demo_store: LabelStore, tokens: CoordinateTokens
) -> None:
    outside, total = 0, 0
    for label in demo_store:
        for item in label.objects:
            values = item.vertices / label.median_depth
            outside += int(tokens.quantizer.outside(values).sum())
            total += values.size
    assert outside / total < 1e-3
    with pytest.raises(DataError, match="0 values"):
        CoordinateTokens.fit([])


def test_metres_are_refused_where_the_scale_is_unknown(demo_store: LabelStore, tokens: CoordinateTokens) -> None:
    label: ImageLabel = demo_store[0]
    assert tokens.unit(label) == label.median_depth
    metric = CoordinateTokens(tokens.quantizer, "metric")
    assert metric.unit(label) == 1
    with pytest.raises(ConfigError, match=r"(?s)no metric scale.*demo-000000"):
        metric.unit(replace(label, unit="scale_free"))


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<pad>", "<eos>", "<bos>", *symbols]
    tokenizer = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


TEXT = "x <3d_0007> y <3d_1023><3d_0000>, so the légume is closer"


def test_a_transformers_tokenizer_keeps_the_tokens_after_save_pretrained(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    before = len(tokenizer)
    assert tokenizer.add_tokens(token_names()) == 1024
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.convert_tokens_to_ids(token_names()) == list(range(before, before + 1024))
    ids = loaded(TEXT, add_special_tokens=False).input_ids
    assert [number - before for number in ids if number >= before] == [7, 1023, 0]
    assert loaded.decode(ids) == TEXT
    # Our prompt reads the same folder, and finds them there already.
    prompt = PromptTokenizer(str(tmp_path))
    assert prompt.add_tokens(token_names()) == 0
    assert prompt.vocabulary.encode([TEXT]) == [ids]
    assert prompt.vocabulary.eos == loaded.eos_token_id


@pytest.mark.parametrize("kind", ["byte", "folder"])
def test_both_vocabularies_carry_added_tokens_through_json(kind: str, tmp_path: Path) -> None:
    byte_level_tokenizer().save_pretrained(tmp_path)
    prompt = PromptTokenizer("byte" if kind == "byte" else str(tmp_path))
    plain = prompt.vocabulary.encode(["a carrot"])
    before = len(prompt)
    assert prompt.add_tokens(token_names()) == 1024
    assert prompt.add_tokens(token_names()) == 0
    assert len(prompt) == before + 1024
    rebuilt = PromptTokenizer.from_json(prompt.to_json())
    for vocabulary in (prompt.vocabulary, rebuilt.vocabulary):
        ids = vocabulary.encode([TEXT])[0]
        assert [number - before for number in ids if number >= before] == [7, 1023, 0]
        assert vocabulary.eos == 1
        assert vocabulary.decode([vocabulary.bos, *ids, vocabulary.eos, vocabulary.pad]) == TEXT
        assert vocabulary.encode(["a carrot"]) == plain
    assert rebuilt.to_json() == prompt.to_json()


def test_a_byte_vocabulary_without_added_tokens_is_stored_as_before() -> None:
    assert json.loads(PromptTokenizer().to_json()) == {"schema": 1, "tokenizer": "byte", "max_length": 48}

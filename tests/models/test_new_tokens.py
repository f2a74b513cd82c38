"""Tokens added to a pretrained vocabulary: embeddings that train alone, and tokenizers that know them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from spear_lightning.models import GemmaShape, PromptTokenizer
from spear_lightning.models.gemma import GemmaLanguageModel
from spear_lightning.models.tokenizer_files import byte_symbols, save_tokenizer

SIZES = {"width": 32, "mlp_width": 48, "depth": 2, "heads": 4, "kv_heads": 1, "head_dim": 8}
NAMES = ["<3d_0000>", "<3d_0001>", "<3d_0002>"]


def pair(new_tokens: int = 3) -> tuple[GemmaLanguageModel, GemmaLanguageModel]:
    """A model with added tokens, and one whose single table has all rows."""
    torch.manual_seed(0)
    split = GemmaLanguageModel(GemmaShape(**SIZES, vocab_size=20, new_tokens=new_tokens))
    whole = GemmaLanguageModel(GemmaShape(**SIZES, vocab_size=20 + new_tokens))
    state = split.state_dict()
    state["embed_tokens.weight"] = torch.cat([state["embed_tokens.weight"], state.pop("new_embeddings.weight")])
    whole.load_state_dict(state)
    return split, whole


def test_two_tables_are_one_vocabulary() -> None:
    split, whole = pair()
    ids = torch.tensor([[0, 19, 20, 5], [22, 21, 20, 1]])
    assert torch.equal(split.embed(ids), whole.embed(ids))
    hidden = torch.randn(2, 4, 32)
    torch.testing.assert_close(split.head(hidden), whole.head(hidden))
    assert split.shape.rows == 23


def test_new_rows_train_alone_and_get_the_gradients_of_one_table() -> None:
    split, whole = pair()
    split.embed_tokens.requires_grad_(False)
    ids, target = torch.tensor([[0, 20, 22, 5]]), torch.tensor([20, 22, 5, 21])
    for model in (split, whole):
        hidden = model(model.embed(ids), torch.arange(4)[None])
        torch.nn.functional.cross_entropy(model.head(hidden)[0], target).backward()
    assert split.embed_tokens.weight.grad is None
    assert split.new_embeddings is not None
    torch.testing.assert_close(split.new_embeddings.weight.grad, whole.embed_tokens.weight.grad[20:])
    optimizer = torch.optim.AdamW([p for p in split.parameters() if p.requires_grad], weight_decay=0.1)
    before = split.embed_tokens.weight.clone()
    optimizer.step()
    assert torch.equal(split.embed_tokens.weight, before)
    assert split.embed_tokens.weight not in optimizer.state
    assert optimizer.state[split.new_embeddings.weight]["exp_avg"].shape == (3, 32)


def test_new_rows_are_drawn_with_mean_and_covariance_of_the_others() -> None:
    torch.manual_seed(1)
    model = GemmaLanguageModel(GemmaShape(**{**SIZES, "width": 6}, vocab_size=500, new_tokens=20_000))
    mixing = torch.randn(6, 6)
    with torch.no_grad():
        model.embed_tokens.weight.copy_(torch.randn(500, 6) @ mixing + torch.arange(6))
    model.draw_new_embeddings(seed=3)
    assert model.new_embeddings is not None
    old, new = model.embed_tokens.weight, model.new_embeddings.weight
    torch.testing.assert_close(new.mean(0), old.mean(0), atol=0.08, rtol=0)
    torch.testing.assert_close(new.T.cov(), old.T.cov(), atol=0.3, rtol=0)
    drawn = new.clone()
    model.draw_new_embeddings(seed=3)
    assert torch.equal(new, drawn)


def test_a_model_without_added_tokens_has_no_second_table() -> None:
    plain = GemmaLanguageModel(GemmaShape(**SIZES, vocab_size=20))
    assert "new_embeddings.weight" not in plain.state_dict()
    assert plain.new_embeddings is None


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> str:
    names = ["<pad>", "<eos>", "<bos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    fast.save_pretrained(tmp_path / "plain")
    return str(tmp_path / "plain")


@pytest.mark.parametrize("kind", ["byte", "folder"])
def test_new_tokens_begin_behind_the_rows_of_the_base(kind: str, tokenizer_folder: str, tmp_path: Path) -> None:
    prompt = PromptTokenizer("byte" if kind == "byte" else tokenizer_folder)
    assert prompt.add_tokens(["<loc0000>"]) == 1
    assert prompt.add_tokens(NAMES, first_id=300) == 3
    assert prompt.add_tokens(NAMES, first_id=300) == 0
    assert len(prompt) == 303
    text = "a <3d_0001>b<3d_0002><loc0000>é\n"
    (ids,) = prompt.vocabulary.encode([text])
    assert [number for number in ids if number >= 259] == [301, 302, 259]
    assert prompt.vocabulary.decode([2, *ids, 1]) == text
    again = PromptTokenizer.from_json(prompt.to_json())
    assert (len(again), again.vocabulary.encode([text])) == (303, [ids])
    save_tokenizer(prompt.vocabulary, tmp_path)
    assert PromptTokenizer(str(tmp_path)).vocabulary.encode([text]) == [ids]
    reference = AutoTokenizer.from_pretrained(tmp_path)
    assert len(reference) == 303
    assert reference(text, add_special_tokens=False).input_ids == ids
    assert reference.convert_tokens_to_ids(NAMES) == [300, 301, 302]
    assert (reference.pad_token_id, reference.eos_token_id, reference.bos_token_id) == (0, 1, 2)
    assert reference.decode(ids) == text


def test_the_table_of_byte_symbols_is_that_of_byte_level_bpe() -> None:
    assert sorted(byte_symbols()) == sorted(pre_tokenizers.ByteLevel.alphabet())

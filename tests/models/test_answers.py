"""Losses and answers of SPEAR-VLM against transformers' PaliGemma on the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from paligemma_reference import IMAGE_TOKEN, SIGLIP, paligemma
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PaliGemmaForConditionalGeneration

from spear_lightning.models import GemmaShape, SiglipEncoder, SpearVLM
from spear_lightning.models.answer_loss import NearBins, most_likely, token_losses
from spear_lightning.models.generation import generate

ROWS, NEW, END = 300, 8, 1


@pytest.fixture
def models(tmp_path: Path) -> tuple[PaliGemmaForConditionalGeneration, SpearVLM]:
    """transformers' model with a grown vocabulary, and ours with the published one and a second table."""
    whole = paligemma(ROWS + NEW)
    state = {name: value.clone() for name, value in whole.state_dict().items()}
    published = paligemma(ROWS)
    for name, value in published.state_dict().items():
        value.copy_(state[name][: len(value)] if value.shape != state[name].shape else state[name])
    published.save_pretrained(tmp_path)
    shape = GemmaShape(32, 48, 3, 4, 1, 8, vocab_size=ROWS, new_tokens=NEW)
    vlm = SpearVLM(shape, {"siglip": SiglipEncoder(**SIGLIP)}, weights=str(tmp_path)).eval()
    vlm.load_pretrained()
    with torch.no_grad():
        vlm.language_model.new_embeddings.weight.copy_(state["model.language_model.embed_tokens.weight"][ROWS:])
    return whole, vlm


@pytest.fixture
def pictures() -> Tensor:
    return torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def rows() -> tuple[Tensor, Tensor, Tensor]:
    """Two prompts of 5 and 3 tokens with answers of 4 and 6, new tokens among them; padded to 10."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, 298, (2, 10), generator=generator)
    ids[:, 6] = torch.tensor([ROWS + 2, ROWS + 7])
    place = torch.arange(10)
    return ids, place < torch.tensor([[9], [9]]), (place >= torch.tensor([[5], [3]])) & (place < 9)


def test_losses_equal_paligemmas(models: tuple, pictures: Tensor) -> None:
    whole, vlm = models
    ids, text_mask, answer_mask = rows()
    hidden = vlm({"front": pictures}, None, ids, text_mask, answer_mask)[:, -10:]
    source = answer_mask.roll(-1, dims=1)
    found = token_losses(vlm.language_head, hidden[source], ids[answer_mask])
    found.mean().backward()
    for row in range(2):
        # transformers alone, without padding; its label of what is not predicted is -100.
        real = ids[row : row + 1, :9]
        input_ids = torch.cat([torch.full((1, 4), IMAGE_TOKEN), real], dim=1)
        types = torch.cat([torch.zeros(1, 4, dtype=torch.int64), answer_mask[row : row + 1, :9].long()], dim=1)
        expected = whole(
            input_ids=input_ids,
            pixel_values=pictures[row : row + 1] / 127.5 - 1,
            token_type_ids=types,
            attention_mask=torch.ones_like(input_ids),
            labels=input_ids.masked_fill(types == 0, -100),
        ).loss
        own = found[: answer_mask[0].sum()] if row == 0 else found[answer_mask[0].sum() :]
        torch.testing.assert_close(own.mean(), expected, atol=1e-5, rtol=1e-5)


def test_losses_in_parts_have_the_same_values_and_gradients(models: tuple, pictures: Tensor) -> None:
    _, vlm = models
    hidden = torch.randn(11, 32, requires_grad=True, generator=torch.Generator().manual_seed(1))
    target = torch.randint(0, ROWS + NEW, (11,), generator=torch.Generator().manual_seed(2))
    results = []
    for at_once in (100, 3):
        vlm.zero_grad()
        hidden.grad = None
        losses = token_losses(vlm.language_head, hidden, target, at_once)
        losses.square().sum().backward()
        results.append((losses.detach(), hidden.grad, vlm.language_model.new_embeddings.weight.grad.clone()))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)
    expected = vlm.language_head(hidden).argmax(-1)
    assert torch.equal(most_likely(vlm.language_head, hidden, at_once=4), expected)


def test_near_bins_are_a_normal_target_and_words_are_as_before(models: tuple) -> None:
    _, vlm = models
    hidden = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    bins = [0, 3, NEW - 1]
    target = torch.tensor([5, 17, END, *(ROWS + place for place in bins)])
    found = token_losses(vlm.language_head, hidden, target, at_once=4, near=NearBins(ROWS, 1.5))
    logits = vlm.language_head(hidden)
    torch.testing.assert_close(found[:3], cross_entropy(logits[:3], target[:3], reduction="none"))
    shares = torch.zeros(3, ROWS + NEW)
    for row, place in enumerate(bins):
        density = torch.distributions.Normal(place, 1.5).log_prob(torch.arange(NEW)).exp()
        shares[row, ROWS:] = density / density.sum()
    torch.testing.assert_close(found[3:], cross_entropy(logits[3:], shares, reduction="none"))
    narrow = token_losses(vlm.language_head, hidden, target, near=NearBins(ROWS, 0.1))
    torch.testing.assert_close(narrow, token_losses(vlm.language_head, hidden, target))


@torch.no_grad()
def test_answers_equal_paligemmas(models: tuple, pictures: Tensor) -> None:
    whole, vlm = models
    ids, _, answer_mask = rows()
    prompt_mask = ~answer_mask[:, :5] & (torch.arange(5) < torch.tensor([[5], [3]]))
    found = generate(vlm, {"front": pictures}, None, ids[:, :5], prompt_mask, END, max_tokens=12)
    for row in range(2):
        length = int(prompt_mask[row].sum())
        input_ids = torch.cat([torch.full((1, 4), IMAGE_TOKEN), ids[row : row + 1, :length]], dim=1)
        expected = whole.generate(
            input_ids=input_ids,
            pixel_values=pictures[row : row + 1] / 127.5 - 1,
            token_type_ids=torch.zeros_like(input_ids),
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=END,
            pad_token_id=END,
        )[0, input_ids.shape[1] :]
        assert found.ids[row, : len(expected)].tolist() == expected.tolist()
        assert bool(found.finished[row]) == (END in expected.tolist())


@torch.no_grad()
def test_an_answer_ends_at_its_end(models: tuple, pictures: Tensor) -> None:
    _, vlm = models
    ids, _, _ = rows()
    whole = generate(vlm, {"front": pictures}, None, ids, None, END, max_tokens=6)
    # The second row's third token now ends answers; the first row may hold it too.
    end = int(whole.ids[1, 2])
    found = generate(vlm, {"front": pictures}, None, ids, None, end, max_tokens=6)
    for row in range(2):
        before = whole.ids[row].tolist()
        stop = before.index(end) if end in before else 6
        assert found.ids[row].tolist() == before[:stop] + [end] * (6 - stop)
        assert bool(found.finished[row]) == (stop < 6)

"""Packed batches against padded ones: the same values and gradients, and no work on padding."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spear_lightning.models import SpearVLA
from spear_lightning.models.gemma import attend
from spear_lightning.models.packing import (
    ROUNDED_TO,
    Packing,
    RealTokens,
    flash_attention,
    pack_answers,
    pack_real_tokens,
    packed_attention,
)


@given(st.lists(st.lists(st.booleans(), min_size=37, max_size=37), min_size=1, max_size=5), st.booleans())
def test_packing_and_unpacking_keep_every_real_token(rows: list[list[bool]], known: bool) -> None:
    mask_BP = torch.tensor(rows)
    packing = pack_real_tokens(mask_BP, sum(map(sum, rows)) if known else None)
    value_BP2 = torch.arange(mask_BP.numel() * 2).reshape(*mask_BP.shape, 2)
    packed_1T2 = packing.pack(value_BP2)
    starts = packing.start_S.tolist()
    # Sample by sample, each in its order.
    for sample, (begin, end) in enumerate(itertools.pairwise(starts[:-1])):
        assert torch.equal(packed_1T2[0, begin:end], value_BP2[sample, mask_BP[sample]])
    assert starts[-1] == packed_1T2.shape[1]
    assert starts[-1] - starts[-2] < ROUNDED_TO
    assert torch.equal(packing.unpack(packed_1T2)[mask_BP], value_BP2[mask_BP])


def _gradients(vla: SpearVLA, loss: Tensor) -> dict[str, Tensor]:
    vla.zero_grad()
    loss.backward()
    return {
        name: parameter.grad.clone() for name, parameter in vla.named_parameters() if parameter.grad is not None
    }


@pytest.mark.parametrize("wrist", [[True, False], [False, False], [True, True]])
def test_velocities_and_gradients_are_those_of_the_padded_batch(
    vla: SpearVLA,
    images: dict[str, Tensor],
    text: tuple[Tensor, Tensor],
    flow_point: tuple[Tensor, Tensor, Tensor],
    wrist: list[bool],
) -> None:
    mask = {"front": torch.tensor([True, True]), "wrist": torch.tensor(wrist)}
    real = RealTokens({"front": 2, "wrist": sum(wrist)}, 10)
    padded = vla.velocity(vla.encode_prefix(images, mask, *text), *flow_point)
    expected = _gradients(vla, padded.square().sum())
    packed = vla.velocity(vla.encode_prefix(images, mask, *text, real), *flow_point)
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-5)
    found = _gradients(vla, packed.square().sum())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-4, rtol=1e-4, msg=name)


def test_answers_are_those_of_the_padded_batch(
    vla: SpearVLA, images: dict[str, Tensor], image_mask: dict[str, Tensor], text: tuple[Tensor, Tensor]
) -> None:
    answer_mask = text[1] & (torch.arange(6) >= torch.tensor([[3], [2]]))
    vlm = vla.vlm
    padded = vlm(images, image_mask, *text, answer_mask)[:, -6:][answer_mask]
    expected = _gradients(vla, padded.square().sum())
    real = RealTokens({"front": 2, "wrist": 1}, 10, int(answer_mask.sum()))
    packed = vlm(images, image_mask, *text, answer_mask, real)[:, -6:][answer_mask]
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-5)
    found = _gradients(vla, packed.square().sum())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-4, rtol=1e-4, msg=name)


def _kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start_q: Tensor,
    start_k: Tensor,
    longest_q: int,
    longest_k: int,
    window_size: tuple[int, int],
) -> Tensor:
    """What flash attention of variable length computes, segment by segment, ends of queries and keys aligned."""
    assert query.shape[1] == key.shape[1] == value.shape[1]
    attended = []
    for (q0, q1), (k0, k1) in zip(
        itertools.pairwise(start_q.tolist()), itertools.pairwise(start_k.tolist()), strict=True
    ):
        assert q1 - q0 <= longest_q
        assert k1 - k0 <= longest_k
        scores = torch.einsum("qhd,khd->hqk", query[q0:q1], key[k0:k1]) * query.shape[-1] ** -0.5
        if window_size == (-1, 0):
            seen = torch.arange(k1 - k0) <= torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0)
            scores = scores.masked_fill(~seen, -torch.inf)
        attended.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value[k0:k1]))
    assert start_q[-1] == len(query)
    return torch.cat(attended)


def _packings() -> list[Packing]:
    length = torch.tensor([5, 40, 1, 23])
    place_P = torch.arange(40)
    mask_BP = place_P < length[:, None]
    mask_BP[1, 3:9] = False
    prompt = torch.tensor([3, 30, 1, 0])
    answer_BP = mask_BP & (place_P >= prompt[:, None])
    mask_BPP = ((place_P[:, None] >= place_P) | ~answer_BP[:, None]) & mask_BP[:, None]
    count, answers = int(mask_BP.sum()), int(answer_BP.sum())
    return [pack_real_tokens(mask_BP), pack_answers(mask_BP, answer_BP, mask_BPP, count, answers)]


@pytest.mark.parametrize("packing", _packings(), ids=["mutual", "answers"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_variable_length_kernel_gets_what_the_masks_say(
    packing: Packing, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", _kernel)
    generator = torch.Generator().manual_seed(kv_heads)
    tokens = len(packing.place_T)
    query = torch.randn(1, 4, tokens, 8, generator=generator, requires_grad=True)
    key, value = (torch.randn(1, kv_heads, tokens, 8, generator=generator, requires_grad=True) for _ in range(2))
    real = packing.mask.any(dim=2)[:, 0].flatten()[packing.place_T]
    results = []
    for flash in (True, False):
        if flash:
            parts = (part[0].transpose(0, 1) for part in (query, key, value))
            attended = flash_attention(*parts, packing).transpose(0, 1)[:, real]
        else:
            attended = packed_attention(query, key, value, packing)[0][:, real]
        results.append((attended, *torch.autograd.grad(attended.square().sum(), (query, key, value))))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_absent_images_are_not_encoded(
    vla: SpearVLA, images: dict[str, Tensor], image_mask: dict[str, Tensor], text: tuple[Tensor, Tensor]
) -> None:
    encoded = []
    block = vla.vlm.encoders["moge"].model.encoder.layer[0]
    block.register_forward_pre_hook(lambda _, arguments: encoded.append(arguments[1]))
    vla.encode_prefix(images, image_mask, *text, RealTokens({"front": 2, "wrist": 1}, 10))
    # Both sizes in one pass: how many images, and their tokens with the class token.
    assert encoded == [((2, 13), (1, 5))]


@torch.no_grad()
def test_cameras_of_one_size_are_encoded_together(vla: SpearVLA, images: dict[str, Tensor]) -> None:
    encoded = []
    block = vla.vlm.encoders["siglip"].model.encoder.layers[0]
    block.register_forward_pre_hook(lambda _, arguments: encoded.append(arguments[1]))
    cameras = {"front": images["front"], "wrist": images["wrist"], "back": images["front"].flip(0)}
    together = vla.vlm.encode_images(cameras)
    assert encoded == [((4, 12), (2, 4))]
    assert list(together) == list(cameras)
    for name, pixels in cameras.items():
        torch.testing.assert_close(
            together[name], vla.vlm.encode_images({name: pixels})[name], atol=1e-6, rtol=1e-5
        )


@pytest.mark.parametrize(("queries", "rows"), [(3, 3), (3, 1), (40, 1), (40, 40)])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_is_that_of_repeated_heads(queries: int, rows: int, kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(queries * kv_heads)
    query = torch.randn(2, 4, queries, 8, generator=generator)
    key, value = torch.randn(2, 2, kv_heads, 40, 8, generator=generator)
    mask = torch.rand(2, 1, rows, 40, generator=generator) < 0.7
    mask[..., 0] = True
    whole = [part.repeat_interleave(4 // kv_heads, dim=1) for part in (key, value)]
    scores = (query @ whole[0].mT) * 8**-0.5
    expected = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ whole[1]
    torch.testing.assert_close(attend(query, key, value, mask), expected, atol=1e-5, rtol=1e-5)

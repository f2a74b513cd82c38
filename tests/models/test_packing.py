"""Packed batches against padded ones: the same values and gradients, and no work on padding."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spear_lightning.models import RealTokens, SpearVLA
from spear_lightning.models.gemma import attend
from spear_lightning.models.packing import ROUNDED_TO, pack_real_tokens


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


@torch.no_grad()
def test_absent_images_are_not_encoded(
    vla: SpearVLA, images: dict[str, Tensor], image_mask: dict[str, Tensor], text: tuple[Tensor, Tensor]
) -> None:
    encoded = []
    vla.vlm.encoders["moge"].register_forward_pre_hook(lambda _, arguments: encoded.append(len(arguments[0])))
    vla.encode_prefix(images, image_mask, *text, RealTokens({"front": 2, "wrist": 1}, 10))
    assert encoded == [2, 1]


@torch.no_grad()
def test_cameras_of_one_size_are_encoded_together(vla: SpearVLA, images: dict[str, Tensor]) -> None:
    encoded = []
    vla.vlm.encoders["siglip"].register_forward_pre_hook(lambda _, arguments: encoded.append(len(arguments[0])))
    cameras = {"front": images["front"], "wrist": images["wrist"], "back": images["front"].flip(0)}
    together = vla.vlm.encode_images(cameras)
    assert encoded == [4, 2]
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

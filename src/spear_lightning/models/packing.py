"""Batches without padding: the real tokens of all samples in one row, and attention within samples.

A robot mixture pads a lot: instructions differ in length, and many data sets lack a camera. Packed, padding costs
nothing in the language model's matrix products, and attention runs in flash's variable-length kernel, which a
padded batch cannot use because of its mask.

Legend: B batch, P padded tokens of a sample, T packed tokens, S segments (the samples, and one of filling),
H query heads, G key and value heads, d channels of a head, K tokens attended to.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ROUNDED_TO = 64
"""The packed row is filled up to a multiple of this, which matrix products like."""

_FLASH_TYPES = (torch.bfloat16, torch.float16)


class Packing(NamedTuple):
    """Where the tokens of a packed row stand in the padded batch.

    Attributes:
        place_T: int64 (T,), the place in the flattened (B P) batch that each packed token comes from; sample by
            sample, in each in order; then padding that fills up the row.
        start_S: int32 (S + 1,), where each sample begins in the row, and then the filling, and the end.
        mask_BP: bool (B, P), which padded tokens are real.
        longest: No segment is longer.
    """

    place_T: Tensor
    start_S: Tensor
    mask_BP: Tensor
    longest: int

    def pack(self, padded_BPX: Tensor) -> Tensor:
        """Return (1, T, ...) of (B, P, ...)."""
        return padded_BPX.flatten(0, 1).index_select(0, self.place_T)[None]

    def unpack(self, packed_1TX: Tensor) -> Tensor:
        """Return (B, P, ...) of (1, T, ...); zero where padding is, unless it was taken as filling."""
        size = self.mask_BP.numel(), *packed_1TX.shape[2:]
        padded_NX = packed_1TX.new_zeros(size).index_copy(0, self.place_T, packed_1TX[0])
        return padded_NX.unflatten(0, self.mask_BP.shape)


def pack_real_tokens(mask_BP: Tensor, count: int | None = None) -> Packing:
    """Plan the packing of a padded batch.

    Args:
        mask_BP: bool (B, P), which tokens are real.
        count: How many are, where that is known: finding it out waits for the device.
    """
    real = int(mask_BP.sum()) if count is None else count
    total = min(mask_BP.numel(), math.ceil(real / ROUNDED_TO) * ROUNDED_TO)
    # The sort is stable: real tokens first, each kind in the order of samples and places.
    place_N = torch.argsort(mask_BP.flatten(), descending=True, stable=True)
    start_S = F.pad(mask_BP.sum(dim=1).cumsum(dim=0), (1, 1)).to(torch.int32)
    start_S[-1] = total
    return Packing(place_N[:total], start_S, mask_BP, max(mask_BP.shape[1], ROUNDED_TO))


def packed_attention(query_1HTd: Tensor, key_1GTd: Tensor, value_1GTd: Tensor, packing: Packing) -> Tensor:
    """Let every packed token attend to all tokens of its own sample.

    On CUDA in half precision it is flash attention of variable length; elsewhere the padded computation.

    Args:
        query_1HTd: (1, H, T, d).
        key_1GTd: (1, G, T, d); G divides H.
        value_1GTd: (1, G, T, d).
        packing: Which tokens belong together.

    Returns:
        (1, H, T, d); of no use where the row is filled up.
    """
    if query_1HTd.is_cuda and query_1HTd.dtype in _FLASH_TYPES:
        return _flash(query_1HTd, key_1GTd, value_1GTd, packing)
    query, key, value = (
        packing.unpack(part.transpose(1, 2)).transpose(1, 2) for part in (query_1HTd, key_1GTd, value_1GTd)
    )
    mask = packing.mask_BP[:, None, None]
    attended_BHPd = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    return packing.pack(attended_BHPd.transpose(1, 2)).transpose(1, 2)


def _flash(query_1HTd: Tensor, key_1GTd: Tensor, value_1GTd: Tensor, packing: Packing) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    key_TGd, value_TGd = key_1GTd[0].transpose(0, 1), value_1GTd[0].transpose(0, 1)
    groups = query_1HTd.shape[1] // key_TGd.shape[1]
    # Heads that share keys become further queries of one head: nothing is repeated, forward or backward.
    query_NGd = query_1HTd[0].unflatten(0, (-1, groups)).permute(2, 1, 0, 3).flatten(0, 1)
    attended_NGd = varlen_attn(
        query_NGd.contiguous(),
        key_TGd.contiguous(),
        value_TGd.contiguous(),
        packing.start_S * groups,
        packing.start_S,
        packing.longest * groups,
        packing.longest,
    )
    assert isinstance(attended_NGd, Tensor)
    return attended_NGd.unflatten(0, (-1, groups)).permute(2, 1, 0, 3).flatten(0, 1)[None]


def fold_heads(query_BHLd: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Make the heads that share one key and value into further queries of a single head.

    Args:
        query_BHLd: (B, H, L, d) for one key and value head.
        mask: bool (B or 1, 1, L or 1, K).

    Returns:
        Queries (B, 1, L H, d), the heads of a token one after the other, and the mask for them.
    """
    heads = query_BHLd.shape[1]
    folded = query_BHLd.transpose(1, 2).flatten(1, 2)[:, None]
    return folded, mask if mask.shape[2] == 1 else mask.repeat_interleave(heads, dim=2)


def unfold_heads(attended_B1Nd: Tensor, heads: int) -> Tensor:
    """Undo `fold_heads`: (B, 1, L H, d) -> (B, H, L, d)."""
    return attended_B1Nd[:, 0].unflatten(1, (-1, heads)).transpose(1, 2)

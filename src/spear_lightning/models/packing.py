"""Batches without padding: the real tokens of all samples in one row, and attention within samples.

A robot mixture pads a lot: instructions differ in length, and many data sets lack a camera. Packed, padding costs
nothing in the language model's matrix products, and attention runs in flash's variable-length kernel, which a
padded batch cannot use because of its mask.

Legend: B batch, P padded tokens of a sample, T packed tokens, S segments (the samples, and one of filling),
H query heads, G key and value heads, d channels of a head, K tokens attended to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ROUNDED_TO = 64
"""The packed row is filled up to a multiple of this, which matrix products like."""

_FLASH_TYPES = (torch.bfloat16, torch.float16)


class RealTokens(NamedTuple):
    """How much of a padded batch is real, as numbers that need no question to the device.

    Attributes:
        images: Camera name -> how many samples have it.
        text: Text tokens in all samples together, answers included.
        answers: Tokens of answers among them.
    """

    images: dict[str, int]
    text: int
    answers: int = 0


class AnswerRows(NamedTuple):
    """Answers in a packed row, where they stand behind the prompts of all samples.

    Attributes:
        prompts: How many tokens the prompts of all samples have.
        prompt_start_S: int32 (B + 1,), where each sample's prompt begins, and the end of the prompts.
        answer_start_S: int32 (S + 1,), where each sample's answer begins, counted from the end of the prompts;
            then the filling, and the end.
        order_T: int64 (T,), the row's tokens in the order of samples, each prompt before its answer.
        place_T: int64 (T,), where each token of the row stands in that order.
    """

    prompts: int
    prompt_start_S: Tensor
    answer_start_S: Tensor
    order_T: Tensor
    place_T: Tensor


class Packing(NamedTuple):
    """Where the tokens of a packed row stand in the padded batch.

    Attributes:
        place_T: int64 (T,), the place in the flattened (B P) batch that each packed token comes from: sample by
            sample, each in order, first the prompts and then the answers if there are any; then padding that fills
            up the row.
        start_S: int32 (S + 1,), where each sample begins in the order of samples, and the filling, and the end.
        mask: bool (B, 1, 1 or P, P), what padded tokens attend to.
        longest: No segment is longer.
        answers: `None`: all tokens of a sample attend to each other. Otherwise a prompt attends to itself, and the
            token of an answer to its prompt, to what stands before it and to itself.
    """

    place_T: Tensor
    start_S: Tensor
    mask: Tensor
    longest: int
    answers: AnswerRows | None = None

    def pack(self, padded_BPX: Tensor) -> Tensor:
        """Return (1, T, ...) of (B, P, ...)."""
        return padded_BPX.flatten(0, 1).index_select(0, self.place_T)[None]

    def unpack(self, packed_1TX: Tensor) -> Tensor:
        """Return (B, P, ...) of (1, T, ...); zero where padding is, unless it was taken as filling."""
        return self.unpack_each([packed_1TX])[0]

    def unpack_each(self, packed: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Do what `unpack` does for several rows of one shape, with one copy for all of them."""
        rows_RTX = packed[0] if len(packed) == 1 else torch.cat(list(packed))
        shape = self.mask.shape[0], self.mask.shape[3]
        padded_RNX = rows_RTX.new_zeros((len(rows_RTX), math.prod(shape), *rows_RTX.shape[2:]))
        return padded_RNX.index_copy(1, self.place_T, rows_RTX).unflatten(1, shape).unbind()


def pack_real_tokens(mask_BP: Tensor, count: int | None = None) -> Packing:
    """Plan the packing of a padded batch in which every token attends to all of its sample.

    Args:
        mask_BP: bool (B, P), which tokens are real.
        count: How many are, where that is known: finding it out waits for the device.
    """
    total = _filled(mask_BP, count)
    # The sort is stable: real tokens first, each kind in the order of samples and places.
    place_T = torch.argsort(mask_BP.flatten(), descending=True, stable=True)[:total]
    longest = max(mask_BP.shape[1], ROUNDED_TO)
    return Packing(place_T, _starts(mask_BP, total), mask_BP[:, None, None], longest)


def pack_answers(mask_BP: Tensor, answer_BP: Tensor, mask_BPP: Tensor, count: int, answers: int) -> Packing:
    """Plan the packing of a padded batch of prompts with answers, which are causal.

    Args:
        mask_BP: bool (B, P), which tokens are real.
        answer_BP: bool (B, P), which real tokens are an answer's.
        mask_BPP: bool (B, P, P), what the padded tokens attend to.
        count: How many tokens are real.
        answers: How many tokens of answers there are.
    """
    total, (batch, length) = _filled(mask_BP, count), mask_BP.shape
    # Prompts, answers, padding.
    kind_BP = torch.where(mask_BP, answer_BP.to(torch.uint8), 2)
    place_T = torch.argsort(kind_BP.flatten(), stable=True)[:total]
    sample_T = torch.div(place_T, length, rounding_mode="floor")
    sample_T[count:].fill_(batch)
    order_T = torch.argsort(sample_T, stable=True)
    rows = AnswerRows(
        prompts=count - answers,
        prompt_start_S=_starts(mask_BP & ~answer_BP, 0)[:-1],
        answer_start_S=_starts(answer_BP, total - (count - answers)),
        order_T=order_T,
        place_T=torch.argsort(order_T),
    )
    return Packing(place_T, _starts(mask_BP, total), mask_BPP[:, None], max(length, ROUNDED_TO), rows)


def _filled(mask_BP: Tensor, count: int | None) -> int:
    real = int(mask_BP.sum()) if count is None else count
    return min(mask_BP.numel(), math.ceil(real / ROUNDED_TO) * ROUNDED_TO)


def _starts(mask_BP: Tensor, total: int) -> Tensor:
    start_S = F.pad(mask_BP.sum(dim=1).cumsum(dim=0), (1, 1)).to(torch.int32)
    start_S[-1].fill_(total)
    return start_S


def packed_attention(query_1HTd: Tensor, key_1GTd: Tensor, value_1GTd: Tensor, packing: Packing) -> Tensor:
    """Let every packed token attend to tokens of its own sample.

    On CUDA in half precision it is flash attention of variable length; elsewhere the padded computation.

    Args:
        query_1HTd: (1, H, T, d).
        key_1GTd: (1, G, T, d); G divides H.
        value_1GTd: (1, G, T, d).
        packing: Which tokens belong together, and who attends to whom.

    Returns:
        (1, H, T, d); of no use where the row is filled up.
    """
    if query_1HTd.is_cuda and query_1HTd.dtype in _FLASH_TYPES:
        query, key, value = (part[0].transpose(0, 1) for part in (query_1HTd, key_1GTd, value_1GTd))
        return flash_attention(query, key, value, packing).transpose(0, 1)[None]
    query, key, value = (
        packing.unpack(part.transpose(1, 2)).transpose(1, 2) for part in (query_1HTd, key_1GTd, value_1GTd)
    )
    attended_BHPd = F.scaled_dot_product_attention(query, key, value, attn_mask=packing.mask, enable_gqa=True)
    return packing.pack(attended_BHPd.transpose(1, 2)).transpose(1, 2)


def flash_attention(query_THd: Tensor, key_TGd: Tensor, value_TGd: Tensor, packing: Packing) -> Tensor:
    """Do what `packed_attention` says, (T, H, d) from (T, H, d) and (T, G, d), by the variable-length kernel."""
    rows, longest = packing.answers, packing.longest
    if rows is None:
        return _mutual(query_THd, key_TGd, value_TGd, packing.start_S, longest)
    count = rows.prompts
    prompts = _mutual(query_THd[:count], key_TGd[:count], value_TGd[:count], rows.prompt_start_S, longest)
    groups = query_THd.shape[1] // key_TGd.shape[1]
    key_THd, value_THd = (
        Reordered.apply(part, rows.order_T, rows.place_T).repeat_interleave(groups, dim=1)
        for part in (key_TGd, value_TGd)
    )
    # The kernel aligns the ends of queries and keys: the last token of an answer sees everything, the one before
    # it all but the last, and so on.
    answers = _variable_length(
        query_THd[count:], key_THd, value_THd, rows.answer_start_S, packing.start_S, longest, longest, (-1, 0)
    )
    return torch.cat([prompts, answers])


def _mutual(query_THd: Tensor, key_TGd: Tensor, value_TGd: Tensor, start_S: Tensor, longest: int) -> Tensor:
    groups = query_THd.shape[1] // key_TGd.shape[1]
    # Heads that share keys become further queries of one head: nothing is repeated, forward or backward.
    query_NGd = query_THd.unflatten(1, (-1, groups)).transpose(1, 2).flatten(0, 1)
    attended_NGd = _variable_length(
        query_NGd, key_TGd, value_TGd, start_S * groups, start_S, longest * groups, longest, (-1, -1)
    )
    return attended_NGd.unflatten(0, (-1, groups)).transpose(1, 2).flatten(1, 2)


def _variable_length(
    query_NHd: Tensor,
    key_KHd: Tensor,
    value_KHd: Tensor,
    query_start_S: Tensor,
    key_start_S: Tensor,
    longest_query: int,
    longest_key: int,
    window: tuple[int, int],
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    attended = varlen_attn(
        query_NHd.contiguous(),
        key_KHd.contiguous(),
        value_KHd.contiguous(),
        query_start_S,
        key_start_S,
        longest_query,
        longest_key,
        window_size=window,
    )
    assert isinstance(attended, Tensor)
    return attended


class Reordered(torch.autograd.Function):
    """Rows in another order; the backward pass takes them back without adding up, which is faster and exact."""

    @staticmethod
    def forward(ctx: Any, rows_TX: Tensor, order_T: Tensor, place_T: Tensor) -> Tensor:
        """Return `rows_TX[order_T]`; `place_T` is the inverse order."""
        ctx.save_for_backward(place_T)
        return rows_TX.index_select(0, order_T)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient in the old order."""
        (place_T,) = ctx.saved_tensors
        return gradients[0].index_select(0, place_T), None, None


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

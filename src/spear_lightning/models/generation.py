"""Greedy answers of SPEAR-VLM, in batches, with keys and values kept from token to token.

All shapes stay the same from the first token to the last: keys and values lie in memory for the whole answer, of
which a mask says what is there already.

Legend: B batch, P prefix tokens, T tokens of an answer at most, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spear_lightning.models.gemma import KeyValue
from spear_lightning.models.spear_vlm import SpearVLM, positions_of


class Generated(NamedTuple):
    """Answers.

    Attributes:
        ids: int64 (B, T) token ids; after an answer's end, `end` again and again.
        finished: bool (B,), whether the answer came to its end within T tokens.
    """

    ids: Tensor
    finished: Tensor


@torch.no_grad()
def generate(
    vlm: SpearVLM,
    images: Mapping[str, Tensor],
    image_mask: Mapping[str, Tensor] | None,
    input_ids: Tensor,
    text_mask: Tensor | None,
    end: int,
    max_tokens: int,
) -> Generated:
    """Write the most likely answer, token after token.

    Args:
        vlm: The model.
        images: See `SpearVLM.embed_prefix`.
        image_mask: See `SpearVLM.embed_prefix`.
        input_ids: Prompts; see `SpearVLM.embed_prefix`.
        text_mask: See `SpearVLM.embed_prefix`.
        end: Id that ends an answer.
        max_tokens: T, tokens of an answer at most, its end included.
    """
    language = vlm.language_model
    tokens_BPD, valid_BP = vlm.embed_prefix(images, image_mask, input_ids, text_mask)
    mask = None if valid_BP is None else valid_BP[:, None, None]
    if valid_BP is None:
        valid_BP = tokens_BPD.new_ones(tokens_BPD.shape[:2], dtype=torch.bool)
    prefix_length = valid_BP.shape[1]
    hidden_BPD, prefix = language.with_key_values(tokens_BPD, positions_of(tokens_BPD, valid_BP), mask)
    # The answer follows the last real token; padding may lie behind it.
    last_B = (valid_BP * torch.arange(prefix_length, device=valid_BP.device)).argmax(dim=1)
    rows = torch.arange(len(last_B), device=last_B.device)
    next_B = language.head(hidden_BPD[rows, last_B]).argmax(-1)
    memory = [KeyValue(*(F.pad(part, (0, 0, 0, max_tokens)) for part in pair)) for pair in prefix]
    # One place more: a token's own keys and values stand behind those of the memory.
    seen_BK = F.pad(valid_BP, (0, max_tokens + 1))
    seen_BK[:, -1] = True
    first_B1 = valid_BP.sum(dim=1, keepdim=True)
    ids_BT = torch.full((len(next_B), max_tokens), end, device=next_B.device)
    finished_B = torch.zeros_like(next_B, dtype=torch.bool)
    for step in range(max_tokens):
        ids_BT[:, step] = next_B.masked_fill(finished_B, end)
        finished_B |= next_B == end
        if step == max_tokens - 1 or bool(finished_B.all()):
            break
        token_B1D = language.embed(ids_BT[:, step : step + 1]).to(tokens_BPD.dtype)
        hidden_B1D, own = language.with_key_values(token_B1D, first_B1 + step, seen_BK[:, None, None], memory)
        for kept, new in zip(memory, own, strict=True):
            kept.key[:, :, prefix_length + step] = new.key[:, :, 0]
            kept.value[:, :, prefix_length + step] = new.value[:, :, 0]
        seen_BK[:, prefix_length + step] = True
        next_B = language.head(hidden_B1D[:, 0]).argmax(-1)
    return Generated(ids_BT, finished_B)

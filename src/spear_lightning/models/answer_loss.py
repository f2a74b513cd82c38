"""Cross entropy of tokens over a large vocabulary, in parts: all logits at once would not fit in memory.

PaliGemma has 257,216 words. The logits of a batch of 32 answers of 100 tokens are 3.3 GB in float32, and their
gradient as much again; in parts, and computed anew for the backward pass, they take a fixed amount.

Legend: N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

AT_ONCE = 2048
"""Tokens whose logits exist at a time: 2.1 GB of float32 with PaliGemma's vocabulary."""


def token_losses(
    head: Callable[[Tensor], Tensor], hidden_ND: Tensor, target_N: Tensor, at_once: int = AT_ONCE
) -> Tensor:
    """Return the cross entropy of each token, float32 (N,).

    Args:
        head: Hidden states (n, D) -> logits (n, vocabulary).
        hidden_ND: Hidden states from which the tokens are predicted.
        target_N: int64 (N,) ids of the tokens.
        at_once: Tokens whose logits exist at a time.
    """

    def losses(hidden_nD: Tensor, target_n: Tensor) -> Tensor:
        return F.cross_entropy(head(hidden_nD).float(), target_n, reduction="none")

    if len(hidden_ND) <= at_once:
        # What the backward pass needs is no more than it would be if computed anew.
        return losses(hidden_ND, target_N)
    parts = zip(hidden_ND.split(at_once), target_N.split(at_once), strict=True)
    return torch.cat([checkpoint(losses, *part, use_reentrant=False) for part in parts])


@torch.no_grad()
def most_likely(head: Callable[[Tensor], Tensor], hidden_ND: Tensor, at_once: int = AT_ONCE) -> Tensor:
    """Return the most likely id of each token, int64 (N,).

    Args:
        head: Hidden states (n, D) -> logits (n, vocabulary).
        hidden_ND: Hidden states from which the tokens are predicted.
        at_once: Tokens whose logits exist at a time.
    """
    return torch.cat([head(part).argmax(-1) for part in hidden_ND.split(at_once)])

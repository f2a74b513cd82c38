"""Cross entropy of tokens over a large vocabulary, in parts: all logits at once would not fit in memory.

PaliGemma has 257,216 words. The logits of a batch of 32 answers of 100 tokens are 3.3 GB in float32, and their
gradient as much again; in parts, and computed anew for the backward pass, they take a fixed amount.

Legend: N tokens, D width, C 3D tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

AT_ONCE = 2048
"""Tokens whose logits exist at a time: 2.1 GB of float32 with PaliGemma's vocabulary."""


@dataclass(frozen=True)
class NearBins:
    """Lets the bins near the true one count as partly right: an addition to the paper.

    To plain cross entropy, a prediction one bin off is as wrong as one at the other end of the room. Here the
    target of a 3D token is a normal distribution over the bins around the true one, cut off at the ends of the
    range.

    Attributes:
        first: Id of the first 3D token; they are the last ids of the vocabulary.
        spread: Standard deviation in bins, positive.
    """

    first: int
    spread: float

    def losses(self, logits_NV: Tensor, target_N: Tensor) -> Tensor:
        """Return the cross entropy of each token, (N,), of which those that are no 3D tokens mean nothing."""
        logits_NC = logits_NV[:, self.first :]
        place_C = torch.arange(logits_NC.shape[1], device=logits_NV.device)
        away_NC = (place_C - (target_N - self.first)[:, None]) / self.spread
        shares_NC = torch.softmax(-away_NC.square() / 2, dim=-1)
        return logits_NV.logsumexp(-1) - (shares_NC * logits_NC).sum(-1)


def token_losses(
    head: Callable[[Tensor], Tensor],
    hidden_ND: Tensor,
    target_N: Tensor,
    at_once: int = AT_ONCE,
    near: NearBins | None = None,
) -> Tensor:
    """Return the cross entropy of each token, float32 (N,).

    Args:
        head: Hidden states (n, D) -> logits (n, vocabulary).
        hidden_ND: Hidden states from which the tokens are predicted.
        target_N: int64 (N,) ids of the tokens.
        at_once: Tokens whose logits exist at a time.
        near: How near misses of 3D tokens count; `None`: like all others.
    """

    def losses(hidden_nD: Tensor, target_n: Tensor) -> Tensor:
        logits_nV = head(hidden_nD).float()
        exact_n = F.cross_entropy(logits_nV, target_n, reduction="none")
        if near is None:
            return exact_n
        return torch.where(target_n >= near.first, near.losses(logits_nV, target_n), exact_n)

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

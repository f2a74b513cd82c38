"""Fusion of several encoders' tokens into one sequence (spec section 3)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn


class Fusion(nn.Module, ABC):
    """Turns the projected tokens of all encoders into the visual tokens of the language model."""

    @abstractmethod
    def forward(self, tokens: Mapping[str, Tensor]) -> Tensor:
        """Fuse tokens that lie on the same grid.

        Args:
            tokens: Encoder name -> (B, N, D), projected to the language model's width; at least one.

        Returns:
            Visual tokens (B, N, D).
        """


class MeanFusion(Fusion):
    """Visual token = mean of the encoders' projected tokens, as SPEAR-1 does."""

    def forward(self, tokens: Mapping[str, Tensor]) -> Tensor:
        """Return the mean over encoders."""
        first, *others = tokens.values()
        total_BND = first
        for other_BND in others:
            total_BND = total_BND + other_BND
        return total_BND / len(tokens) if others else first

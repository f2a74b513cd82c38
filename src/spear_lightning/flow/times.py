"""Which flow times a network is trained at: tau in [0, 1), 0 = noise, 1 = data."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from spear_lightning.errors import ConfigError

LARGEST_TIME = 1 - 2.0**-24
"""The float32 number before 1: at tau = 1 there is nothing left to predict."""


class FlowTime(ABC):
    """A distribution of the flow time."""

    @abstractmethod
    def sample(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw times.

        Args:
            shape: Shape of the result.
            generator: Source of randomness, on `device`.
            device: Where the result is needed.

        Returns:
            float32 times in [0, 1), of the given shape.
        """


class UniformTime(FlowTime):
    """All times equally often."""

    def sample(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw times (see `FlowTime.sample`)."""
        return torch.rand(shape, generator=generator, device=device, dtype=torch.float32)


class BetaTime(FlowTime):
    """Noisy times more often: tau = 1 - (cutoff b + 1 - cutoff) = cutoff (1 - b) with b ~ Beta(alpha, beta).

    This is pi0's distribution (arXiv 2410.24164, appendix B) with its defaults and our direction of time.
    Times lie in [0, cutoff]: an Euler sampler with steps longer than 1 - cutoff never asks for later ones.

    Args:
        alpha: First shape parameter; larger ones favour noise (small tau).
        beta: Second shape parameter; larger ones favour data (large tau).
        cutoff: Largest time, in (0, 1].
    """

    def __init__(self, alpha: float = 1.5, beta: float = 1.0, cutoff: float = 0.999) -> None:
        if not (alpha > 0 and beta > 0 and 0 < cutoff <= 1):
            raise ConfigError(
                "The distribution of the flow time is not defined",
                where="flow.time",
                found=f"alpha {alpha}, beta {beta}, cutoff {cutoff}",
                expected="alpha > 0, beta > 0, 0 < cutoff <= 1",
            )
        self.alpha = alpha
        self.beta = beta
        self.cutoff = cutoff

    def sample(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw times (see `FlowTime.sample`)."""
        tau = self.cutoff * (1 - self._beta(shape, generator, device))
        return tau.clamp(max=LARGEST_TIME)

    def _beta(
        self, shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device | str | None
    ) -> Tensor:
        if self.beta == 1:
            # The distribution function is b^alpha, which inverts in closed form.
            uniform = torch.rand(shape, generator=generator, device=device, dtype=torch.float32)
            return uniform ** (1 / self.alpha)
        # Two Gamma variables; torch.distributions cannot draw from a generator of one's own.
        gamma = [
            torch._standard_gamma(
                torch.full(shape, parameter, device=device, dtype=torch.float32), generator=generator
            )
            for parameter in (self.alpha, self.beta)
        ]
        return gamma[0] / (gamma[0] + gamma[1])

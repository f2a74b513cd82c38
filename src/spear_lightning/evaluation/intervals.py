"""How sure a success rate is: Wilson's score interval."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

from spear_lightning.errors import ConfigError


@dataclass(frozen=True)
class Rate:
    """A share of episodes with its confidence interval.

    Attributes:
        successes: Episodes that count.
        episodes: All episodes, at least one.
        low: Lower bound of the interval, in [0, 1].
        high: Upper bound of the interval, in [0, 1].
    """

    successes: int
    episodes: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """The share itself."""
        return self.successes / self.episodes

    def __str__(self) -> str:
        return f"{100 * self.value:.0f} % [{100 * self.low:.0f}, {100 * self.high:.0f}]"


def wilson(successes: int, episodes: int, confidence: float = 0.95) -> Rate:
    """Return a success rate with Wilson's score interval.

    The bounds are the rates p that a normal test at this confidence would not reject, the roots of
    `(successes/n - p)^2 = z^2 p (1 - p) / n` (Wilson 1927). Unlike the textbook interval it is right for few
    episodes and for rates near 0 and 1.

    Args:
        successes: Episodes that succeeded.
        episodes: Episodes that were run.
        confidence: Probability that such an interval holds the true rate, in (0, 1).

    Raises:
        ConfigError: If there is no episode, or more successes than episodes.
    """
    if not 0 <= successes <= episodes or episodes == 0 or not 0 < confidence < 1:
        raise ConfigError(
            "A success rate needs episodes",
            found=f"{successes} successes in {episodes} episodes at confidence {confidence}",
            expected="0 <= successes <= episodes, at least one episode, confidence in (0, 1)",
        )
    z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    share = successes / episodes
    middle = share + z2 / (2 * episodes)
    half = sqrt(z2 * (share * (1 - share) + z2 / (4 * episodes)) / episodes)
    scale = 1 + z2 / episodes
    # The bounds are exact at the ends; rounding would leave 1e-17 there.
    low = 0.0 if successes == 0 else (middle - half) / scale
    high = 1.0 if successes == episodes else (middle + half) / scale
    return Rate(successes, episodes, low, high)

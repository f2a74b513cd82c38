"""Flow times against scipy's distributions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from spear_lightning.errors import ConfigError
from spear_lightning.flow import BetaTime, FlowTime, UniformTime

DRAWS = 50_000


def draw(time: FlowTime, seed: int = 0) -> torch.Tensor:
    return time.sample((DRAWS,), torch.Generator().manual_seed(seed), "cpu")


@pytest.mark.parametrize(
    ("alpha", "beta", "cutoff"), [(1.5, 1.0, 0.999), (1.0, 2.5, 0.9), (2.0, 3.0, 1.0), (0.5, 0.7, 0.999)]
)
def test_beta_times_follow_their_distribution(alpha: float, beta: float, cutoff: float) -> None:
    tau = draw(BetaTime(alpha, beta, cutoff)).double().numpy()
    # 1 - b is Beta with its parameters exchanged.
    expected = stats.beta(beta, alpha, scale=cutoff)
    # A wrong direction of time, cutoff or parameter is off by orders of magnitude at this number of draws.
    assert stats.kstest(tau, expected.cdf).pvalue > 1e-3
    assert tau.mean() == pytest.approx(expected.mean(), abs=4 * expected.std() / np.sqrt(DRAWS))
    assert tau.var() == pytest.approx(expected.var(), rel=0.03)


def test_the_default_is_pi0s_with_time_reversed() -> None:
    tau = draw(BetaTime()).double().numpy()
    # pi0: 0.999 Beta(1.5, 1) + 0.001, where 1 is noise.
    theirs = stats.beta.rvs(1.5, 1.0, size=DRAWS, random_state=1) * 0.999 + 0.001
    assert stats.ks_2samp(tau, 1 - theirs).pvalue > 1e-3
    assert stats.ks_2samp(tau, theirs).pvalue < 1e-10


def test_uniform_times_are_uniform() -> None:
    assert stats.kstest(draw(UniformTime()).double().numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("time", [UniformTime(), BetaTime(), BetaTime(2, 3, 1.0), BetaTime(0.05, 0.05, 1.0)])
def test_times_are_float32_below_one_and_repeatable(time: FlowTime) -> None:
    tau = draw(time)
    assert tau.dtype == torch.float32
    assert float(tau.min()) >= 0
    assert float(tau.max()) < 1
    assert torch.equal(tau, draw(time))
    assert not torch.equal(tau, draw(time, seed=1))
    assert time.sample((3, 4)).shape == (3, 4)


@pytest.mark.parametrize(("alpha", "beta", "cutoff"), [(0, 1, 0.9), (1, -1, 0.9), (1, 1, 0), (1, 1, 1.1)])
def test_undefined_distributions_are_refused(alpha: float, beta: float, cutoff: float) -> None:
    with pytest.raises(ConfigError, match="alpha > 0"):
        BetaTime(alpha, beta, cutoff)

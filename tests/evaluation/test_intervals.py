from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from spear_lightning.errors import ConfigError
from spear_lightning.evaluation.intervals import wilson


@given(st.data(), st.integers(1, 500), st.floats(0.5, 0.999))
def test_bounds_are_scipys(data: st.DataObject, episodes: int, confidence: float) -> None:
    successes = data.draw(st.integers(0, episodes))
    expected = binomtest(successes, episodes).proportion_ci(confidence, method="wilson")
    rate = wilson(successes, episodes, confidence)
    assert (rate.low, rate.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= rate.low <= rate.value <= rate.high <= 1


@pytest.mark.parametrize("successes", [0, 1, 17, 24])
def test_the_bounds_solve_wilsons_equation(successes: int) -> None:
    z = 1.959963984540054
    rate = wilson(successes, 24)
    for bound in (rate.low, rate.high):
        assert (rate.value - bound) ** 2 == pytest.approx(z**2 * bound * (1 - bound) / 24, abs=1e-12)


def test_the_numbers_of_the_paper() -> None:
    # Carrot on plate, 14 of 24, as computed elsewhere.
    assert str(wilson(14, 24)) == "58 % [39, 76]"


@pytest.mark.parametrize(("successes", "episodes"), [(0, 0), (-1, 5), (6, 5)])
def test_impossible_counts_are_refused(successes: int, episodes: int) -> None:
    with pytest.raises(ConfigError, match="needs episodes"):
        wilson(successes, episodes)

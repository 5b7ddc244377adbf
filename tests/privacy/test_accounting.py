from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flwr_clicooper.errors import OptionError
from flwr_clicooper.privacy.accounting import (
    composed,
    delta_of,
    epsilon_of,
    mu_for,
    noise_for,
)


@pytest.mark.parametrize(
    ("epsilon", "ratio"), [(1.0, 3.731), (2.0, 1.994), (4.0, 1.081), (8.0, 0.600)]
)
def test_noise_multipliers_at_delta_1e_5(epsilon: float, ratio: float) -> None:
    assert noise_for(epsilon, 1e-5, 1.0) == pytest.approx(ratio, abs=6e-4)


@pytest.mark.parametrize("releases", [1, 7, 100])
@pytest.mark.parametrize("epsilon", [0.5, 1.0, 2.0, 8.0])
def test_agrees_with_dp_accounting(epsilon: float, releases: int) -> None:
    dp = pytest.importorskip("dp_accounting", reason="a test dependency")
    sigma = noise_for(epsilon, 1e-5, 1.0, releases)
    accountant = dp.pld.PLDAccountant(value_discretization_interval=1e-4)
    accountant.compose(dp.SelfComposedDpEvent(dp.GaussianDpEvent(sigma), releases))
    assert accountant.get_epsilon(1e-5) == pytest.approx(epsilon, rel=1e-3)


@settings(deadline=None)
@given(epsilon=st.floats(1e-3, 50.0), delta=st.floats(1e-12, 0.1))
def test_mu_and_epsilon_are_inverse_and_on_the_private_side(
    epsilon: float, delta: float
) -> None:
    mu = mu_for(epsilon, delta)
    assert delta_of(epsilon, mu) <= delta
    assert delta_of(epsilon, mu * (1 + 1e-6)) > delta
    assert epsilon_of(delta, mu) == pytest.approx(epsilon, rel=1e-6)


def test_more_releases_need_more_noise_by_the_root() -> None:
    one = noise_for(2.0, 1e-5, 3.0)
    assert noise_for(2.0, 1e-5, 3.0, 16) == pytest.approx(4 * one)
    assert composed([0.3] * 16) == pytest.approx(1.2)
    assert composed([3.0, 4.0]) == 5.0


def test_no_noise_to_speak_of_costs_a_finite_epsilon_and_much_noise_costs_none() -> None:
    assert epsilon_of(1e-5, 1e3) > 1e5
    assert epsilon_of(1e-2, 1e-3) == 0.0


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_values_out_of_range_are_named(value: float) -> None:
    with pytest.raises(OptionError, match="epsilon is"):
        mu_for(value, 1e-5)
    with pytest.raises(OptionError, match="delta is"):
        mu_for(1.0, value)
    with pytest.raises(OptionError, match="delta is"):
        epsilon_of(1.0, 1.0)
    with pytest.raises(OptionError, match="mu is"):
        epsilon_of(1e-5, value)
    with pytest.raises(OptionError, match="sensitivity is"):
        noise_for(1.0, 1e-5, value)
    with pytest.raises(OptionError, match="releases is 0"):
        noise_for(1.0, 1e-5, 1.0, 0)

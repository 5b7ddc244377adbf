"""Clipping and noise. Statistical tests state their false-alarm rate."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, kstest, norm

from flwr_clicooper.errors import DataError, OptionError
from flwr_clicooper.privacy import release as module
from flwr_clicooper.privacy.accounting import delta_of, mu_for, noise_for
from flwr_clicooper.privacy.release import GaussianRelease, add_noise
from tests.privacy.audits import lower_bound

FALSE_ALARM = 1e-6


def batch(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * scale


# -- clipping --------------------------------------------------------------------------------


@settings(deadline=None, max_examples=500)
@given(
    scale=st.sampled_from([1e-40, 1e-12, 1e-3, 1.0, 1e6, 1e30, 3e38]),
    clip=st.floats(1e-6, 1e6),
    shape=st.sampled_from([(4, 3), (3, 2, 5), (1, 1), (5, 0), (0, 4), (6,)]),
    seed=st.integers(0, 1000),
)
@example(scale=3e38, clip=0.125, shape=(4, 3), seed=0)  # a factor below normal numbers
def test_no_record_is_longer_than_the_clip(
    scale: float, clip: float, shape: tuple[int, ...], seed: int
) -> None:
    unit = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    clipped = GaussianRelease("record", clip, 0.0)(unit * scale)
    assert clipped.shape == shape
    norms = torch.tensor([float(record.double().norm()) for record in clipped])
    assert bool((norms <= clip).all())


def test_the_worst_pair_of_records_is_within_the_sensitivity() -> None:
    release = GaussianRelease("record", 0.7, 0.0)
    far = torch.zeros(2, 100)
    far[0, 0], far[1, 0] = 3e38, -3e38
    first, second = release(far).double()
    distance = float((first - second).norm())
    assert release.sensitivity * (1 - 1e-5) <= distance <= release.sensitivity


def test_short_records_and_zero_stay_as_they_are() -> None:
    records = torch.tensor([[0.0, 0.0], [0.3, 0.4], [30.0, 40.0]])
    clipped = GaussianRelease("record", 1.0, 0.0)(records)
    assert torch.equal(clipped[:2], records[:2])
    assert torch.allclose(clipped[2], torch.tensor([0.6, 0.8]))
    assert records[2, 0] == 30.0  # what came is not modified


def test_elements_are_cut_one_by_one() -> None:
    release = GaussianRelease("element", 0.5, 0.0)
    clipped = release(torch.tensor([[-9.0, 0.1], [0.5, 9.0]]))
    assert torch.equal(clipped, torch.tensor([[-0.5, 0.1], [0.5, 0.5]]))
    assert release.sensitivity == 1.0
    assert release.record_sensitivity(16) == 4.0
    assert GaussianRelease("record", 0.5, 0.0).record_sensitivity(16) == 1.0


@pytest.mark.parametrize(
    ("dtype", "given_back"),
    [
        (torch.float64, torch.float64),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.uint8, torch.float32),
        (torch.int64, torch.float32),
        (torch.bool, torch.float32),
    ],
)
@pytest.mark.parametrize("unit", ["record", "element"])
def test_every_real_dtype_is_released(
    unit: str, dtype: torch.dtype, given_back: torch.dtype
) -> None:
    records = (torch.arange(24).reshape(4, 6) % 2).to(dtype)
    assert GaussianRelease(unit, 1.0, 0.5)(records).dtype == given_back


@pytest.mark.parametrize("unit", ["record", "element"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(unit: str, value: float) -> None:
    records = torch.ones(3, 4)
    records[1, 2] = value
    with pytest.raises(DataError, match="NaN or infinity"):
        GaussianRelease(unit, 1.0, 1.0)(records)


@pytest.mark.parametrize("records", [torch.tensor(1.0), torch.zeros(2, 2, dtype=torch.cfloat)])
def test_what_is_not_a_batch_of_real_records_is_refused(records: torch.Tensor) -> None:
    with pytest.raises(DataError, match="real tensors of records"):
        GaussianRelease("record", 1.0, 1.0)(records)


@pytest.mark.parametrize(
    ("unit", "clip", "sigma"),
    [
        ("batch", 1.0, 1.0),
        ("record", 0.0, 1.0),
        ("record", math.inf, 1.0),
        ("record", 1.0, -1.0),
        ("record", 1.0, math.nan),
    ],
)
def test_bad_parameters_are_refused(unit: str, clip: float, sigma: float) -> None:
    with pytest.raises(OptionError):
        GaussianRelease(unit, clip, sigma)


# -- several batches of the same records -----------------------------------------------------


def test_a_joint_release_bounds_the_norm_of_the_whole_row() -> None:
    release = GaussianRelease("record", 1.0, 0.0)
    first, second = release.joint([batch(50, 3, 4, scale=5), batch(50, 2, scale=7).double()])
    assert first.shape == (50, 3, 4)
    assert first.dtype == torch.float32
    assert second.dtype == torch.float64
    norms = torch.cat([first.double().flatten(1), second], dim=1).norm(dim=1)
    assert bool((norms <= 1).all())
    assert bool((norms > 1 - 1e-5).all())  # and wastes nothing: alone each would be 1


def test_a_joint_release_keeps_short_rows_and_the_direction_of_long_ones() -> None:
    release = GaussianRelease("record", 1.0, 0.0)
    one = torch.tensor([[0.3, 0.0], [30.0, 0.0], [0.0, 0.0]])
    other = torch.tensor([0.4, 40.0, 0.0])  # a batch of one number each
    first, second = release.joint([one, other])
    assert torch.allclose(first, torch.tensor([[0.3, 0.0], [0.6, 0.0], [0.0, 0.0]]))
    assert torch.allclose(second, torch.tensor([0.4, 0.8, 0.0]))


def test_a_joint_release_of_one_batch_is_that_of_the_batch() -> None:
    release, one = GaussianRelease("record", 0.9, 0.0), batch(40, 6, scale=2)
    assert torch.equal(release.joint([one])[0], release(one))


def test_each_batch_of_a_joint_release_gets_the_noise() -> None:
    zeros = [torch.zeros(200, 100), torch.zeros(200, 100, dtype=torch.float64)]
    first, second = GaussianRelease("record", 1.0, 3.0).joint(zeros)
    for noise in (first, second):
        assert kstest(noise.double().numpy().ravel() / 3, "norm").pvalue > FALSE_ALARM
    correlation = float((first.double() * second).mean()) / 9
    assert abs(correlation) * math.sqrt(20_000) < norm.isf(FALSE_ALARM / 2)


@pytest.mark.parametrize("unit", ["record", "element"])
@pytest.mark.parametrize("sizes", [(), (3, 4)])
def test_batches_that_are_not_of_the_same_records_are_refused(
    unit: str, sizes: tuple[int, ...]
) -> None:
    with pytest.raises(DataError, match="of the same records"):
        GaussianRelease(unit, 1.0, 1.0).joint([torch.zeros(size, 2) for size in sizes])


@pytest.mark.parametrize("unit", ["record", "element"])
def test_one_batch_that_is_not_finite_refuses_the_joint_release(unit: str) -> None:
    with pytest.raises(DataError, match="NaN or infinity"):
        GaussianRelease(unit, 1.0, 1.0).joint([torch.ones(2), torch.tensor([1.0, math.nan])])


# -- noise -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_gaussian_with_the_stated_deviation(dtype: torch.dtype) -> None:
    zeros = torch.zeros(700, 1000, dtype=dtype)  # more than two blocks
    noise = GaussianRelease("record", 1.0, 2.5)(zeros).double().numpy()
    assert kstest(noise.ravel() / 2.5, "norm").pvalue > FALSE_ALARM
    # Neighbours, columns, the two of a pair and blocks are not related, nor their squares.
    flat = noise.ravel() / 2.5
    for values in (flat, (flat**2 - 1) / math.sqrt(2)):
        for lag in (1, 1000, 2**16, 2**18):
            product = values[:-lag] * values[lag:]
            assert abs(product.mean()) * math.sqrt(len(product)) < norm.isf(FALSE_ALARM / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_tails_of_the_noise_are_as_heavy_as_they_must_be(dtype: torch.dtype) -> None:
    noise = torch.zeros(8_000_000, dtype=dtype)
    add_noise(noise, 1.0)
    for limit in (3.0, 4.0, 4.5, 5.0):
        beyond = int((noise.abs() > limit).sum())
        chance = 2 * norm.sf(limit)
        assert binomtest(beyond, len(noise), chance).pvalue > FALSE_ALARM / 4
    assert bool((noise != 0).all())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("byte", "reach"), [(0, math.sqrt(2 * 64 * math.log(2))), (255, 0)])
def test_no_bits_give_noise_that_is_not_finite(dtype: type, byte: int, reach: float) -> None:
    class Same:
        def update_into(self, data: memoryview, buffer: memoryview) -> None:
            buffer[: len(data)] = bytes([byte]) * len(data)

    stream: Any = Same()
    first, second = module._gaussian(stream, 1, np.dtype(dtype))
    assert math.hypot(first, second) == pytest.approx(reach)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 2**17 - 1, 2**17 + 1, 2**18 + 1])
def test_noise_comes_to_every_number_whatever_their_count(count: int) -> None:
    noise = torch.zeros(count)
    add_noise(noise, 1e-3)
    assert bool((noise != 0).all())
    assert bool((noise.abs() < 0.01).all())


def test_blocks_do_not_share_their_noise() -> None:
    noise = torch.zeros(3 * 2**18)
    add_noise(noise, 1.0)
    assert len({tuple(block[:8].tolist()) for block in noise.view(-1, 2**17)}) == 6


def test_noise_follows_from_no_seed() -> None:
    released = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        released.append(GaussianRelease("record", 1.0, 1.0)(torch.zeros(4, 4)))
    assert not torch.equal(*released)


def test_global_generators_are_left_alone() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    GaussianRelease("record", 1.0, 1.0)(torch.zeros(4, 4))
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()


# -- the guarantee, attacked -----------------------------------------------------------------


def audited_epsilon(sigma: float, delta: float, games: int = 1_000_000) -> float:
    """Return a lower bound of epsilon by a distinguishing game with the worst pair.

    Half of the games release one record, half the record that replaced it; the attacker
    sees the line between them and guesses at the best threshold of a grid. Bounds on its
    error rates (Clopper and Pearson, over the whole grid) give epsilon (Kairouz et al.).
    """
    release = GaussianRelease("record", 1.0, sigma)
    one, other = torch.full((games, 1), 100.0), torch.full((games, 1), -100.0)
    seen_one, seen_other = release(one)[:, 0].numpy(), release(other)[:, 0].numpy()
    return lower_bound(seen_one, seen_other, np.linspace(-2, 4 * sigma, 60), delta)


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 2.0])
def test_an_audit_finds_less_than_the_claimed_epsilon(epsilon: float) -> None:
    sigma = noise_for(epsilon, 1e-5, 2.0)
    assert 0.3 * epsilon < audited_epsilon(sigma, 1e-5) <= epsilon


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 2.0])
def test_an_audit_finds_more_when_the_noise_is_too_small(epsilon: float) -> None:
    sigma = noise_for(epsilon, 1e-5, 2.0)
    assert audited_epsilon(sigma / 2, 1e-5) > epsilon


def test_the_claimed_mu_is_the_mechanism_s() -> None:
    release = GaussianRelease("record", 1.0, noise_for(2.0, 1e-5, 2.0))
    mu = release.sensitivity / release.sigma
    assert mu == pytest.approx(mu_for(2.0, 1e-5))
    assert delta_of(2.0, mu) <= 1e-5

"""Noisy statistics, and rows drawn from them. Statistical tests state a false-alarm rate."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from flwr_clicooper.errors import CooperError, DataError, OptionError
from flwr_clicooper.privacy import statistics
from flwr_clicooper.privacy.accounting import composed, mu_for
from flwr_clicooper.privacy.statistics import (
    Batches,
    class_counts,
    feature_sum,
    noisy,
    noisy_symmetric,
    normalise,
    residual_sums,
    second_moment,
)
from flwr_clicooper.privacy.synthetic import release_synthetic
from tests.privacy.audits import lower_bound

FALSE_ALARM = 1e-6
RESIDUAL_MAX = statistics._RESIDUAL_MAX


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clusters(
    records: int, classes: int = 3, width: int = 8, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features around one direction per class, far from the origin."""
    labels = torch.randint(0, classes, (records,), generator=seeded(seed))
    places = torch.randn(classes, width, generator=seeded(99)) * 2 + 3
    spread = torch.randn(records, width, generator=seeded(seed + 1))
    return places[labels] + 0.5 * spread, labels


def in_batches(features: torch.Tensor, labels: torch.Tensor, size: int = 700) -> Batches:
    return lambda: zip(features.split(size), labels.split(size), strict=True)


# -- normalisation ---------------------------------------------------------------------------


@settings(deadline=None, max_examples=300)
@given(
    scale=st.sampled_from([1e-44, 1e-30, 1e-3, 1.0, 1e30, 3e38]),
    shape=st.sampled_from([(4, 3), (3, 2, 5), (1, 1), (2, 500), (0, 4), (5, 0)]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_normalised_records_have_the_root_of_their_size_as_norm(
    scale: float, shape: tuple[int, ...], dtype: torch.dtype, seed: int
) -> None:
    unit = torch.rand(shape, generator=seeded(seed)) * 2 - 1
    features = (unit.double() * scale).to(dtype)
    out = normalise(features)
    assert out.shape == shape
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    bound = math.sqrt(math.prod(shape[1:]))
    norms = out.double().flatten(1).norm(dim=1)
    assert bool((norms <= bound).all())
    # Very small and very large numbers are not lost.
    assert bool((norms[features.flatten(1).abs().sum(1) > 0] > bound * 0.999).all())


def test_each_record_is_normalised_by_itself_and_zero_stays_zero() -> None:
    features = torch.randn(6, 2, 5, generator=seeded())
    features[2] = 0.0
    out = normalise(features)
    assert torch.equal(out, torch.cat([normalise(record[None]) for record in features]))
    assert not out[2].any()
    assert torch.allclose(normalise(7 * features), out)
    assert torch.allclose(normalise(out), out, rtol=1e-5)


# -- sensitivity -----------------------------------------------------------------------------


def pair(
    rows: torch.Tensor, first: torch.Tensor, second: torch.Tensor, labels: tuple[int, int]
) -> dict[str, float]:
    """Return how far each statistic moves when a record is replaced, over its sensitivity."""
    width, radius = rows.shape[1], 0.6
    centre = torch.full((width,), 0.1, dtype=torch.float64)
    weights = torch.randn(width, 4, generator=seeded(7)).double() * 5
    rest, sides = torch.randint(0, 4, (len(rows),), generator=seeded(3)), []
    for row, label in zip((first, second), labels, strict=True):
        records = torch.cat([rows, row[None]])
        told = torch.cat([rest, torch.tensor([label])])
        sides.append(
            {
                "counts": class_counts(told, 4) / math.sqrt(2),
                "mean": feature_sum(records) / 2,
                "moment": second_moment(records, centre, radius) / (math.sqrt(2) * radius**2),
                "residuals": residual_sums(records, told, weights, radius) / (2 * radius),
            }
        )
    return {name: float((value - sides[1][name]).norm()) for name, value in sides[0].items()}


@settings(deadline=None, max_examples=200)
@given(
    seed=st.integers(0, 10_000),
    width=st.integers(1, 12),
    sizes=st.tuples(st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([0.3, 1.0])),
    labels=st.tuples(st.integers(0, 3), st.integers(0, 3)),
)
def test_replacing_a_record_moves_no_statistic_beyond_its_sensitivity(
    seed: int, width: int, sizes: tuple[float, float], labels: tuple[int, int]
) -> None:
    rows = torch.randn(30, width, generator=seeded(seed))
    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1.0)
    first, second = torch.nn.functional.normalize(
        torch.randn(2, width, generator=seeded(seed + 1))
    )
    ratios = pair(rows, first * sizes[0], second * sizes[1], labels)
    assert max(ratios.values()) <= 1 + 1e-6  # records are float32


def test_the_worst_pairs_reach_the_sensitivities() -> None:
    rows = torch.zeros(5, 2)
    axis = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    opposite = pair(rows, axis[0], -axis[0], (0, 1))
    assert [opposite["mean"], opposite["counts"]] == pytest.approx([1.0, 1.0])
    # Orthogonal after centring, and clipped.
    centre = torch.tensor([0.1, 0.1])
    apart = pair(rows, centre + 0.8 * axis[0], centre + 0.8 * axis[1], (0, 0))
    assert apart["moment"] == pytest.approx(1.0)
    one, other = wrong_about_opposites()
    assert float((one - other).norm()) == pytest.approx(2.0 * RESIDUAL_MAX, rel=0.01)


def wrong_about_opposites() -> tuple[torch.Tensor, torch.Tensor]:
    """Return residual sums of opposite records that an intercept is sure and wrong about."""
    weights = torch.tensor([[0.0, 0.0], [-1000.0, 1000.0]]).double()
    records = torch.tensor([[[1.0, 0.1]], [[-1.0, 0.1]]])
    label = torch.tensor([0])
    one, other = (residual_sums(record, label, weights, RESIDUAL_MAX) for record in records)
    return one, other


def test_statistics_are_what_they_are_called() -> None:
    rows = torch.randn(20_000, 5, generator=seeded()) * 0.1  # more than two blocks
    labels = torch.randint(0, 3, (20_000,), generator=seeded(1))
    assert torch.equal(class_counts(labels, 5)[:3], torch.bincount(labels).double())
    assert class_counts(labels, 5)[3:].tolist() == [0.0, 0.0]
    assert torch.allclose(feature_sum(rows), rows.double().sum(0))
    moment = second_moment(rows, torch.full((5,), 0.02).double(), 10.0)
    assert torch.allclose(moment, (rows.double() - 0.02).T @ (rows.double() - 0.02))
    weights = torch.zeros(5, 3, dtype=torch.float64, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(rows.double() @ weights, labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, weights)
    assert torch.allclose(residual_sums(rows, labels, weights.detach(), 10.0), gradient)
    # A smaller radius shortens each record's part and leaves its direction.
    whole, cut = (residual_sums(rows[:1], labels[:1], weights.detach(), r) for r in (1, 1e-3))
    assert torch.allclose(1e3 * cut, whole / whole.norm())


# -- noise -----------------------------------------------------------------------------------


def test_noise_is_gaussian_with_the_stated_deviation() -> None:
    noise = noisy(torch.zeros(300, 300, dtype=torch.float64), 2.5).numpy().ravel()
    assert kstest(noise / 2.5, "norm").pvalue > FALSE_ALARM
    assert torch.equal(noisy(torch.ones(3), 0.0), torch.ones(3))


def test_symmetric_noise_is_gaussian_in_the_coordinates_of_the_frobenius_norm() -> None:
    noise = noisy_symmetric(torch.zeros(400, 400, dtype=torch.float64), 2.5)
    assert torch.equal(noise, noise.T)
    above = noise[torch.triu(torch.ones(400, 400), 1) > 0].numpy()
    assert kstest(noise.diagonal().numpy() / 2.5, "norm").pvalue > FALSE_ALARM
    assert kstest(above / 2.5 * math.sqrt(2), "norm").pvalue > FALSE_ALARM
    assert torch.equal(noisy_symmetric(torch.eye(3), 0.0), torch.eye(3).double())


def test_each_statistic_gets_the_noise_of_its_charge(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[tuple[int, ...], float]] = []
    add_noise = statistics.add_noise

    def watched(tensor: torch.Tensor, sigma: float) -> None:
        seen.append((tuple(tensor.shape), sigma))
        add_noise(tensor, sigma)

    def moment_of(rows: torch.Tensor, centre: torch.Tensor, radius: float) -> torch.Tensor:
        radii.append(radius)
        return second_moment(rows, centre, radius)

    radii: list[float] = []
    monkeypatch.setattr(statistics, "second_moment", moment_of)
    monkeypatch.setattr(statistics, "add_noise", watched)
    features, labels = clusters(2000)
    release = release_synthetic(in_batches(features, labels), 3, 50, 0.7)
    counts, mean, moment, residuals = release.charges
    assert moment.sensitivity == math.sqrt(2.0) * radii[0] ** 2
    assert seen[:3] == [((3,), counts.sigma), ((8,), mean.sigma), ((8, 8), moment.sigma)]
    assert seen[3:-1] == [((9, 3), residuals.sigma)] * residuals.releases
    assert seen[-1] == ((100, 8), 1.0)  # the rows, of which half are kept


@pytest.mark.parametrize("mu", [0.1, 0.5, 3.0])
def test_charges_compose_to_what_was_allowed(mu: float) -> None:
    charges = release_synthetic(in_batches(*clusters(1000)), 3, 10, mu).charges
    assert composed([charge.mu for charge in charges]) == pytest.approx(mu)
    names = [charge.name for charge in charges]
    assert names == ["counts", "mean", "second moment", "residual sums"]
    once = charges[3].sensitivity / charges[3].sigma
    assert composed([once] * charges[3].releases) == pytest.approx(charges[3].mu)
    limits = [charges[place].sensitivity for place in (0, 1, 3)]
    assert limits == [math.sqrt(2), 2.0, 2.0 * RESIDUAL_MAX]


def test_a_release_follows_from_no_seed_and_leaves_global_generators_alone() -> None:
    features, labels = clusters(500)
    released = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        before = torch.get_rng_state(), np.random.get_state()[1].copy()
        released.append(release_synthetic(in_batches(features, labels), 3, 20, 1.0).features)
        assert torch.equal(before[0], torch.get_rng_state())
        assert (before[1] == np.random.get_state()[1]).all()
    assert not torch.equal(*released)


# -- the guarantee, attacked -----------------------------------------------------------------


def worst_pair(name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return a statistic of two data sets of one record as far apart as any, and its claim."""
    row, first, second = torch.tensor([[1.0]]), torch.tensor([0]), torch.tensor([1])
    if name == "counts":
        return class_counts(first, 2), class_counts(second, 2), math.sqrt(2.0)
    if name == "mean":
        return feature_sum(row), feature_sum(-row), 2.0
    return *wrong_about_opposites(), 2.0 * RESIDUAL_MAX


def audited_epsilon(
    name: str, mu: float, weaken: float, delta: float, games: int = 1_000_000
) -> float:
    """Return a lower bound of epsilon by a distinguishing game with the worst pair.

    The whole of mu goes to one statistic, whose noise is divided by ``weaken``. The attacker
    sees the line between both values and guesses at the best threshold of a grid. Bounds on
    its error rates (Clopper and Pearson, over the whole grid) give epsilon.
    """
    one, other, sensitivity = worst_pair(name)
    budget = statistics.Budget(mu / math.sqrt(statistics._SHARES[name]))
    sigma = budget.charge(name, sensitivity).sigma / weaken
    line = (one - other) / (one - other).norm()

    def seen(value: torch.Tensor) -> np.ndarray:
        games_played = noisy(value.expand(games, *value.shape), sigma)
        return ((games_played - other) * line).flatten(1).sum(1).numpy()

    seen_one, seen_other = seen(one), seen(other)
    return lower_bound(
        seen_one, seen_other, np.linspace(-sigma, sensitivity + 4 * sigma, 60), delta
    )


@pytest.mark.parametrize("name", ["counts", "mean", "residual sums"])
@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_an_audit_finds_less_than_the_claim_and_more_when_noise_is_halved(
    name: str, epsilon: float
) -> None:
    mu = mu_for(epsilon, 1e-5)
    assert 0.3 * epsilon < audited_epsilon(name, mu, 1.0, 1e-5) <= epsilon
    assert audited_epsilon(name, mu, 2.0, 1e-5) > epsilon


# -- what the rows are good for --------------------------------------------------------------


def test_rows_have_the_shape_scale_and_type_of_normalised_features() -> None:
    release = release_synthetic(in_batches(*clusters(1000, classes=4)), 4, 123, 1.0)
    assert release.features.shape == (123, 8)
    assert release.features.dtype == torch.float32
    assert release.labels.shape == (123,)
    assert release.labels.dtype == torch.int64
    norms = release.features.double().norm(dim=1)
    assert torch.allclose(norms, torch.full((123,), math.sqrt(8)).double())
    assert bool((norms <= math.sqrt(8)).all())


def nearest_mean_accuracy(mu: float, records: int = 6000) -> float:
    """Return how often the means of the rows' classes know the class of a new record."""
    rows = release_synthetic(in_batches(*clusters(records)), 3, 3000, mu)
    means = torch.stack([rows.features[rows.labels == c].mean(0) for c in range(3)])
    features, labels = clusters(2000, seed=50)
    return float((torch.cdist(normalise(features), means).argmin(1) == labels).double().mean())


def test_rows_teach_what_the_records_would_and_nothing_under_great_noise() -> None:
    assert nearest_mean_accuracy(1.0) > 0.95
    assert nearest_mean_accuracy(1e-4) < 0.95


def test_mean_and_spread_of_rows_are_the_records() -> None:
    features, labels = clusters(20_000)
    release = release_synthetic(in_batches(features, labels), 3, 20_000, 5.0)
    real = normalise(features)
    assert torch.allclose(release.features.mean(0), real.mean(0), atol=0.1)
    # Rows of norm 1 are not quite Gaussian, but spread in the same directions.
    spreads = torch.stack([release.features.T.cov().flatten(), real.T.cov().flatten()])
    assert float(spreads.corrcoef()[0, 1]) > 0.95
    assert float(spreads[0].norm() / spreads[1].norm()) == pytest.approx(1.0, abs=0.3)


def test_an_absent_class_stays_absent() -> None:
    features, labels = clusters(5000)
    release = release_synthetic(in_batches(features, labels * 2), 6, 2000, 1.0)
    assert sorted(release.labels.unique().tolist()) == [0, 2, 4]


def test_a_rare_class_has_about_its_share() -> None:
    features, labels = clusters(20_000, classes=2)
    kept = (labels == 0) | (torch.arange(20_000) % 10 == 0)
    release = release_synthetic(in_batches(features[kept], labels[kept]), 2, 5000, 1.0)
    share = float(labels[kept].double().mean())
    assert float(release.labels.double().mean()) == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("mu", [1e-3, 1.0])
def test_zero_rows_few_records_and_one_feature_are_possible(mu: float) -> None:
    for features, labels in (
        (torch.zeros(50, 4), torch.zeros(50, dtype=torch.int64)),
        (torch.ones(1, 512), torch.ones(1, dtype=torch.int64)),
        (torch.ones(3, 1, dtype=torch.float64), torch.tensor([0, 1, 1])),
    ):
        release = release_synthetic(in_batches(features, labels), 2, 5, mu)
        assert release.features.shape == (5, features.shape[1])
        assert bool(torch.isfinite(release.features).all())


# -- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "records", "mu"),
    [(1, 5, 1.0), (3, 0, 1.0), (3, 5, 0.0), (3, 5, -1.0), (3, 5, math.inf), (3, 5, math.nan)],
)
def test_bad_parameters_are_refused(classes: int, records: int, mu: float) -> None:
    with pytest.raises(OptionError, match="allowed are"):
        release_synthetic(in_batches(*clusters(10)), classes, records, mu)


def test_too_many_features_are_refused_with_the_way_out() -> None:
    wide = torch.ones(2, 513), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(OptionError, match=r"513 features; at most 512 .* pool or project"):
        release_synthetic(in_batches(*wide), 2, 5, 1.0)


GOOD = torch.full((4, 3), 0.625), torch.tensor([0, 1, 1, 0])


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (GOOD[0], torch.tensor([0, 1, 77, 0]), "allowed are 0 to 1"),
        (GOOD[0], torch.tensor([0, 1, -77, 0]), "allowed are 0 to 1"),
        (GOOD[0], GOOD[1].float(), r"labels are float32\[4\]"),
        (GOOD[0], GOOD[1].int(), "one int64 class"),
        (GOOD[0], GOOD[1][:3], "for 4 records"),
        (GOOD[0], GOOD[1][:, None], "one int64 class"),
        (GOOD[0][:, :, None], GOOD[1], "the head must end flat"),
        (GOOD[0][:, :0], GOOD[1], "the head must end flat"),
        (GOOD[0].cfloat(), GOOD[1], "real"),
        (GOOD[0] * math.inf, GOOD[1], "NaN or infinity"),
        (GOOD[0] * math.nan, GOOD[1], "NaN or infinity"),
        (GOOD[0][:0], GOOD[1][:0], "no records"),
    ],
)
def test_bad_records_are_refused_without_naming_values(
    features: torch.Tensor, labels: torch.Tensor, message: str
) -> None:
    with pytest.raises(CooperError, match=message) as caught:
        release_synthetic(lambda: [(features, labels)], 2, 5, 1.0)
    assert isinstance(caught.value, DataError)
    assert "77" not in str(caught.value)
    assert "0.625" not in str(caught.value)


def test_batches_of_other_widths_are_refused() -> None:
    mixed = [(torch.ones(2, width), torch.zeros(2, dtype=torch.int64)) for width in (3, 4)]
    with pytest.raises(DataError, match="4 features, the first 3"):
        release_synthetic(lambda: mixed, 2, 5, 1.0)

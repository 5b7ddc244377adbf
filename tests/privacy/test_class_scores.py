from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flwr_clicooper.errors import DataError, OptionError
from flwr_clicooper.privacy.class_scores import SENSITIVITY, ClassScores, fit_class_scores


def records(count: int, classes: int = 3, width: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, classes, (count,), generator=generator)
    centres = torch.randn(classes, width, generator=generator)
    return centres[labels] + torch.randn(count, width, generator=generator), labels


def batches(count: int, **more: int) -> Iterator[tuple[Tensor, Tensor]]:
    features, labels = records(count, **more)
    yield from zip(torch.split(features, 500), torch.split(labels, 500), strict=True)


def fitted(count: int = 4000, mu: float = 1.0) -> ClassScores:
    scores = ClassScores(8, 3)
    scores.load_state_dict(fit_class_scores(lambda: batches(count), 3, mu))
    return scores


def test_scores_know_the_class_of_records() -> None:
    features, labels = records(4000)
    # Three clusters that overlap: the best classifier has about 0.9.
    accuracy = float((fitted()(features).argmax(dim=1) == labels).float().mean())
    assert accuracy > 0.75


def test_less_budget_gives_worse_scores() -> None:
    features, labels = records(4000)
    known = [
        (fitted(mu=mu)(features).argmax(dim=1) == labels).float().mean() for mu in (1, 1e-4)
    ]
    assert known[0] > known[1] + 0.1


@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1e6), st.integers(2, 12))
@settings(max_examples=50, deadline=None)
def test_two_records_are_never_further_apart_than_stated(
    seed: int, sharpness: float, classes: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = ClassScores(5, classes)
    scores.whitening.copy_(torch.eye(5))
    scores.weights.copy_(torch.randn(6, classes, generator=generator) * sharpness)
    given_ = scores(torch.randn(40, 5, generator=generator) * 10).double()
    assert float(torch.cdist(given_, given_).max()) <= SENSITIVITY + 1e-6
    assert float(given_.norm(dim=1).max()) < 1
    assert torch.allclose(given_.sum(dim=1), torch.zeros(40).double(), atol=1e-5)


def test_the_worst_pair_reaches_the_sensitivity() -> None:
    scores = ClassScores(2, 2)
    scores.whitening.copy_(torch.eye(2))
    scores.weights[:2].copy_(torch.eye(2) * 1e4)
    one, other = scores(torch.eye(2))
    assert float((one - other).norm()) == pytest.approx(math.sqrt(2.0))


def test_a_record_has_the_same_scores_alone_and_in_a_batch() -> None:
    scores, features = fitted(), records(50)[0]
    alone = torch.cat([scores(row[None]) for row in features])
    assert torch.allclose(alone, scores(features), atol=1e-6)


def test_fitting_draws_new_noise_each_time() -> None:
    one, two = (fit_class_scores(lambda: batches(500), 3, 1.0) for _ in range(2))
    assert all(float((one[name] - two[name]).abs().max()) > 0 for name in one)


@pytest.mark.parametrize("mu", [0.0, -1.0, math.nan, math.inf])
def test_a_budget_that_is_none_is_refused(mu: float) -> None:
    with pytest.raises(OptionError, match="mu is"):
        fit_class_scores(lambda: batches(500), 3, mu)


def test_a_label_out_of_range_is_refused() -> None:
    with pytest.raises(DataError, match="a label is out of range; allowed are 0 to 1"):
        fit_class_scores(lambda: batches(500), 2, 1.0)

"""Secret labels. Statistical tests use fixed keys, or a false-alarm rate that is stated."""

from __future__ import annotations

import hashlib
import math
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import beta, binom, chisquare

from flwr_clicooper.errors import DataError, OptionError, StateError
from flwr_clicooper.privacy.labels import (
    SecretLabelMap,
    flip,
    keep_probability,
    load_key,
    new_key,
    save_key,
)

KEY = hashlib.sha256(b"a fixed key for tests").digest()
OTHER = hashlib.sha256(b"another").digest()
FALSE_ALARM = 1e-6


def example(records: int = 20_000, classes: int = 10) -> tuple[torch.Tensor, np.ndarray]:
    generator = np.random.default_rng(0)
    labels = torch.from_numpy(generator.integers(0, classes, records))
    return labels, np.arange(records)


@pytest.mark.parametrize("expansion", [1, 2, 4])
def test_decoding_gives_back_the_classes(expansion: int) -> None:
    secret = SecretLabelMap(10, expansion, KEY)
    labels, ids = example()
    told = secret.encode(labels, ids)
    assert int(told.max()) == secret.pseudo_classes - 1
    logits = torch.nn.functional.one_hot(told, secret.pseudo_classes).float() * 20
    assert torch.equal(secret.decode(logits).argmax(dim=1), labels)


def test_decoded_values_are_log_probabilities_of_classes() -> None:
    secret = SecretLabelMap(3, 2, KEY)
    logits = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    decoded = secret.decode(logits)
    assert torch.allclose(decoded.exp().sum(dim=1), torch.ones(5))
    members = [secret.encode(torch.full((200,), c), range(200)).unique() for c in range(3)]
    whole = torch.stack([logits.softmax(1)[:, m].sum(1) for m in members], dim=1)
    assert torch.allclose(decoded.exp(), whole, atol=1e-6)


def test_pseudo_classes_of_a_class_are_balanced() -> None:
    labels, ids = example()
    secret = SecretLabelMap(10, 4, KEY)
    told = secret.encode(labels, ids)
    for value in range(10):
        counts = torch.bincount(told[labels == value], minlength=40)
        assert (counts > 0).sum() == 4
        assert chisquare(counts[counts > 0]).pvalue > FALSE_ALARM


def test_a_record_keeps_its_pseudo_class_in_another_process() -> None:
    labels, ids = example(200)
    here = SecretLabelMap(10, 3, KEY).encode(labels, ids).tolist()
    code = (
        "import torch; from flwr_clicooper.privacy.labels import SecretLabelMap\n"
        f"m = SecretLabelMap(10, 3, bytes.fromhex('{KEY.hex()}'))\n"
        f"print(m.encode(torch.tensor({labels.tolist()}), range(200)).tolist())"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert eval(there.stdout) == here
    backwards = SecretLabelMap(10, 3, KEY).encode(labels.flip(0), ids[::-1])
    assert backwards.flip(0).tolist() == here


def test_another_key_agrees_only_by_chance() -> None:
    labels, ids = example()
    mine, other = (SecretLabelMap(10, 2, key).encode(labels, ids) for key in (KEY, OTHER))
    # Permutations of 20 agree in few places; the share is then that of those classes.
    assert float((mine == other).float().mean()) < 0.3
    # Within a class, whether two records share a pseudo-class says nothing across keys.
    rows = labels == 3
    same = [(told[rows][1:] == told[rows][:-1]).int() for told in (mine, other)]
    agree = int((same[0] == same[1]).sum())
    low, high = binom.interval(1 - FALSE_ALARM, len(same[0]), 0.5)
    assert low <= agree <= high


def test_names_are_permuted_uniformly_over_keys() -> None:
    counts = np.zeros((4, 4))
    for number in range(2000):
        key = hashlib.sha256(f"key {number}".encode()).digest()
        told = SecretLabelMap(4, 1, key).encode(torch.arange(4), range(4))
        counts[np.arange(4), told.numpy()] += 1
    assert chisquare(counts.ravel()).pvalue > FALSE_ALARM


def test_bad_labels_and_outputs_are_refused_without_naming_them() -> None:
    secret = SecretLabelMap(10, 2, KEY)
    with pytest.raises(DataError, match="allowed are 0 to 9") as caught:
        secret.encode(torch.tensor([3, 77]), [0, 1])
    assert "77" not in str(caught.value)
    with pytest.raises(DataError, match="one label and one id"):
        secret.encode(torch.tensor([3, 4]), [0])
    with pytest.raises(DataError, match="must be 20"):
        secret.decode(torch.zeros(4, 10))


@pytest.mark.parametrize(
    ("classes", "expansion", "key", "message"),
    [
        (1, 2, KEY, "at least 2 classes"),
        (10, 0, KEY, "expansion of at least 1"),
        (10, 2, b"short", "5 bytes; allowed are 32"),
    ],
)
def test_bad_maps_are_refused(classes: int, expansion: int, key: bytes, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        SecretLabelMap(classes, expansion, key)


# -- key files -----------------------------------------------------------------------------


def test_a_key_file_is_owner_only_and_never_overwritten(tmp_path: Path) -> None:
    path, key = tmp_path / "label.key", new_key()
    os.umask(os.umask(0))
    save_key(path, key)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_key(path) == key
    with pytest.raises(StateError, match="never overwritten"):
        save_key(path, new_key())
    assert load_key(path) == key


def test_a_key_file_that_is_wrong_is_named_and_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "label.key"
    with pytest.raises(StateError, match="cannot be read"):
        load_key(path)
    save_key(path, KEY)
    path.chmod(0o644)
    with pytest.raises(StateError, match="others may read"):
        load_key(path)
    path.chmod(0o600)
    for text, message in (("zz" * 32, "not hexadecimal"), ("ab" * 31, "has 31 bytes")):
        path.write_text(text)
        with pytest.raises(StateError, match=message) as caught:
            load_key(path)
        assert text not in str(caught.value)


# -- randomised response -------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.5, 2.0, 5.0])
def test_labels_are_flipped_at_the_rate_that_epsilon_gives(epsilon: float) -> None:
    classes, records = 10, 40_000
    keep = keep_probability(epsilon, classes)
    other = (1 - keep) / (classes - 1)
    assert keep / other == pytest.approx(math.exp(epsilon))
    told = flip(torch.full((records,), 3), classes, epsilon)
    counts = torch.bincount(told, minlength=classes).numpy()
    expected = np.full(classes, other * records)
    expected[3] = keep * records
    assert chisquare(counts, expected).pvalue > FALSE_ALARM


def test_flips_do_not_follow_from_a_seed() -> None:
    labels = torch.zeros(500, dtype=torch.int64)
    told = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        told.append(flip(labels, 10, 0.5))
    assert not torch.equal(*told)


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.inf, math.nan])
def test_a_bad_label_epsilon_is_refused(epsilon: float) -> None:
    with pytest.raises(OptionError, match="label-epsilon is"):
        flip(torch.zeros(3, dtype=torch.int64), 10, epsilon)


def audited_label_epsilon(epsilon: float, classes: int, games: int = 400_000) -> float:
    """Return a lower bound of epsilon: how much likelier a class is told where it is true."""
    true, other = torch.zeros(games, dtype=torch.int64), torch.ones(games, dtype=torch.int64)
    told = [int((flip(labels, classes, epsilon) == 0).sum()) for labels in (true, other)]
    # Clopper and Pearson; both bounds together fail once in a million audits.
    at_least = beta.ppf(5e-7, told[0], games - told[0] + 1)
    at_most = beta.ppf(1 - 5e-7, told[1] + 1, games - told[1])
    return math.log(at_least / at_most)


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_an_audit_of_flipped_labels_finds_the_claim_and_more_when_flipped_too_rarely(
    epsilon: float,
) -> None:
    assert 0.8 * epsilon < audited_label_epsilon(epsilon, 10) <= epsilon
    assert audited_label_epsilon(2 * epsilon, 10) > epsilon

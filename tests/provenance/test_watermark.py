"""Watermarks: what they hold, what they cost, and that nobody else's are found."""

from __future__ import annotations

import copy
import hashlib
import hmac
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch import Tensor, nn
from torch.nn import functional

from flwr_clicooper.errors import EvidenceError
from flwr_clicooper.provenance.keys import PublicIdentity
from flwr_clicooper.provenance.watermark import (
    ACCEPT,
    BITS,
    EVERY,
    STRENGTH,
    WEIGHTS,
    Watermark,
    commitment,
    is_accepted,
    log2_false_positive,
    markable,
    round_key,
    skip_reason,
    too_small,
)

KEY = hashlib.sha256(b"a fixed key for tests").digest()
SIGNER = PublicIdentity(bytes(range(32)))


def key_of(number: int) -> bytes:
    return hashlib.sha256(b"key %d" % number).digest()


def linear() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 192), nn.BatchNorm1d(192), nn.ReLU(), nn.Linear(192, 96), nn.ReLU()
    )


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.BatchNorm2d(64),
    )


def example(module: nn.Sequential, count: int = 64) -> Tensor:
    return (
        torch.randn(count, 64)
        if isinstance(module[0], nn.Linear)
        else torch.randn(16, 8, 6, 6)
    )


def train(module: nn.Sequential, key: bytes, steps: int = 30) -> Watermark:
    """Train one round with momentum and weight decay, as a trainer does."""
    optimizer = torch.optim.SGD(
        module.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    watermark = Watermark(key, module.state_dict())
    watermark.top_up(module)
    for step in range(steps):
        x = example(module)
        out = module(x)
        functional.mse_loss(out, out.detach().roll(1, 0) + x.mean()).backward()
        if step % EVERY == 0:
            watermark.push(module)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    watermark.top_up(module)
    return watermark


def dense(key: bytes, total: int) -> tuple[np.ndarray, np.ndarray]:
    """Return X and b as the module's text says, apart from its code: for all weights."""
    words = hashlib.shake_256(key + b"pick").digest(8 * WEIGHTS)
    chosen = []
    for i in range(WEIGHTS):
        start, stop = i * total // WEIGHTS, (i + 1) * total // WEIGHTS
        low, high = (
            int.from_bytes(words[8 * i + j : 8 * i + j + 4], "little") for j in (0, 4)
        )
        chosen.append((low, i, start + high % (stop - start)))

    def signs(purpose: bytes, count: int) -> list[int]:
        data = hashlib.shake_256(key + purpose).digest(count // 8)
        return [1 if data[i // 8] >> (7 - i % 8) & 1 else -1 for i in range(count)]

    matrix = np.zeros((BITS, total))
    for place, ((_, _, column), sign) in enumerate(
        zip(sorted(chosen), signs(b"proj", WEIGHTS), strict=True)
    ):
        matrix[place // 64, column] = sign / 8.0
    return matrix, np.array(signs(b"bits", BITS))


def flat(module: nn.Module) -> Tensor:
    tensors = dict(module.named_parameters())
    return torch.cat([tensors[name].reshape(-1) for name in markable(tensors)])


# -- keys ------------------------------------------------------------------------------------


def test_a_round_key_is_the_documented_hkdf() -> None:
    secret, chain = bytes(range(40)), bytes(range(100, 132))
    key = round_key(secret, chain, run="17", segment=2, round=5, signer=SIGNER)
    texts = [b"clicooper/wm/v1", b"17", b"2", b"5", SIGNER.digest.hex().encode()]
    info = b"".join(len(t).to_bytes(8, "big") + t for t in texts)
    extracted = hmac.digest(chain, secret, "sha256")
    assert key == hmac.digest(extracted, info + b"\x01", "sha256")
    assert key.hex() == "81191ba31461e95cbbfc93fe8d610406b0083f28fc00b1de0cadb159373f1cbf"
    assert (
        commitment(key) == "aef1215b6365a62155856e303ad99a23dd5dcc784363c231693a9448af2419f9"
    )


def test_each_part_of_a_round_key_counts() -> None:
    other = PublicIdentity(bytes(range(1, 33)))
    keys = {
        round_key(secret, chain, run=run, segment=segment, round=number, signer=signer)
        for secret, chain, run, segment, number, signer in (
            (bytes(32), bytes(32), "1", 1, 1, SIGNER),
            (bytes(33), bytes(31) + b"1", "1", 1, 1, SIGNER),
            (b"1" * 32, bytes(32), "1", 1, 1, SIGNER),
            (bytes(32), bytes(32), "2", 1, 1, SIGNER),
            (bytes(32), bytes(32), "1", 2, 1, SIGNER),
            (bytes(32), bytes(32), "1", 1, 2, SIGNER),
            (bytes(32), bytes(32), "1", 11, 1, SIGNER),
            (bytes(32), bytes(32), "11", 1, 1, SIGNER),
            (bytes(32), bytes(32), "1", 1, 1, other),
        )
    }
    assert len(keys) == 9


@pytest.mark.parametrize(("secret", "chain"), [(31, 32), (32, 31), (0, 32), (32, 33)])
def test_short_secrets_and_other_chains_are_refused(secret: int, chain: int) -> None:
    with pytest.raises(EvidenceError, match="at least 32 bytes and 32"):
        round_key(bytes(secret), bytes(chain), run="1", segment=1, round=1, signer=SIGNER)


# -- setting ---------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [linear, convolutions])
def test_all_bits_hold_after_each_round_and_earlier_ones_are_still_found(make) -> None:
    module = make()
    marks = []
    for number in range(6):
        before = [mark.matches(module.state_dict()) for mark in marks]
        marks.append(train(module, key_of(number)))
        assert marks[-1].matches(module.state_dict()) == BITS
        assert all(matches >= ACCEPT for matches in before)
    assert all(mark.matches(module.state_dict()) >= ACCEPT for mark in marks)


@pytest.mark.parametrize("make", [linear, convolutions])
def test_a_top_up_is_the_least_change(make) -> None:
    module = make()
    old = flat(module).detach().double().numpy()
    matrix, bits = dense(KEY, len(old))
    assert np.allclose(matrix @ matrix.T, np.eye(BITS))
    tau = 1.5 * old[np.abs(matrix).any(axis=0)].std()
    below = bits * (matrix @ old) < tau
    rows = matrix[below]
    gap = 1.02 * tau * bits[below] - rows @ old
    least = rows.T @ np.linalg.solve(rows @ rows.T, gap)

    assert Watermark(KEY, module.state_dict()).top_up(module) == BITS
    new = flat(module).detach().double().numpy()
    assert np.allclose(new - old, least, atol=1e-6)
    assert (bits * (matrix @ new) >= tau * 0.9999).all()


@pytest.mark.parametrize("make", [linear, convolutions])
def test_a_push_is_the_gradient_of_the_hinge(make) -> None:
    module = make()
    weights = flat(module)
    matrix, bits = (torch.from_numpy(x).float() for x in dense(KEY, len(weights)))
    tau = 1.5 * weights[matrix.any(dim=0)].std(correction=0).detach()
    (STRENGTH * functional.relu(tau - bits * (matrix @ weights)).sum()).backward()
    expected = {k: p.grad for k, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()

    watermark = Watermark(KEY, module.state_dict())
    watermark.push(module)
    found = {k: p.grad for k, p in module.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[k], expected[k], atol=1e-7) for k in found)
    first = {k: v.clone() for k, v in found.items()}
    watermark.push(module)
    assert all(torch.allclose(found[k], 2 * first[k]) for k in found)
    for _ in range(8):  # each raises the standard deviation, and the margin with it
        watermark.top_up(module)
    module.zero_grad()
    watermark.push(module)
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_bits_hold_in_other_dtypes(dtype: torch.dtype) -> None:
    module = linear().to(dtype)
    watermark = Watermark(KEY, module.state_dict())
    watermark.push(module)
    assert watermark.top_up(module) == BITS
    assert all(p.dtype == dtype for p in module.parameters())
    assert watermark.matches({k: v.float() for k, v in module.state_dict().items()}) == BITS


def test_weights_in_another_memory_format_get_the_same_marks() -> None:
    module, other = convolutions(), convolutions().to(memory_format=torch.channels_last)
    for each in (module, other):
        watermark = Watermark(KEY, each.state_dict())
        watermark.push(each)
        watermark.top_up(each)
    for one, two in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
        assert (one.grad is None) == (two.grad is None)
        assert one.grad is None or torch.equal(one.grad, two.grad)


def test_weights_that_do_not_learn_stay_as_they_are() -> None:
    module = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 256))
    module[0].requires_grad_(False)
    still = module[0].weight.clone()
    assert skip_reason(module) == ""
    watermark = Watermark(KEY, module.state_dict())
    watermark.push(module)
    assert watermark.top_up(module) == BITS
    assert torch.equal(module[0].weight, still)
    assert module[0].weight.grad is None

    module.requires_grad_(False)
    other = Watermark(key_of(1), module.state_dict())
    with pytest.raises(EvidenceError, match="too few weights that learn"):
        other.top_up(module)


def test_shared_weights_are_marked_under_both_names() -> None:
    module = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128))
    module[2].weight = module[0].weight
    watermark = Watermark(KEY, module.state_dict())
    watermark.push(module)
    assert watermark.top_up(module) == BITS
    assert watermark.matches(module.state_dict()) == BITS


def test_nothing_but_markable_weights_changes() -> None:
    module = convolutions()
    old = {k: v.clone() for k, v in module.state_dict().items()}
    Watermark(KEY, old).top_up(module)
    changed = {k for k, v in module.state_dict().items() if not torch.equal(v, old[k])}
    assert changed == {"0.weight", "3.weight"}


# -- layouts ---------------------------------------------------------------------------------


def test_only_weights_of_layers_are_markable() -> None:
    tensors = {
        "b.weight": torch.zeros(3, 3),
        "a.weight": torch.zeros(3, 3, 3, 3),
        "lstm.weight_ih_l0": torch.zeros(4, 4),
        "norm.weight": torch.zeros(3),
        "b.bias": torch.zeros(3),
        "position": torch.zeros(3, 3),
        "weight.table": torch.zeros(3, 3),
        "codes.weight": torch.zeros(3, 3, dtype=torch.int8),
    }
    assert markable(tensors) == ["a.weight", "b.weight", "lstm.weight_ih_l0"]


def test_too_small_a_segment_is_skipped_with_a_reason() -> None:
    module = nn.Linear(128, 127)
    reason = "16,256 weights of linear layers and convolutions can carry one"
    assert reason in skip_reason(module)
    assert reason in too_small(module.state_dict())
    with pytest.raises(EvidenceError, match="at least 16,384"):
        Watermark(KEY, module.state_dict())
    assert skip_reason(nn.Linear(128, 128)) == ""
    module = nn.Linear(128, 128)
    assert Watermark(KEY, module.state_dict()).top_up(module) == BITS


def test_a_segment_that_hardly_learns_is_skipped_with_a_reason() -> None:
    module = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 70))
    module[0].requires_grad_(False)
    assert skip_reason(module) == "most of the segment's weights do not learn"


def test_names_and_shapes_make_no_pattern() -> None:
    """Two keys choose different weights, signs and bits, in the same layout."""
    one, two = (dense(key_of(i), 2 * WEIGHTS)[0] for i in range(2))
    both = np.abs(one).any(axis=0) & np.abs(two).any(axis=0)
    assert 0.45 < both.sum() / WEIGHTS < 0.55
    assert abs(np.corrcoef(one.sum(axis=0)[both], two.sum(axis=0)[both])[0, 1]) < 0.05


# -- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    module = nn.Linear(128, 128)
    watermark = Watermark(KEY, module.state_dict())
    with torch.no_grad():
        module.weight[3, 5] = value
    for call in (watermark.push, watermark.top_up):
        with pytest.raises(EvidenceError, match="NaN or infinite"):
            call(module)
    with pytest.raises(EvidenceError, match="NaN or infinite"):
        watermark.matches(module.state_dict())


def test_another_layout_is_refused() -> None:
    watermark = Watermark(KEY, nn.Linear(128, 128).state_dict())
    with pytest.raises(EvidenceError, match=r"'weight' is of shape \[129, 128\]"):
        watermark.matches(nn.Linear(128, 129).state_dict())
    with pytest.raises(EvidenceError, match="'weight' is missing"):
        watermark.matches({})
    with pytest.raises(EvidenceError, match="'weight' is missing"):
        watermark.push(nn.Sequential(nn.Linear(128, 128)))


@pytest.mark.parametrize("value", [0.0, 0.5, 1e-42])
def test_weights_that_are_all_the_same_cannot_be_marked(value: float) -> None:
    module = nn.Linear(128, 128)
    nn.init.constant_(module.weight, value)
    watermark = Watermark(KEY, module.state_dict())
    with pytest.raises(EvidenceError, match="all weights are the same"):
        watermark.top_up(module)
    nn.init.zeros_(module.weight)
    assert watermark.matches(module.state_dict()) == 0


def test_weights_of_a_coarse_dtype_are_refused_in_words() -> None:
    module = nn.Linear(128, 128).to(torch.float16)
    with torch.no_grad():
        module.weight.copy_(torch.randint(0, 2, (128, 128)) * 2.0**-24)
    with pytest.raises(EvidenceError, match="too coarse"):
        Watermark(KEY, module.state_dict()).top_up(module)


@pytest.mark.parametrize("length", [0, 31, 33])
def test_keys_of_another_length_are_refused(length: int) -> None:
    with pytest.raises(EvidenceError, match="allowed are 32"):
        Watermark(bytes(length), nn.Linear(128, 128).state_dict())


# -- the same on every machine ---------------------------------------------------------------

VECTOR = """
import hashlib, torch
from torch import nn
from flwr_clicooper.provenance.watermark import Watermark

module = nn.Sequential(nn.Linear(128, 100), nn.Conv2d(10, 20, (5, 9)))
with torch.no_grad():
    for number, weight in enumerate(module.parameters()):
        values = torch.arange(weight.numel()) * (7919 + number) % 65537 - 32768
        weight.copy_(values.double().mul(2.0**-18).reshape(weight.shape))
watermark = Watermark(hashlib.sha256(b"a fixed key for tests").digest(), module.state_dict())

def digest(tensors):
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()

print(watermark.matches(module.state_dict()))
watermark.push(module)
print(digest(p.grad for p in module.parameters() if p.grad is not None))
watermark.top_up(module)
print(digest(module.parameters()))
"""


@pytest.mark.parametrize("threads", ["1", "2"])
def test_results_are_the_same_bits_in_every_process(threads: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", VECTOR],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
        env={"OMP_NUM_THREADS": threads, "MKL_CBWR": "COMPATIBLE" if threads == "2" else ""},
    )
    assert result.stdout.split() == [
        "134",
        "d4c1f9e4fe63683731948b21d276f7491463ba4ec5d92db7e540106c68592a98",
        "9ae175caff5cac052dbc9034bf4bf2a9797f83c2e4ba9e8e9102f14260dcbfd2",
    ]


def test_bits_signs_and_places_of_a_key_are_pinned() -> None:
    """They are what keys that were disclosed long ago are looked up with."""
    matrix, bits = dense(KEY, 2 * WEIGHTS)
    assert bits[:16].tolist() == [1, 1, 1, 1, -1, -1, -1, 1, 1, 1, -1, -1, 1, -1, -1, -1]
    (columns,) = np.nonzero(matrix[0])
    assert columns[:6].tolist() == [16, 481, 547, 881, 1153, 1177]
    assert (matrix[0, columns[:6]] * 8).tolist() == [1.0, -1.0, 1.0, -1.0, 1.0, 1.0]
    module = nn.Linear(128, 256)
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(bits @ matrix).reshape(256, 128))
    assert Watermark(KEY, module.state_dict()).matches(module.state_dict()) == BITS


# -- chance ----------------------------------------------------------------------------------


def test_no_other_key_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    """1,000 keys in 10 marked models: none near the threshold, spread as chance says."""
    module, models = convolutions(), []
    for number in range(10):
        train(module, hashlib.sha256(b"model %d" % number).digest(), steps=3)
        models.append(copy.deepcopy(module.state_dict()))
        nn.init.normal_(module[3].weight, std=0.05)
    marks = (Watermark(key_of(number), models[0]) for number in range(1000))
    found = np.array([[mark.matches(tensors) for tensors in models] for mark in marks])
    with capsys.disabled():
        print(f"\n10,000 comparisons: {found.max()} of {BITS} matches at most", end=" ")
    assert found.max() < ACCEPT - 30
    # Standard errors of mean and variance are 0.08 and 0.9; both within five.
    assert abs(found.mean() - BITS / 2) < 0.4
    assert abs(found.var() - BITS / 4) < 4.5


@pytest.mark.parametrize("matches", [0, 100, 128, 180, 208, 256])
def test_the_bound_is_the_binomial_tail(matches: int) -> None:
    expected = binom.logsf(matches - 1, BITS, 0.5) / math.log(2)
    assert log2_false_positive(matches) == pytest.approx(expected, abs=1e-6)
    assert log2_false_positive(matches, 1024) == pytest.approx(
        min(0.0, expected + 10), abs=1e-6
    )


def test_acceptance() -> None:
    assert log2_false_positive(ACCEPT) < -80
    assert is_accepted(ACCEPT)
    assert not is_accepted(ACCEPT - 1)
    assert is_accepted(ACCEPT, 2**16)
    assert not is_accepted(ACCEPT, 2**20)
    for matches, tests in ((-1, 1), (257, 1), (200, 0)):
        with pytest.raises(EvidenceError, match="allowed are 0 to 256"):
            log2_false_positive(matches, tests)

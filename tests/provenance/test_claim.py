"""Claims: which trainer's watermark of which round does this model carry."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from torch import Tensor, nn

from flwr_clicooper.errors import EvidenceError
from flwr_clicooper.provenance.claim import WatermarkKey, claim
from flwr_clicooper.provenance.watermark import (
    BITS,
    Watermark,
    commitment,
    log2_false_positive,
)


def key_of(segment: int, number: int) -> WatermarkKey:
    key = hashlib.sha256(f"{segment} {number}".encode()).digest()
    return WatermarkKey("17", segment, number, key, commitment(key))


KEYS = [key_of(segment, number) for segment in (1, 2) for number in (1, 2, 3)]


@pytest.fixture(scope="module")
def segments() -> list[nn.Sequential]:
    """A head, and two segments with the marks of two rounds each."""
    torch.manual_seed(0)
    made = [
        nn.Sequential(nn.Linear(28, 128), nn.ReLU()),
        nn.Sequential(nn.Linear(128, 160), nn.BatchNorm1d(160), nn.ReLU()),
        nn.Sequential(nn.Linear(160, 128), nn.ReLU(), nn.Linear(128, 10)),
    ]
    for key in KEYS:
        if key.round < 3:
            module = made[key.segment]
            Watermark(key.key, module.state_dict()).top_up(module)
    return made


def delivered(segments: list[nn.Sequential]) -> dict[str, Tensor]:
    return dict(nn.Sequential(*segments).state_dict())


def test_a_delivered_model_carries_the_marks_of_all_trainers(
    segments: list[nn.Sequential],
) -> None:
    report = claim(delivered(segments), KEYS)
    found = {(each.segment, each.round): each for each in report.findings}
    assert {k for k, each in found.items() if each.accepted} == {
        (1, 1),
        (1, 2),
        (2, 1),
        (2, 2),
    }
    assert [(each.segment, each.round) for each in report.accepted] == [
        (1, 1),
        (1, 2),
        (2, 1),
        (2, 2),
    ]
    assert found[1, 2].matches == found[2, 2].matches == BITS
    assert found[1, 3].matches < 170
    assert found[1, 3].run == "17"
    # Each key is tried on its segment, and on all tensors as those of one segment.
    assert report.tests == 12
    assert found[1, 2].log2_false_positive == log2_false_positive(BITS, 12)


@pytest.mark.parametrize("segment", [1, 2])
def test_a_segment_alone_carries_its_trainers_marks(
    segments: list[nn.Sequential], segment: int
) -> None:
    report = claim(dict(segments[segment].state_dict()), KEYS)
    assert [(each.segment, each.round) for each in report.accepted] == [
        (segment, 1),
        (segment, 2),
    ]


def test_more_suspects_weaken_the_bound(segments: list[nn.Sequential]) -> None:
    one = claim(delivered(segments), KEYS)
    many = claim(delivered(segments), KEYS, suspects=1024)
    assert many.tests == 1024 * one.tests
    for a, b in zip(one.findings, many.findings, strict=True):
        assert b.log2_false_positive == pytest.approx(
            min(0.0, a.log2_false_positive + 10), abs=9
        )
    assert many.findings[1].log2_false_positive == log2_false_positive(BITS, 12 * 1024)


def test_an_unmarked_model_carries_nothing() -> None:
    torch.manual_seed(1)
    report = claim(nn.Sequential(nn.Identity(), nn.Linear(128, 160)).state_dict(), KEYS)
    assert not report.accepted
    assert report.as_dict()["accepted"] is False
    assert all(90 < each.matches < 166 for each in report.findings)


def test_a_suspect_that_is_too_small_is_said_to_be_so() -> None:
    report = claim(nn.Linear(10, 10).state_dict(), KEYS[:2])
    for each in report.findings:
        assert (each.matches, each.accepted) == (0, False)
        assert "100 weights" in each.skipped
    assert claim({}, KEYS).findings[0].skipped


def test_the_report_is_json_without_keys(segments: list[nn.Sequential]) -> None:
    report = claim(delivered(segments), KEYS)
    text = json.dumps(report.as_dict())
    assert json.loads(text)["findings"][0] == {
        "run": "17",
        "segment": 1,
        "round": 1,
        "matches": report.findings[0].matches,
        "bits": BITS,
        "log2_false_positive": report.findings[0].log2_false_positive,
        "accepted": True,
        "skipped": "",
        "aligned": None,
    }
    assert not any(key.key.hex() in text or repr(key.key) in repr(KEYS) for key in KEYS)


def test_a_key_that_was_not_committed_to_is_refused(segments: list[nn.Sequential]) -> None:
    wrong = WatermarkKey("17", 2, 3, bytes(32), KEYS[0].commitment)
    with pytest.raises(EvidenceError, match=r"run 17, segment 2, round 3 is not the one"):
        claim(delivered(segments), [*KEYS, wrong])
    with pytest.raises(EvidenceError, match="committed to before the round"):
        claim(delivered(segments), [WatermarkKey("17", 2, 3, bytes(32), "")])


def test_a_short_key_is_refused(segments: list[nn.Sequential]) -> None:
    short = WatermarkKey("17", 1, 1, b"short", commitment(b"short"))
    with pytest.raises(EvidenceError, match="5 bytes; allowed are 32"):
        claim(delivered(segments), [short])


def test_nothing_to_compare_is_refused(segments: list[nn.Sequential]) -> None:
    for keys, suspects in (([], 1), (KEYS, 0)):
        with pytest.raises(EvidenceError, match="allowed is 1 or more of each"):
            claim(delivered(segments), keys, suspects=suspects)


def test_weights_that_are_not_finite_are_refused(segments: list[nn.Sequential]) -> None:
    tensors = delivered(segments)
    tensors["1.0.weight"] = torch.full_like(tensors["1.0.weight"], torch.nan)
    with pytest.raises(EvidenceError, match="NaN or infinite"):
        claim(tensors, KEYS)

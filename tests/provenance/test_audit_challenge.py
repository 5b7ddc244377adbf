"""The challenge of an audit: what is drawn, for which run, and how it is written."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from flwr_clicooper.errors import EvidenceError
from flwr_clicooper.provenance.audit import AuditReport, Challenge, Outcome, Point
from flwr_clicooper.provenance.evidence import RunEvidence, load_run
from tests.provenance.runs import Attempt, Made, sha

NONCE = sha("nonce of a verifier")


def made(folder: Path, **more: Any) -> RunEvidence:
    """A run of 2 trainers, 2 rounds and 7 steps with states before steps 0, 3, 6 and at 7."""
    options = {"audit-every": 3} | more.pop("options", {})
    Made(folder, options=options, **more)
    return load_run(folder)


ALL = [Point(s, r, step) for s in (1, 2) for r in (1, 2) for step in (0, 3, 6)]


def test_all_points_are_drawn_when_there_are_not_more(tmp_path: Path) -> None:
    run = made(tmp_path)
    for audits in (12, 100):
        challenge = Challenge.draw(run, audits)
        assert list(challenge.points) == ALL
        assert (challenge.every, challenge.steps, challenge.run) == (3, 7, "7")
        assert (challenge.root, challenge.size) == (run.log.root().hex(), len(run.lines))


def test_the_points_follow_from_nonce_and_log_alone(tmp_path: Path) -> None:
    run = made(tmp_path / "a")
    first, again = (Challenge.of_nonce(run, 5, NONCE) for _ in range(2))
    assert first == again
    assert len(set(first.points)) == 5
    others = {Challenge.of_nonce(run, 5, sha(i)).points for i in range(20)}
    assert len(others) > 10


def test_every_point_is_as_likely_as_any_other(tmp_path: Path) -> None:
    run = made(tmp_path)
    drawn = Counter(
        point for i in range(600) for point in Challenge.of_nonce(run, 2, sha(i)).points
    )
    assert set(drawn) == set(ALL)
    assert all(60 < count < 145 for count in drawn.values())  # 100 expected


def test_the_first_point_is_the_documented_one(tmp_path: Path) -> None:
    import hashlib

    run = made(tmp_path)
    challenge = Challenge.of_nonce(run, 1, NONCE)
    texts = ("clicooper/audit/v1", NONCE, run.log.root().hex(), "0")
    data = b"".join(len(t).to_bytes(8, "big") + t.encode() for t in texts)
    number = int.from_bytes(hashlib.sha256(data).digest(), "big") % 12
    statements = [it.statement for it in run.rounds if it.statement.kind == "round"]
    it = statements[number // 3]
    assert challenge.points == (Point(it.segment, it.round, number % 3 * 3),)


def test_a_new_nonce_comes_from_the_operating_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made(tmp_path)
    assert Challenge.draw(run, 1).nonce != Challenge.draw(run, 1).nonce
    monkeypatch.setattr(os, "urandom", lambda count: bytes(range(count)))
    assert Challenge.draw(run, 1).nonce == bytes(range(32)).hex()


def test_it_is_read_as_it_was_written_and_in_no_other_way(tmp_path: Path) -> None:
    challenge = Challenge.draw(made(tmp_path), 4)
    data = challenge.to_bytes()
    assert Challenge.parse(data) == challenge
    assert data == json.dumps(json.loads(data), sort_keys=True, separators=(",", ":")).encode()
    for wrong in (b" " + data, data + b"\n", data.replace(b'"run":', b'"run" :'), b"{}", b"x"):
        with pytest.raises(EvidenceError):
            Challenge.parse(wrong)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("audits", 0),
        ("audits", 3),  # fewer than points
        ("audits", 10**9),
        ("every", 0),
        ("every", 2),  # no point is at step 3
        ("steps", 3),
        ("nonce", "00"),
        ("root", ""),
        ("run", ""),
        ("size", 0),
        ("points", []),
        ("points", [{"round": 1, "segment": 1, "step": 0}] * 2),
        (
            "points",
            [{"round": 2, "segment": 1, "step": 0}, {"round": 1, "segment": 1, "step": 0}],
        ),
        ("points", [{"round": 1, "segment": 1, "step": -3}]),
        ("points", [{"round": 1, "segment": 1, "step": 0, "more": 1}]),
        ("more", 1),
    ],
)
def test_a_field_that_is_off_is_refused(field: str, value: Any, tmp_path: Path) -> None:
    found = json.loads(Challenge.of_nonce(made(tmp_path), 12, NONCE).to_bytes())
    found[field] = value
    data = json.dumps(found, sort_keys=True, separators=(",", ":")).encode()
    with pytest.raises(EvidenceError):
        Challenge.parse(data)


def test_a_challenge_is_for_one_run_and_its_points_are_those_of_its_nonce(
    tmp_path: Path,
) -> None:
    run = made(tmp_path / "a")
    challenge = Challenge.of_nonce(run, 3, NONCE)
    challenge.check(run)
    other = made(tmp_path / "b", rounds=3)
    with pytest.raises(EvidenceError, match="not for this one"):
        challenge.check(other)
    chosen = [Point(1, 1, 0), Point(1, 1, 3), Point(1, 1, 6)]
    found = json.loads(challenge.to_bytes())
    found["points"] = [vars(it) for it in chosen]
    picked = Challenge.parse(json.dumps(found, sort_keys=True, separators=(",", ":")).encode())
    with pytest.raises(EvidenceError, match="not those that its nonce gives"):
        picked.check(run)


def test_rounds_of_all_attempts_are_drawn_each_once(tmp_path: Path) -> None:
    attempts = (
        Attempt(),
        Attempt("7", 1, ("trainer 2",)),
        Attempt("8", 1, ("owner", "relay")),
    )
    run = made(tmp_path, attempts=attempts, rounds=3)
    points = Challenge.draw(run, 100).points
    assert list(points) == [
        Point(s, r, i) for s in (1, 2) for r in (1, 2, 3) for i in (0, 3, 6)
    ]


def test_a_run_without_states_cannot_be_audited(tmp_path: Path) -> None:
    with pytest.raises(EvidenceError, match="audit-every = 0"):
        Challenge.draw(made(tmp_path, options={"audit-every": 0}), 3)


def test_a_huge_run_costs_no_more_than_its_audits(tmp_path: Path) -> None:
    run = made(tmp_path, options={"batch-size": 1, "audit-every": 1}, rounds=5)
    assert len(Challenge.draw(run, 300).points) == 300


def test_until_ends_with_the_round(tmp_path: Path) -> None:
    challenge = Challenge.draw(made(tmp_path), 12)
    assert [challenge.until(Point(1, 1, step)) for step in (0, 3, 6)] == [3, 6, 7]


def test_a_report_holds_only_when_every_point_was_repeated_and_passed(tmp_path: Path) -> None:
    challenge = Challenge.draw(made(tmp_path), 2)
    good = [
        Outcome(it.segment, it.round, it.step, challenge.until(it), True, "fine")
        for it in challenge.points
    ]
    bad = Outcome(1, 1, 0, 3, False, "off", "It means something.")
    assert AuditReport(challenge, tuple(good)).ok
    assert not AuditReport(challenge, tuple(good[:1])).ok
    report = AuditReport(challenge, (good[0], bad))
    assert not report.ok
    assert report.failed == (bad,)
    found = json.loads(json.dumps(report.as_json()))
    assert found["ok"] is False
    assert found["outcomes"][1]["meaning"] == "It means something."
    assert (
        Challenge.parse(
            json.dumps(found["challenge"], sort_keys=True, separators=(",", ":")).encode()
        )
        == challenge
    )

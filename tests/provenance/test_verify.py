"""Verifying a run: what holds passes, and what is absent is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from flwr_clicooper.chain import delivered
from flwr_clicooper.chain.rundir import FILES
from flwr_clicooper.provenance import checking, watermark
from flwr_clicooper.provenance.attestation import RoundMark
from flwr_clicooper.provenance.check_files import COVERED
from flwr_clicooper.provenance.model_file import EMPTY, segment_digests
from flwr_clicooper.provenance.verify import RULES, verify_run
from tests.provenance.runs import Attempt, Made, unchecked

AFTER = (Attempt(), Attempt("7", 1, ("trainer 2",)))
RESUMED = (Attempt(), Attempt("8", 1, ("owner", "trainer 1", "trainer 2", "relay")))

WITH_OWNER = {
    "disclosed keys",
    "watermarks in the model",
    "model file",
    "segments of the model",
}


@pytest.mark.parametrize("rounds", range(1, 6))
@pytest.mark.parametrize("trainers", range(1, 5))
def test_a_run_as_the_relay_has_it_passes(tmp_path: Path, trainers: int, rounds: int) -> None:
    made = Made(tmp_path / "7", trainers, rounds)
    report = verify_run(made.folder, made.trust)
    assert (report.ok, report.run, unchecked(report)) == (True, "7", WITH_OWNER)


@pytest.mark.parametrize(
    "options",
    [
        {"release": "interactive"},
        {"release": "interactive", "label-side": "owner"},
        {"release": "interactive", "epsilon": 2.0},
        {"release": "local-dp", "epsilon": 2.0, "label-side": "owner"},
        {"release": "central-dp", "epsilon": 2.0},
        {"schedule": "local"},
        {"audit-every": 3},
    ],
)
@pytest.mark.parametrize("trainers", [1, 3])
@pytest.mark.parametrize("attempts", [(Attempt(),), AFTER, RESUMED])
def test_whatever_crosses_the_cuts(tmp_path: Path, trainers: int, options, attempts) -> None:
    made = Made(tmp_path / "7", trainers, 3, attempts, options)
    report = verify_run(made.folder, made.trust)
    assert report.ok, report.failed
    assert unchecked(report) == WITH_OWNER


@pytest.mark.parametrize(
    "attempts",
    [
        (Attempt(), Attempt("7", 0)),  # nothing was closed before the retry
        (Attempt(), Attempt("7", 2), Attempt("7", 2, ("trainer 1",))),
        (*AFTER, Attempt("8", 2, ("owner", "relay")), Attempt("8", 3, ("trainer 1",))),
        (Attempt("6"), Attempt("7", 1), Attempt("8", 2)),
        (Attempt(), Attempt("7", 4, ("trainer 2",))),  # only the delivery was missing
    ],
)
def test_hand_overs_retries_and_resumed_runs(tmp_path: Path, attempts) -> None:
    made = Made(tmp_path / "7", 2, 4, attempts)
    report = verify_run(made.folder, made.trust)
    assert report.ok, report.failed
    assert report.run == attempts[-1].run


def test_everything_is_checked_where_everything_is(tmp_path: Path) -> None:
    made = Made(tmp_path / "7", 2, 2, model=True)
    report = verify_run(made.folder, made.trust)
    assert {check.outcome for check in report.checks} == {"passed"}
    assert len({check.name for check in report.checks}) == len(report.checks) == len(RULES) + 2
    moved = made.folder.rename(tmp_path / "relay")
    (moved / "model.safetensors").rename(tmp_path / "m")
    report = verify_run(moved, made.trust, tmp_path / "m")
    assert (report.ok, unchecked(report)) == (True, set())


def test_without_a_trust_file_or_watermarks(tmp_path: Path) -> None:
    made = Made(tmp_path / "7", options={"watermark": False})
    report = verify_run(made.folder)
    assert report.ok
    assert unchecked(report) - WITH_OWNER == {"trusted keys", "watermark keys", "watermarks"}
    why = {check.name: check.what for check in report.checks}
    assert "--trust" in why["trusted keys"]


def test_a_segment_too_small_for_a_watermark_is_named(tmp_path: Path) -> None:
    def none_in_2(name: str, it: Any) -> Any:
        if name == "delivery":
            return replace(it, watermarks=it.watermarks[:1])
        if name.endswith(".2"):
            return replace(it, watermark=RoundMark(0, "", 0, "too few weights"))
        return it

    report = verify_run(Made(tmp_path / "7", alter=none_in_2).folder)
    assert report.ok, report.failed
    why = {check.name: check.what for check in report.checks}
    assert "segment 2 has none: too few weights" in why["watermark keys"]


def test_a_run_that_ended_early_is_not_delivered_and_otherwise_checked(tmp_path: Path) -> None:
    made = Made(tmp_path / "7", rounds=3, delivered=False)
    del made.lines[-2:], made.names[-2:]  # round 3 was not closed
    made.close()
    report = verify_run(made.folder, made.trust)
    (check,) = report.failed
    assert check.name == "delivery"
    assert check.what == "not delivered: the evidence ends after round 2 of 3"
    absent = {"owner's streams", "watermarks", "countersignatures", "privacy as delivered"}
    assert unchecked(report) == WITH_OWNER | absent


def test_the_digest_of_a_segment_is_that_of_the_delivered_model(tmp_path: Path) -> None:
    kinds = ("float32", "float16", "bfloat16", "float64", "int64", "int8", "uint8", "bool")
    segment = {
        f"{name}{kind}": torch.ones(3, i).to(getattr(torch, kind))
        for i, kind in enumerate(kinds)
        for name in ("weight", "a.b", 'é"\n', "10.", "9.")
    }
    whole = {f"{s}.{k}": v.clone() for s in (0, 1, 10) for k, v in segment.items()}
    path = tmp_path / "m.safetensors"
    path.write_bytes(save(whole, {"format": "x"}))
    assert segment_digests(path) == dict.fromkeys((0, 1, 10), delivered.digest(segment))
    assert delivered.digest({}) == EMPTY


def test_names_that_are_kept_twice_to_stay_light_agree() -> None:
    assert (checking.BITS, checking.ACCEPT) == (watermark.BITS, watermark.ACCEPT)
    assert COVERED == FILES

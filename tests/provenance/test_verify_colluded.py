"""One thing is off, its party signed it, and all that follows was built on it.

So signatures, chains and log agree, and exactly the check that is for this thing must fail.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from flwr_clicooper.provenance.attestation import Job, OwnerStream, RoundMark, TreeHead
from flwr_clicooper.provenance.keys import Identity
from flwr_clicooper.provenance.log import leaf_hash
from flwr_clicooper.provenance.verify import verify_run
from tests.provenance.runs import Attempt, Made, failed, sha

STRANGER = Identity.new()
TWICE = {"attempts": (Attempt(), Attempt("7", 1, ("trainer 2",)))}
RESUMED = {"attempts": (Attempt(), Attempt("8", 1, ("owner", "relay")))}
STEP = {"options": {"release": "interactive"}}
TAIL = {"options": {"label-side": "owner"}}
UNMARKED = {"options": {"watermark": False}}
AUDITED = {"options": {"audit-every": 1}}
Alter = Callable[[str, Any], Any]


@dataclass
class Off:
    """What is off, which checks fail and no other, and how the run is made."""

    what: str
    fails: set[str]
    alter: Alter = lambda _, it: it
    made: dict[str, Any] = field(default_factory=dict)


def at(name: str, **values: Any) -> Alter:
    """Change fields of one statement; a function gets the statement."""

    def alter(here: str, it: Any) -> Any:
        if here != name:
            return it
        return replace(it, **{k: v(it) if callable(v) else v for k, v in values.items()})

    return alter


def root(name: str, stream: str, value: str = "") -> Alter:
    """Change one stream of a round, or take it away."""

    def roots(it: Any) -> dict[str, str]:
        rest = {k: v for k, v in it.roots.items() if k != stream}
        return {**rest, stream: value} if value else rest

    return at(name, roots=roots)


def mark(name: str, **values: Any) -> Alter:
    """Change the watermark of a round."""
    return at(name, watermark=lambda it: replace(it.watermark, **values))


def found(**values: Any) -> Alter:
    """Change the watermark that the owner found in segment 1."""

    def watermarks(it: Any) -> list[Any]:
        return [replace(it.watermarks[0], **values), *it.watermarks[1:]]

    return at("delivery", watermarks=watermarks)


def swapped(it: Job) -> list[Any]:
    one, two = it.parties[1].key, it.parties[2].key
    owner, first, second, relay = it.parties
    return [owner, replace(first, key=two), replace(second, key=one), relay]


def silent(name: str, it: Any) -> Any:
    """Leave out segment 1's watermarks, without a word."""
    if name == "delivery":
        return replace(it, watermarks=it.watermarks[1:])
    return replace(it, watermark=RoundMark(0, "", 0, "")) if name.endswith(".1") else it


def only_job(it: Any) -> TreeHead:
    """The log when it had one line."""
    return TreeHead(leaf_hash(bytes.fromhex(it.job)).hex(), 1)


def key_of_round_1(name: str, it: Any) -> Any:
    key = hashlib.sha256(b"1/1/1").digest()  # as `Made.key` makes it
    return mark("round 1.1", commitment=hashlib.sha256(key).hexdigest())(name, it)


X = sha("x")
INVENTED = OwnerStream(1, X, 1, "gradients-in")
JOBS = [
    Off("goes on from nothing", {"jobs", "complete"}, at("job 1", after=1)),
    Off("resumes from the first", {"jobs"}, at("job 1", resumes="6")),
    Off("another attempt before", {"jobs"}, at("job 2", previous=X), TWICE),
    Off("an attempt left out", {"jobs"}, at("job 2", attempt=3), TWICE),
    Off("resumes nothing", {"jobs"}, at("job 2", resumes=""), RESUMED),
    Off("resumes another run", {"jobs"}, at("job 2", resumes="6"), RESUMED),
    Off("a retry that resumes", {"jobs"}, at("job 2", resumes="7"), TWICE),
    Off("another task", {"jobs"}, at("job 1", task={"task.lr": 9.9}), TWICE),
    Off("other cuts", {"jobs"}, at("job 2", cuts=[["int8[2]"]]), TWICE),
    Off("other initial weights", {"jobs"},
        at("job 2", initial=lambda it: [X, *it.initial[1:]]), TWICE),
    Off("fewer records", {"jobs"}, at("job 1", records=99), TWICE),
    Off("fewer rounds", {"jobs"}, at("job 1", rounds=1), TWICE),
    Off("options changed", {"jobs"},
        at("job 1", options=lambda it: {**it.options, "seed": 3}), TWICE),
    Off("privacy was another", {"privacy as agreed"}, at("job 1", subject=X), TWICE),
    Off("keys swapped", {"signatures", "countersignatures"}, at("job 1", parties=swapped)),
]  # fmt: skip
ROUNDS = [
    Off("of another run", {"complete"}, at("round 1.1", run="6")),
    Off("a start of another run", {"complete"}, at("start 1.2", run="6")),
    Off("a start of another round", {"complete"}, at("start 1.2", round=1)),
    Off("a start that follows", {"chain in time"}, at("start 1.1", previous=X)),
    Off("a start after nothing", {"chain in time"}, at("start 2.2", previous=""), TWICE),
    Off("other weights", {"chain in time"}, at("start 2.1", subject=X), TWICE),
    Off("not the initial weights", {"chain in time"}, at("start 1.1", subject=X)),
    Off("another past", {"chain in time"}, at("round 2.1", previous=X)),
    Off("another predecessor", {"chain of segments"}, at("round 1.2", predecessor=X)),
    Off("a step less", {"steps and records"}, at("round 1.2", steps=6)),
    Off("a record less", {"steps and records"}, at("round 2.1", records=99)),
]  # fmt: skip
STREAMS = [
    Off("made-up outputs", {"streams"}, root("round 1.1", "activations-out", X)),
    Off("made-up inputs", {"streams"}, root("round 1.2", "activations-in", X)),
    Off("made-up gradients", {"streams"}, root("round 2.2", "gradients-out", X)),
    Off("changed gradients", {"streams"}, root("round 2.1", "gradients-in", X)),
    Off("no states", {"streams"}, root("round 2.1", "states"), AUDITED),
    Off("a stream too many", {"streams"}, root("round 2.1", "labels-in", X)),
    Off("no data", {"streams", "owner's streams"}, root("round 2.1", "activations-in")),
    Off("other data", {"owner's streams"}, root("round 2.1", "activations-in", X)),
    Off("other labels", {"owner's streams"}, root("round 2.2", "labels-in", X)),
    Off("data of a step", {"owner's streams"}, root("round 1.1", "activations-in", X), STEP),
    Off("labels of a step", {"owner's streams"}, root("round 1.2", "labels-in", X), STEP),
    Off("gradients to head", {"owner's streams"}, root("round 1.1", "gradients-out", X), STEP),
    Off("outputs to tail", {"owner's streams"}, root("round 2.2", "activations-out", X), TAIL),
    Off("gradients of tail", {"owner's streams"}, root("round 2.2", "gradients-in", X), TAIL),
    Off("a missing stream of the owner", {"owner's streams"},
        at("delivery", streams=lambda it: it.streams[1:])),
    Off("an invented stream of the owner", {"owner's streams"},
        at("delivery", streams=lambda it: [*it.streams, INVENTED])),
]  # fmt: skip
HEADS = [
    Off("a fork", {"tree heads"}, at("round 2.1", log=TreeHead(X, 5))),
    Off("a fork at the end", {"tree heads"}, at("delivery", log=TreeHead(X, 7))),
    Off("a log of the future", {"tree heads"}, at("round 2.1", log=TreeHead(X, 6))),
    Off("a log that lags", {"tree heads"}, at("delivery", log=lambda it: TreeHead(X, 1))),
    Off("a log without the start", {"tree heads", "watermark keys"},
        at("round 1.2", log=only_job)),
]  # fmt: skip
MARKS = [
    Off("too few bits match", {"watermarks"}, mark("round 1.1", matches=207)),
    Off("half a mark", {"watermarks"}, mark("round 1.1", bits=128, matches=128)),
    Off("another mark than found", {"watermarks"}, mark("round 2.1", matches=255)),
    Off("another key than found", {"watermarks"}, mark("round 1.1", commitment=X)),
    Off("nothing committed", {"watermark keys"}, mark("start 1.1", commitment="")),
    Off("a key twice", {"watermark keys", "watermarks"}, key_of_round_1),
    Off("a key after the end", {"watermark keys"}, mark("round 2.1", commitment=X)),
    Off("a key not asked for", {"watermark keys"}, mark("start 1.1", commitment=X), UNMARKED),
    Off("no word why", {"watermark keys"}, silent),
    Off("a key without a mark", {"watermark keys"},
        mark("round 1.1", bits=0, matches=0, skipped="no time")),
    Off("not found", {"watermarks"},
        at("delivery", watermarks=lambda it: it.watermarks[1:])),
    Off("found by another key", {"watermarks"}, found(commitment=X)),
    Off("found by fewer bits", {"watermarks"}, found(matches=255)),
    Off("found with more bits", {"watermarks"}, found(bits=257)),
    Off("found of another round", {"watermarks"}, found(round=1)),
    Off("found in nobody's segment", {"watermarks"}, found(segment=3)),
]  # fmt: skip
DELIVERY = [
    Off("of another run", {"delivery"}, at("delivery", run="6")),
    Off("of another job", {"delivery"}, at("delivery", job=X)),
    Off("too early", {"delivery"}, at("delivery", rounds=1)),
    Off("a trainer left out", {"delivery"},
        at("delivery", attestations=lambda it: it.attestations[:1])),
    Off("trainers swapped", {"delivery"},
        at("delivery", attestations=lambda it: it.attestations[::-1])),
    Off("another statement", {"delivery"},
        at("delivery", attestations=lambda it: [it.attestations[0], X])),
    Off("other privacy", {"privacy as delivered"}, at("delivery", privacy=X)),
]  # fmt: skip


@pytest.mark.parametrize(
    "off", [*JOBS, *ROUNDS, *STREAMS, *HEADS, *MARKS, *DELIVERY], ids=lambda off: off.what
)
def test_exactly_its_check_fails(tmp_path: Path, off: Off) -> None:
    made = Made(tmp_path / "7", alter=off.alter, **off.made)
    assert failed(verify_run(made.folder, made.trust)) == off.fails


# -- who signs -----------------------------------------------------------------------------


def signers(name: str, change: Callable[[list[Identity]], list[Identity]]) -> dict[str, Any]:
    return {"signers": lambda here, them: change(them) if here == name else them}


@pytest.mark.parametrize(
    ("name", "change", "fails"),
    [
        *(
            ("job 1", lambda them, i=i: them[:i] + them[i + 1 :], {"agreement"})
            for i in range(4)  # the owner, two trainers and the relay
        ),
        ("job 1", lambda them: [*them, STRANGER], {"agreement"}),
        ("job 1", lambda them: [*them[:-1], STRANGER], {"agreement"}),
        ("start 1.1", lambda _: [STRANGER], {"signatures"}),
        ("round 1.2", lambda _: [STRANGER], {"signatures"}),
        ("round 1.2", lambda them: [*them, STRANGER], {"signatures"}),
        ("round 2.2", lambda them: [*them, STRANGER], {"signatures", "countersignatures"}),
        ("counter 1", lambda _: [], {"countersignatures"}),
        ("counter 2", lambda _: [STRANGER], {"signatures", "countersignatures"}),
        ("delivery", lambda _: [STRANGER], {"delivery"}),
        ("delivery", lambda them: [*them, STRANGER], {"delivery"}),
    ],
)
def test_who_signs(tmp_path: Path, name: str, change: Any, fails: set[str]) -> None:
    made = Made(tmp_path / "7", **signers(name, change))
    assert failed(verify_run(made.folder, made.trust)) == fails


@pytest.mark.parametrize("name", ["round 1.1", "start 1.1"])
def test_the_owner_or_another_trainer_cannot_sign_for_a_trainer(tmp_path: Path, name) -> None:
    good = Made(tmp_path / "7")
    for party in ("owner", "trainer 2", "relay"):
        other = good.parties[party]
        made = Made(good.folder, **signers(name, lambda _, it=other: [it]))
        assert failed(verify_run(made.folder, made.trust)) == {"signatures"}
        if party == "owner":  # not even beside the trainer, before the last round
            made = Made(good.folder, **signers(name, lambda them, it=other: [*them, it]))
            assert failed(verify_run(made.folder, made.trust)) == {"signatures"}


# -- the model -----------------------------------------------------------------------------


def test_a_model_without_the_marks(tmp_path: Path) -> None:
    made = Made(tmp_path / "7", model=True, marked=False)
    assert failed(verify_run(made.folder, made.trust)) == {"watermarks in the model"}


def test_a_model_with_a_segment_that_nobody_signed(tmp_path: Path) -> None:
    made = Made(tmp_path / "7", 1, model=True, unsigned=1)
    report = verify_run(made.folder, made.trust)
    assert failed(report) == {"segments of the model"}
    assert report.failed[0].what == "nobody signed segment 2 of the model"
    # With label-side = "owner" it may be the owner's tail.
    made = Made(tmp_path / "7", 1, model=True, unsigned=1, **TAIL)
    assert verify_run(made.folder, made.trust).ok


def test_a_segment_that_its_trainer_did_not_sign(tmp_path: Path) -> None:
    made = Made(tmp_path / "7", model=True, alter=at("round 2.2", subject=X))
    assert failed(verify_run(made.folder, made.trust)) == {"segments of the model"}


def test_another_model_delivered(tmp_path: Path) -> None:
    made = Made(tmp_path / "7", model=True, alter=at("delivery", subject=X))
    assert failed(verify_run(made.folder, made.trust)) == {"model file"}

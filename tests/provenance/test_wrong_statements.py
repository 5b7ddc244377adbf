"""Statements that are refused: one test per way to be wrong."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from flwr_clicooper.errors import EvidenceError
from flwr_clicooper.provenance.attestation import (
    JobParty,
    RoundMark,
    Statement,
    TreeHead,
    parse_statement,
)
from flwr_clicooper.provenance.fields import MAX_INTEGER, MAX_TEXT
from flwr_clicooper.provenance.log import EMPTY
from tests.provenance.signed import (
    BETA,
    DELIVERY,
    HEAD,
    JOB,
    ROUND,
    STATEMENTS,
    STRANGER,
    A,
    D,
    changed,
)


@pytest.mark.parametrize("statement", STATEMENTS, ids=lambda it: type(it).__name__)
def test_each_field_is_needed_and_no_other(statement: Statement) -> None:
    payload = statement.payload()
    found = json.loads(payload)
    places = [*found, *(f"predicate.{name}" for name in found["predicate"])]
    for name, value in found["predicate"].items():
        if isinstance(value, dict) and name not in ("options", "task", "roots", "metrics"):
            places += [f"predicate.{name}.{inner}" for inner in value]
    for place in places:
        with pytest.raises(EvidenceError, match=f"'{place.split('.')[-1]}' is missing"):
            parse_statement(changed(payload, place, None))
    for place in ("more", "predicate.more", "subject.0.more", "subject.0.digest.more"):
        with pytest.raises(EvidenceError, match="'more' is unknown; allowed are"):
            parse_statement(changed(payload, place, 1))


DIGEST = "64 lower-case hex digits"
DIGESTS = [A[1:], A + "a", A.upper(), A[:-1] + "g", A[:-1] + "\n", "", 7, [A]]
COUNTS = [-1, True, 1.0, "1", MAX_INTEGER + 1, [1]]
TEXTS = [7, "", "a\nb", "\x1b[2J", "a" * (MAX_TEXT + 1), ["a"]]
TIMES = [
    "2026-05-01T12:00:00+00:00",
    "2026-05-01T12:00:00",
    "2026-05-01 12:00:00Z",
    "2026-05-01T12:00:00.5Z",
    "2026-05-01T12:00:00z",
    "2026-13-01T12:00:00Z",
    "2026-05-01T25:00:00Z",
    "2026-05-01",
    "20260501T120000Z",
    "\uff12026-05-01T12:00:00Z",
    7,
]


def ways(place: str, values: list[Any], message: str) -> list[tuple[str, Any, str]]:
    return [(place, value, message) for value in values]


def refused(statement: Statement, place: str, value: Any, message: str) -> None:
    with pytest.raises(EvidenceError, match=message) as caught:
        parse_statement(changed(statement.payload(), place, value))
    text = str(caught.value)
    assert len(text) < 400
    assert A not in text
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("_type", "https://in-toto.io/Statement/v0.1", "'_type'"),
        ("predicateType", "urn:flwr-clicooper:round:v2", "the type of a statement"),
        ("predicateType", "urn:flwr-clicooper:delivery:v1", "a delivery: field"),
        ("predicateType", ["urn:flwr-clicooper:round:v1"], "the type of a statement"),
        ("predicate", [], "a round's statement .* a JSON object"),
        ("subject", [], "its subject .* a list of at least 1"),
        ("subject", {}, "its subject .* a list of at least 1"),
        ("subject.0", "segment-2", "its subject.* a JSON object"),
        ("subject.0.name", "segment-1", "its subject .* allowed is segment-2"),
        ("subject.0.name", "", "its subject"),
        ("subject.0.digest", {"sha512": A}, "'sha256' is missing|'sha512' is unknown"),
        ("subject.1", {"digest": {"sha256": A}, "name": "segment-2"}, "is segment-2"),
        *ways("subject.0.digest.sha256", DIGESTS, DIGEST),
        *ways("predicate.run", TEXTS, "'run' .* text"),
        *ways("predicate.job", DIGESTS, f"'job' .* {DIGEST}"),
        *ways("predicate.kind", ["", "rounds", 7, ["round"]], "'kind' .* start or round"),
        *ways("predicate.segment", [0, *COUNTS], "'segment' .* an integer from 1"),
        *ways("predicate.round", COUNTS, "'round' .* an integer from 0"),
        *ways("predicate.previous", [A[1:], A.upper(), 7], f"'previous' .* {DIGEST}, or ''"),
        *ways("predicate.predecessor", [A[1:], 7], f"'predecessor' .* {DIGEST}, or ''"),
        *ways("predicate.roots", [[], "a", 7], "'roots' .* an object"),
        ("predicate.roots.hidden-in", A, "a name in .*'roots' .* activations-in or"),
        *ways("predicate.roots.states", DIGESTS, f"'states' .* {DIGEST}"),
        *ways("predicate.steps", COUNTS, "'steps' .* an integer from 0"),
        *ways("predicate.records", COUNTS, "'records' .* an integer from 0"),
        *ways("predicate.bytes", COUNTS, "'bytes' .* an integer from 0"),
        *ways(
            "predicate.seconds",
            [-1, -0.5, True, "1", MAX_INTEGER + 1],
            "'seconds' .* a finite number from 0",
        ),
        *ways("predicate.log", [7, [], A], "'log' .* a JSON object"),
        *ways("predicate.log.root", [A[1:], 7], f"'root' .* {DIGEST}"),
        *ways("predicate.log.size", COUNTS, "'size' .* an integer from 0"),
        ("predicate.log.size", 0, "only size 0 has no root"),
        ("predicate.log.root", "", "only size 0 has no root"),
        ("predicate.log", {"root": "", "size": 0}, "before a round, the log is not empty"),
        *ways("predicate.watermark", [7, []], "'watermark' .* a JSON object"),
        *ways("predicate.watermark.bits", [2**20, *COUNTS], "'bits' .* an integer"),
        *ways("predicate.watermark.matches", COUNTS, "'matches' .* an integer"),
        ("predicate.watermark.matches", 257, "more bits match than there are"),
        *ways("predicate.watermark.commitment", [A[1:], 7], f"'commitment' .* {DIGEST}"),
        *ways("predicate.watermark.skipped", ["a\nb", 7], "'skipped' .* printable text"),
        ("predicate.watermark.skipped", "too small", "with bits is not skipped"),
        *ways("predicate.time", TIMES, "'time' .* a time in UTC"),
        *ways("predicate.versions", [[], 7], "'versions' .* a JSON object"),
        ("predicate.versions.numpy", "2.4", "'numpy' is unknown"),
        *ways("predicate.versions.torch", TEXTS, "'torch' .* text"),
        ("predicate.round", 0, "a round is from 1"),
        ("predicate.previous", "", "a round has a statement before it"),
        ("predicate.predecessor", "", "only segment 1 and a start"),
        ("predicate.kind", "start", "only segment 1 and a start"),
    ],
)
def test_a_wrong_round_is_refused(place: str, value: Any, message: str) -> None:
    refused(ROUND, place, value, message)


START = replace(
    ROUND,
    kind="start",
    predecessor="",
    roots={},
    steps=0,
    records=0,
    watermark=RoundMark(0, D, 0, ""),
)


def test_a_start_has_done_nothing() -> None:
    assert parse_statement(START.payload()) == START
    for field, value in (
        ("roots", {"states": A}),
        ("steps", 1),
        ("records", 1),
        ("watermark", RoundMark(256, "", 256, "")),
    ):
        with pytest.raises(EvidenceError, match="nothing was done before a start"):
            replace(START, **{field: value})
    with pytest.raises(EvidenceError, match="only segment 1 and a start"):
        replace(START, predecessor=A)
    with pytest.raises(EvidenceError, match="only segment 1 and a start"):
        replace(ROUND, subject=A, segment=1)


FOURTH = {"key": str(STRANGER.public), "role": "trainer", "stage": 3}


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("subject.0.name", "segment-1", "allowed is privacy.json"),
        *ways("predicate.run", TEXTS, "'run' .* text"),
        *ways("predicate.attempt", [0, *COUNTS], "'attempt' .* an integer from 1"),
        ("predicate.attempt", 1, "only attempt 1 is the first"),
        ("predicate.previous", "", "only attempt 1 is the first"),
        *ways("predicate.previous", [A[1:], 7], "'previous'"),
        *ways("predicate.after", COUNTS, "'after' .* an integer from 0"),
        ("predicate.after", 6, "goes on after its last round"),
        *ways("predicate.resumes", ["a\nb", 7], "'resumes' .* printable text"),
        *ways("predicate.rounds", [0, *COUNTS], "'rounds' .* an integer from 1"),
        *ways("predicate.records", [0, *COUNTS], "'records' .* an integer from 1"),
        *ways("predicate.options", [[], 7, "a"], "'options' .* an object"),
        *ways("predicate.task", [[], 7, "a"], "'task' .* an object"),
        ("predicate.task", {"n": MAX_INTEGER + 1}, "'task' .* at most 64 bits"),
        ("predicate.cuts", {}, "'cuts' .* a list"),
        ("predicate.cuts", ["float32"], r"'cuts'\[0\] .* a list"),
        ("predicate.cuts", [[7]], r"'cuts'\[0\]\[0\] .* text"),
        *ways("predicate.nonce", DIGESTS, f"'nonce' .* {DIGEST}"),
        ("predicate.parties", {}, "'parties' .* a list of at least 3"),
        ("predicate.parties", [], "'parties' .* a list of at least 3"),
        ("predicate.parties.1", "trainer", r"'parties'\[1\] .* a JSON object"),
        ("predicate.parties.1.name", "acme", "'name' is unknown"),
        ("predicate.parties.1.role", "verifier", "'role' .* owner or trainer or relay"),
        ("predicate.parties.1.role", "owner", "its parties are not owner, trainers 1 to N"),
        *ways("predicate.parties.1.stage", COUNTS, "'stage' .* an integer from 0"),
        ("predicate.parties.1.stage", 2, "its parties are not owner, trainers 1 to N"),
        ("predicate.parties.0.stage", 1, "its parties are not owner, trainers 1 to N"),
        ("predicate.parties.4", FOURTH, "its parties are not owner, trainers 1 to N"),
        *ways(
            "predicate.parties.1.key", ["", "ed25519:A", 7], "'key': a text is not a public"
        ),
        ("predicate.parties.1.key", str(BETA.public), "two parties have the same key"),
    ],
)
def test_a_wrong_job_is_refused(place: str, value: Any, message: str) -> None:
    refused(JOB, place, value, message)


def test_options_are_whatever_json_can_hold_but_not_deep() -> None:
    deep: Any = {}
    for _ in range(14):
        deep = {"a": deep}
    assert replace(JOB, options=deep, task={"b": [None, "\n", -1.5, [[]]]}).options == deep
    for wrong in ({"a": {"a": {"a": deep}}}, {"a": [[deep]]}):
        with pytest.raises(EvidenceError, match=r"'options' .* at most 16 levels"):
            replace(JOB, options=wrong)
    for wrong in ({"a": math.nan}, {"a": object()}):
        with pytest.raises(EvidenceError, match="what JSON can hold"):
            replace(JOB, options=wrong)
    with pytest.raises(EvidenceError, match="whose names are text"):
        replace(JOB, options={"a": {1: 2}})


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("subject.0.name", "model", "allowed is model.safetensors"),
        *ways("predicate.rounds", [0, *COUNTS], "'rounds' .* an integer from 1"),
        *ways("predicate.job", DIGESTS, f"'job' .* {DIGEST}"),
        *ways("predicate.privacy", DIGESTS, f"'privacy' .* {DIGEST}"),
        ("predicate.attestations", [], "'attestations' .* a list of at least 1"),
        ("predicate.attestations", A, "'attestations' .* a list"),
        *ways("predicate.attestations.1", DIGESTS, rf"'attestations'\[1\] .* {DIGEST}"),
        ("predicate.log", {"root": "", "size": 0}, "before a delivery, the log is not empty"),
        *ways("predicate.metrics", [[], 7], "'metrics' .* an object"),
        *ways("predicate.metrics.loss", ["1", True, [1]], "'loss' .* a finite number"),
        ("predicate.metrics.a\x1bb", 1, "a name in .*'metrics' .* printable text"),
        ("predicate.watermarks", {}, "'watermarks' .* a list"),
        *ways("predicate.watermarks.0.bits", [0, *COUNTS], "'bits' .* an integer from 1"),
        ("predicate.watermarks.0.matches", 257, "more bits match than there are"),
        *ways("predicate.watermarks.0.commitment", DIGESTS, f"'commitment' .* {DIGEST}"),
        *ways("predicate.watermarks.0.round", [0, *COUNTS], "'round' .* an integer from 1"),
        *ways("predicate.watermarks.0.segment", [0, *COUNTS], "'segment' .* integer from 1"),
        ("predicate.watermarks.0.segment", 2, "a watermark is listed twice"),
        ("predicate.streams", {}, "'streams' .* a list"),
        *ways("predicate.streams.0.release", COUNTS, "'release' .* an integer from 0"),
        *ways("predicate.streams.0.root", DIGESTS, f"'root' .* {DIGEST}"),
        *ways("predicate.streams.0.segment", [0, *COUNTS], "'segment' .* an integer from 1"),
        *ways(
            "predicate.streams.0.stream", ["", "hidden", 7], "'stream' .* activations-in or"
        ),
        ("predicate.streams.0", {**vars(DELIVERY.streams[1])}, "a stream is listed twice"),
        *ways("predicate.time", TIMES, "'time' .* a time in UTC"),
        ("predicate.versions.numpy", "2.4", "'numpy' is unknown"),
    ],
)
def test_a_wrong_delivery_is_refused(place: str, value: Any, message: str) -> None:
    refused(DELIVERY, place, value, message)


def test_metrics_that_are_no_numbers_are_refused() -> None:
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(EvidenceError, match=r"'loss' .* a finite number"):
            replace(DELIVERY, metrics={"loss": value})
    assert replace(DELIVERY, metrics={"loss": -1e300}).metrics == {"loss": -1e300}


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("subject.0.name", "tree", "allowed is log, a.json, run.toml"),
        ("subject", [], "its subject .* at least 1"),
        *ways("subject.1.digest.sha256", DIGESTS, DIGEST),
        *ways("subject.1.name", ["../a", "a/b", "a\\b", ".a", ".."], "without a folder"),
        ("subject.1.name", "z.json", "its subject .* allowed is log, run.toml, z.json"),
        ("subject.1.name", "run.toml", "its subject .* allowed is log, run.toml"),
        ("subject.1.name", "log", "a file is named 'log'"),
        *ways("predicate.size", [0, *COUNTS], "'size' .* an integer from 1"),
        *ways("predicate.time", TIMES, "'time' .* a time in UTC"),
        *ways("predicate.run", TEXTS, "'run' .* text"),
    ],
)
def test_a_wrong_tree_head_is_refused(place: str, value: Any, message: str) -> None:
    refused(HEAD, place, value, message)


def test_what_cannot_be_read_cannot_be_made_either() -> None:
    for make in (
        lambda: replace(ROUND, steps=True),
        lambda: replace(ROUND, roots={"states": "x"}),
        lambda: replace(ROUND, log="x"),
        lambda: JobParty("trainer", 1, "ed25519:x"),
        lambda: TreeHead(EMPTY.hex(), 0),
        lambda: replace(DELIVERY, attestations="abc"),
        lambda: replace(HEAD, files={"../x": A}),
    ):
        with pytest.raises(EvidenceError):
            make()

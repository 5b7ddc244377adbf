"""Statements: what they hold, and their one spelling."""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flwr_clicooper.errors import EvidenceError
from flwr_clicooper.provenance.attestation import (
    Delivery,
    Job,
    LogHead,
    RoundMark,
    RoundStatement,
    TreeHead,
    canonical,
    now,
    parse_statement,
    versions,
)
from flwr_clicooper.provenance.dsse import Envelope
from flwr_clicooper.provenance.fields import MAX_STATEMENT
from flwr_clicooper.provenance.replies import ReplyStatement
from tests.provenance.signed import (
    ACME,
    BETA,
    DELIVERY,
    HEAD,
    JOB,
    OWNER,
    RELAY,
    ROUND,
    STATEMENTS,
    TIME,
    VERSIONS,
    A,
    B,
    C,
    D,
)


@pytest.mark.parametrize("statement", STATEMENTS, ids=lambda it: type(it).__name__)
def test_a_statement_and_its_bytes(statement: Any) -> None:
    payload = statement.payload()
    assert parse_statement(payload) == type(statement).parse(payload) == statement
    assert parse_statement(payload).payload() == payload
    found = json.loads(payload)
    assert sorted(found) == ["_type", "predicate", "predicateType", "subject"]
    assert found["_type"] == "https://in-toto.io/Statement/v1"


def test_the_bytes_are_those_of_the_page() -> None:
    expected = {
        "_type": "https://in-toto.io/Statement/v1",
        "predicate": {
            "bytes": 1000000,
            "job": B,
            "kind": "round",
            "log": {"root": "e" * 64, "size": 7},
            "predecessor": D,
            "previous": C,
            "records": 2560,
            "roots": {"activations-in": A, "gradients-out": "e" * 64},
            "round": 3,
            "run": "1234",
            "seconds": 1.25,
            "segment": 2,
            "steps": 10,
            "time": TIME,
            "versions": VERSIONS,
            "watermark": {"bits": 256, "commitment": D, "matches": 255, "skipped": ""},
        },
        "predicateType": "urn:flwr-clicooper:round:v1",
        "subject": [{"digest": {"sha256": A}, "name": "segment-2"}],
    }
    assert ROUND.payload() == json.dumps(expected, separators=(",", ":")).encode()


def test_subjects_are_named_as_the_page_says() -> None:
    assert JOB.subjects() == [("privacy.json", A)]
    assert DELIVERY.subjects() == [("model.safetensors", A)]
    assert HEAD.subjects() == [("log", HEAD.root), ("a.json", B), ("run.toml", A)]
    assert LogHead(A, "1", 1, TIME).subjects() == [("log", A)]
    assert HEAD.head == TreeHead(HEAD.root, 20)


def test_the_parties_of_a_job() -> None:
    assert JOB.trainers == 2
    found = [JOB.party("owner"), JOB.party("trainer", 1), JOB.party("trainer", 2)]
    assert found == [OWNER.public, ACME.public, BETA.public]
    assert JOB.party("relay", 0) == RELAY.public
    for role, stage in (("trainer", 3), ("trainer", 0), ("owner", 1), ("boss", 0)):
        with pytest.raises(EvidenceError, match=f"no {role} {stage}; it has 2 trainers"):
            JOB.party(role, stage)


def test_the_chain_binds_a_key_to_what_was_before() -> None:
    text = b"".join((64).to_bytes(8, "big") + it.encode() for it in (B, C, A, A))
    assert ROUND.chain() == hashlib.sha256(text).digest()
    start = RoundStatement(
        A, "1", B, "start", 1, 0, "", "", {}, 0, 0, 0, 0, TreeHead("", 0),
        RoundMark(0, C, 0, ""), TIME, VERSIONS,
    )  # fmt: skip
    empty = bytes(8)
    parts = (text[:72], empty, text[144:216], empty)
    assert start.chain() == hashlib.sha256(b"".join(parts)).digest()
    others = [
        replace(ROUND, job=A),
        replace(ROUND, previous=A),
        replace(ROUND, subject=C),
        replace(ROUND, roots={}),
    ]
    assert len({it.chain() for it in (ROUND, *others)}) == 5
    assert replace(ROUND, seconds=2).chain() == ROUND.chain()


def test_what_this_machine_says() -> None:
    found = versions("torch")
    assert sorted(found) == ["flwr-clicooper", "python", "torch"]
    assert replace(ROUND, time=now(), versions=found).time.endswith("Z")


def test_lists_become_tuples_and_records_are_frozen() -> None:
    made = replace(JOB, cuts=[["a"], ["b"]], parties=list(JOB.parties))
    assert made.cuts == (("a",), ("b",))
    assert made.parties == JOB.parties
    with pytest.raises(AttributeError):
        made.run = "2"


# -- canonical JSON ------------------------------------------------------------------------


def test_canonical_json() -> None:
    value = {"b": [1, 2.0, 1e-05, True, None], "a": 'é\n\u2028"', "Z": {}}
    text = '{"Z":{},"a":"é\\n\u2028\\"","b":[1,2.0,1e-05,true,null]}'
    assert canonical(value) == text.encode()


@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, -math.inf, {"a": [math.nan]}, b"", {1, 2}, "\ud800", object()],
)
def test_what_json_cannot_hold_is_refused(value: Any) -> None:
    with pytest.raises(EvidenceError, match="what JSON can hold"):
        canonical(value)


def test_a_value_that_holds_itself_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(EvidenceError, match="what JSON can hold"):
        canonical(endless)


PAYLOAD = ROUND.payload()


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"9" * 100_000, "not JSON"),
        (b"[]", "a JSON object"),
        (PAYLOAD.decode().encode("utf-16"), "not JSON"),
        (b"\xef\xbb\xbf" + PAYLOAD, "not JSON"),
        (PAYLOAD + b"\n", "spelling .* canonical JSON"),
        (PAYLOAD.replace(b":", b": ", 1), "spelling"),
        (PAYLOAD.replace(b"1.25", b"1.250"), "spelling"),
        (PAYLOAD.replace(b"1.25", b"125e-2"), "spelling"),
        (PAYLOAD.replace(b'"steps":10', b'"steps":1e1'), "spelling"),
        (PAYLOAD.replace(b'"steps":10', b'"steps":-0'), "spelling"),
        (PAYLOAD.replace(b"1.25", b"NaN"), "JSON can hold"),
        (PAYLOAD.replace(b"1.25", b"1e999"), "JSON can hold"),
        (PAYLOAD.replace(b"round:v1", b"round\\u003av1"), "spelling"),
        (PAYLOAD.replace(b'"steps":10', b'"steps":9,"steps":10'), "spelling"),
        (json.dumps(json.loads(PAYLOAD)).encode(), "spelling"),
        (b" " * (MAX_STATEMENT + 1), "a statement is too large"),
    ],
)
def test_only_canonical_json_is_a_statement(payload: bytes, message: str) -> None:
    assert payload != PAYLOAD
    for read in (parse_statement, RoundStatement.parse):
        with pytest.raises(EvidenceError, match=message):
            read(payload)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 8 * len(PAYLOAD) - 1))
def test_a_changed_bit_never_breaks_the_reader(bit: int) -> None:
    data = bytearray(PAYLOAD)
    data[bit // 8] ^= 1 << bit % 8
    try:
        found = parse_statement(bytes(data))
    except EvidenceError:
        return
    assert found.payload() == bytes(data)  # whatever is read, it was written so
    assert found != ROUND


# -- all together ---------------------------------------------------------------------------


def test_one_type_is_not_read_as_another() -> None:
    for cls in (Job, Delivery, LogHead, ReplyStatement):
        with pytest.raises(EvidenceError, match=f"the type of a statement .* {cls.TYPE}"):
            cls.parse(PAYLOAD)
    reply = ReplyStatement(
        outputs={"arrays": A}, inputs={}, message="train", node="1", previous="", run="1",
        time=TIME, versions={"flwr": "1", "flwr-clicooper": "1", "python": "3"},
    )  # fmt: skip
    with pytest.raises(EvidenceError, match="the type of a statement"):
        parse_statement(reply.payload())


def test_the_fields_are_those_of_the_page() -> None:
    page = (Path(__file__).parents[2] / "docs" / "attestation.md").read_text()
    for cls in (Job, RoundStatement, Delivery, ReplyStatement):
        section = page.split(f"`{cls.TYPE}`", 1)[1].split("\n## ", 1)[0]
        rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
        names = {name.strip(" `") for row in rows for name in row.split(",")}
        own = {it.name for it in fields(cls) if "subject" not in it.metadata}
        assert own <= names, cls


def test_a_long_run_is_read_in_no_time() -> None:
    lines = [
        Envelope.sign(replace(ROUND, round=i).payload(), ACME).to_json() for i in range(1, 401)
    ]
    began = time.process_time()
    found = [parse_statement(Envelope.from_json(line).verify(ACME.public)) for line in lines]
    assert time.process_time() - began < 0.6  # 0.1 s on an idle core
    assert [it.round for it in found] == list(range(1, 401))

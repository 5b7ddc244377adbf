"""Statements to begin with, and how to change them, for the tests of provenance."""

from __future__ import annotations

import json
from typing import Any

from flwr_clicooper.provenance.attestation import (
    Delivery,
    FoundMark,
    Job,
    JobParty,
    LogHead,
    OwnerStream,
    RoundMark,
    RoundStatement,
    TreeHead,
    canonical,
)
from flwr_clicooper.provenance.keys import Identity

OWNER, ACME, BETA, RELAY, STRANGER = (Identity.new() for _ in range(5))
A, B, C, D, E = (letter * 64 for letter in "abcde")
TIME = "2026-05-01T12:00:00Z"
VERSIONS = {"flwr-clicooper": "0.1.0", "python": "3.11.7", "torch": "2.13.0"}

JOB = Job(
    subject=A,
    run="1234",
    attempt=2,
    after=1,
    previous=B,
    resumes="",
    rounds=5,
    records=60_000,
    options={"release": "clean", "clip": 1.5, "delta": 1e-05, "seal": True, "batch-size": 256},
    task={"widths": [64, 32], "name": "Modèle"},
    cuts=(("float32[64]",), ("float32[32]", "float32[8]")),
    initial=(A, B),
    nonce=C,
    parties=(
        JobParty("owner", 0, OWNER.public),
        JobParty("trainer", 1, ACME.public),
        JobParty("trainer", 2, BETA.public),
        JobParty("relay", 0, RELAY.public),
    ),
)
ROUND = RoundStatement(
    subject=A,
    run="1234",
    job=B,
    kind="round",
    segment=2,
    round=3,
    previous=C,
    predecessor=D,
    roots={"activations-in": A, "gradients-out": E},
    steps=10,
    records=2560,
    seconds=1.25,
    bytes=1_000_000,
    log=TreeHead(E, 7),
    watermark=RoundMark(bits=256, commitment=D, matches=255, skipped=""),
    time=TIME,
    versions=VERSIONS,
)
DELIVERY = Delivery(
    subject=A,
    run="1234",
    job=B,
    rounds=5,
    attestations=(C, D),
    log=TreeHead(E, 20),
    privacy=A,
    metrics={"accuracy": 0.91, "loss": 1},
    watermarks=(FoundMark(256, D, 256, 5, 1), FoundMark(256, E, 250, 5, 2)),
    streams=(OwnerStream(0, A, 1, "activations-out"), OwnerStream(0, B, 2, "labels-out")),
    time=TIME,
    versions=VERSIONS,
)
HEAD = LogHead(root=E, run="1234", size=20, time=TIME, files={"run.toml": A, "a.json": B})
STATEMENTS = (JOB, ROUND, DELIVERY, HEAD)


def changed(payload: bytes, place: str, value: Any) -> bytes:
    """Return a statement with another value in a place such as ``predicate.log.size``.

    `None` takes the field out; the place after the last of a list adds to it.
    """
    statement = json.loads(payload)
    *path, last = [int(it) if it.isdigit() else it for it in place.split(".")]
    parent = statement
    for step in path:
        parent = parent[step]
    if value is None:
        del parent[last]
    elif isinstance(parent, list) and last == len(parent):
        parent.append(value)
    else:
        parent[last] = value
    return canonical(statement)

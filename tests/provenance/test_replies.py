"""The file of a client's statements: one chain, whatever happens to it."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flwr_clicooper.errors import EvidenceError, StateError
from flwr_clicooper.provenance.dsse import MAX_ENVELOPE, Envelope
from flwr_clicooper.provenance.keys import Identity
from flwr_clicooper.provenance.replies import ReplyFile, ReplyStatement, verify_replies
from tests.provenance.signed import ACME, BETA, OWNER, TIME, A, B, C, changed

REPLY = ReplyStatement(
    outputs={"arrays": A, "state": B},
    inputs={"arrays": C},
    message="train",
    node="101",
    previous="",
    run="1234",
    time=TIME,
    versions={"flwr": "1.41.0", "flwr-clicooper": "0.1.0", "python": "3.11.7"},
)


def add(path: Path, identity: Identity = ACME, **fields: Any) -> Envelope:
    return ReplyFile(path, identity).append(
        lambda previous: replace(REPLY, previous=previous, **fields)
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    for number in range(3):
        add(tmp_path / "replies.jsonl", run=str(number))
    return tmp_path / "replies.jsonl"


def test_each_statement_has_the_digest_of_the_one_before(path: Path) -> None:
    found = verify_replies(path, ACME.public)
    assert [it.run for it in found] == ["0", "1", "2"]
    envelopes = [Envelope.from_json(line) for line in path.read_text().splitlines()]
    assert [it.previous for it in found] == ["", envelopes[0].digest, envelopes[1].digest]
    last = add(path)
    assert path.read_text().endswith(last.to_json() + "\n")
    assert verify_replies(path, ACME.public)[-1].previous == envelopes[2].digest


def test_a_file_begins_empty(tmp_path: Path) -> None:
    path = tmp_path / "replies.jsonl"
    ReplyFile(path, ACME).check()
    assert verify_replies(path, ACME.public) == []
    assert ReplyStatement.parse(add(path).verify(ACME.public)) == REPLY


def test_a_long_line_is_continued_too(tmp_path: Path) -> None:
    """Longer than what is read at once."""
    path = tmp_path / "replies.jsonl"
    many = {f"{'layer' * 50}.{i}": A for i in range(1000)}
    for _ in range(3):
        add(path, outputs=many)
        add(path)
    assert len(verify_replies(path, ACME.public)) == 6


# -- damage --------------------------------------------------------------------------------


def test_a_changed_line_is_named(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        for place in range(20, len(line) - 20, len(line) // 23):
            wrong = bytearray(line)
            wrong[place] ^= 1
            path.write_bytes(b"".join([*lines[: number - 1], wrong, *lines[number:]]))
            with pytest.raises(EvidenceError, match=f"line {number}: "):
                verify_replies(path, ACME.public)


@pytest.mark.parametrize(
    ("order", "number"),
    [((1, 2), 1), ((0, 2), 2), ((1, 0, 2), 1), ((0, 2, 1), 2), ((0, 0, 1, 2), 2)],
)
def test_a_missing_moved_or_repeated_line_is_named(
    path: Path, order: tuple[int, ...], number: int
) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[i] for i in order))
    with pytest.raises(EvidenceError, match=f"line {number}: it does not follow the line"):
        verify_replies(path, ACME.public)


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (b"{", "is cut off"),
        (b"{\n", "not JSON"),
        (b"\n", "not JSON"),
        (b"\xff\n", "not text"),
        (b'{"payload"' * MAX_ENVELOPE, "cut off"),
        (b'{"payload"' * MAX_ENVELOPE + b"\n", "cut off|too large"),
    ],
)
def test_a_damaged_end_is_refused_and_stays_as_it_is(
    path: Path, end: bytes, message: str
) -> None:
    path.write_bytes(path.read_bytes() + end)
    before = path.read_bytes()
    for use in (lambda: add(path), ReplyFile(path, ACME).check):
        with pytest.raises(EvidenceError, match=f"the last line of .* {message}"):
            use()
    with pytest.raises(EvidenceError, match=f"line 4: .*({message})"):
        verify_replies(path, ACME.public)
    assert path.read_bytes() == before


def test_a_line_that_was_cut_off_says_how_to_go_on(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    with pytest.raises(EvidenceError, match="remove what there is of it to go on"):
        add(path)
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]))
    add(path)
    assert len(verify_replies(path, ACME.public)) == 3


def test_a_file_is_of_one_identity(path: Path) -> None:
    with pytest.raises(EvidenceError, match=r"the last line of .* lacks the signature"):
        add(path, BETA)
    with pytest.raises(EvidenceError, match=r"line 1: .* lacks the signature"):
        verify_replies(path, BETA.public)
    first, *rest = path.read_text().splitlines()
    more = Envelope.from_json(first).countersigned(OWNER)
    path.write_text("\n".join([more.to_json(), *rest, ""]))
    with pytest.raises(EvidenceError, match=r"line 1: .* must not sign it"):
        verify_replies(path, ACME.public)


def test_a_file_that_cannot_be_used(path: Path, tmp_path: Path) -> None:
    with pytest.raises(StateError, match="cannot be opened"):
        add(tmp_path)
    with pytest.raises(StateError, match="cannot be opened"):
        ReplyFile(tmp_path / "none" / "replies.jsonl", ACME).check()
    with pytest.raises(StateError, match="cannot be read"):
        verify_replies(tmp_path / "none.jsonl", ACME.public)


@pytest.mark.parametrize("fails", ["write", "fsync"])
def test_what_the_disk_did_not_take_is_not_there(
    path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    before, write = path.read_bytes(), os.write

    def half(handle: int, data: bytes) -> int:
        return write(handle, data[:100])

    def never(handle: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, fails, half if fails == "write" else never)
    with pytest.raises(StateError, match="cannot be written"):
        add(path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    add(path)
    assert len(verify_replies(path, ACME.public)) == 4


# -- at the same time ----------------------------------------------------------------------


def test_threads_do_not_fork_the_chain(path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: add(path, run=str(number)), range(40)))
    found = verify_replies(path, ACME.public)
    assert sorted(it.run for it in found[3:]) == sorted(map(str, range(40)))


SCRIPT = """
import sys
from pathlib import Path
from flwr_clicooper.provenance.attestation import now
from flwr_clicooper.provenance.keys import Identity
from flwr_clicooper.provenance.replies import ReplyFile, ReplyStatement

file = ReplyFile(Path(sys.argv[1]), Identity.load(Path(sys.argv[2])))
for number in range(20):
    file.append(lambda previous: ReplyStatement(
        {"arrays": "a" * 64}, {}, "train", sys.argv[3], previous, str(number), now(),
        {"flwr": "1", "flwr-clicooper": "1", "python": "3"}))
"""


def test_processes_do_not_fork_the_chain(path: Path, tmp_path: Path) -> None:
    ACME.save(tmp_path / "key.pem")
    commands = [
        [sys.executable, "-c", SCRIPT, str(path), str(tmp_path / "key.pem"), str(node)]
        for node in range(3)
    ]
    running = [subprocess.Popen(command) for command in commands]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    found = verify_replies(path, ACME.public)[3:]
    assert len(found) == 60
    for node in "012":
        runs = [it.run for it in found if it.node == node]
        assert runs == [str(number) for number in range(20)]


# -- the statement -------------------------------------------------------------------------


def test_a_reply_s_statement() -> None:
    payload = REPLY.payload()
    assert ReplyStatement.parse(payload) == REPLY
    assert REPLY.subjects() == [("arrays", A), ("state", B)]


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("subject", [], "its subject .* at least 1"),
        ("subject.0.digest.sha256", "x", "64 lower-case hex digits"),
        ("subject.0.name", "z", "its subject .* allowed is state, z"),
        ("subject.0.name", "state", "its subject .* allowed is state"),
        ("predicate.inputs", [], "'inputs' .* an object"),
        ("predicate.inputs.arrays", "x", "'arrays' .* 64 lower-case hex digits"),
        ("predicate.message", "", "'message' .* text"),
        ("predicate.node", 101, "'node' .* text"),
        ("predicate.previous", "x", "'previous' .* 64 lower-case hex digits"),
        ("predicate.run", 7, "'run' .* text"),
        ("predicate.time", "now", "'time' .* a time in UTC"),
        ("predicate.versions.torch", "2", "'torch' is unknown"),
        ("predicate.outputs", {}, "'outputs' is unknown"),
        ("predicate.node", None, "'node' is missing"),
    ],
)
def test_a_wrong_statement_is_refused(place: str, value: Any, message: str) -> None:
    with pytest.raises(EvidenceError, match=message):
        ReplyStatement.parse(changed(REPLY.payload(), place, value))
    with pytest.raises(EvidenceError, match="a reply without records"):
        replace(REPLY, outputs={})

"""Checks of the log, of the files that statements name, and of the delivered model."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

from flwr_clicooper.errors import EvidenceError
from flwr_clicooper.provenance.attestation import LogHead, TreeHead
from flwr_clicooper.provenance.check_statements import last_of
from flwr_clicooper.provenance.checking import Case, NotChecked, Note, Problem
from flwr_clicooper.provenance.evidence import LINES_FILE, LOG_FILE, Line, read_bytes
from flwr_clicooper.provenance.fields import canonical_digest
from flwr_clicooper.provenance.model_file import EMPTY, file_digest, segment_digests

RUN_FILE, METRICS_FILE, PRIVACY_FILE = "run.toml", "metrics.jsonl", "privacy.json"
COVERED = (RUN_FILE, METRICS_FILE, PRIVACY_FILE)
"""The files whose digests ``log.json`` has."""

MAX_SETTINGS = 2**24
"""Bytes in a file of settings at most."""

Found = Iterator[Problem]


# -- the log -------------------------------------------------------------------------------


def logged(case: Case) -> Found:
    """Compare the lines with the tree head that the last attempt's relay signed."""
    head, run = _head(case), case.run
    size = head.statement.size
    if size != len(run.lines):
        yield Problem(f"the head is over {size} lines; there are {len(run.lines)}", LOG_FILE)
    elif head.statement.root != run.log.root().hex():
        yield Problem("the root is not that of the lines", LOG_FILE)
    job = case.job.statement
    if head.statement.run != job.run:
        yield Problem(f"it is of run {head.statement.run!r}", LOG_FILE)
    try:
        head.envelope.verify(job.party("relay"))
    except EvidenceError as error:
        yield Problem(str(error), LOG_FILE)


def heads(case: Case) -> Found:
    """Compare the tree heads that statements quote with the log at that size."""
    run = case.run
    for lines in run.segments.values():
        for before, line in zip((None, *lines), lines, strict=False):
            seen = line.statement.log
            if before is not None and seen.size <= before.index:  # so it never shrinks, too
                yield Problem("it saw a log without the segment's last statement", line.where)
            yield from _unless_of_log(case, line, seen, line.index)
    for delivery in run.deliveries:
        seen = delivery.statement.log
        if seen.size != delivery.index:
            yield Problem("the owner did not see all lines before it", delivery.where)
        yield from _unless_of_log(case, delivery, seen, delivery.index)


def _unless_of_log(case: Case, line: Line[Any], seen: TreeHead, most: int) -> Found:
    if seen.size > most:
        yield Problem("it quotes a tree head over lines that come after it", line.where)
    elif seen.size and seen.root != case.run.log.root(seen.size).hex():
        yield Problem(f"the log with {seen.size} lines that it saw was another", line.where)


# -- files ---------------------------------------------------------------------------------


def covered(case: Case) -> Found:
    """Compare the folder's files with the digests that the relay signed at the end."""
    digests = _head(case).statement.files
    if wrong := sorted(set(digests) ^ set(COVERED)):
        yield Problem(f"it must cover {', '.join(COVERED)}: not so for {wrong[0]!r}", LOG_FILE)
    for name in sorted(set(digests) & set(COVERED)):
        try:
            if file_digest(case.folder / name) != digests[name]:
                yield Problem("the file is not the one that the relay signed", name)
        except OSError:
            yield Problem("the file is missing or cannot be read", name)


def configured(case: Case) -> Found:
    """Compare run.toml with the terms that all parties agreed on."""
    job = case.job.statement
    try:
        found = tomllib.loads(read_bytes(case.folder / RUN_FILE, MAX_SETTINGS).decode())
    except (EvidenceError, ValueError, RecursionError):
        yield Problem("it is missing, or not TOML", RUN_FILE)
        return
    run, options = found.get("run"), found.get("options")
    if not isinstance(run, dict) or not isinstance(options, dict):
        yield Problem("it has no run or no options", RUN_FILE)
        return
    if run.get("id") != job.run:
        yield Problem("it is of another run", RUN_FILE)
    for name, value in {**job.options, **job.task, "num-rounds": job.rounds}.items():
        if name not in options or not _same(options[name], value):
            yield Problem(f"option {name!r} is not what was agreed on", RUN_FILE)


def _same(one: object, other: object) -> bool:
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def privacy_agreed(case: Case) -> Found:
    """Compare privacy.json with what all parties signed at set-up."""
    _, digest = case.job, _privacy(case)
    for job in case.run.jobs:
        if isinstance(digest, Problem):
            yield digest
        elif job.statement.subject != digest:
            yield Problem("privacy.json is not what was agreed on", job.where)


def privacy_delivered(case: Case) -> Found:
    """Compare privacy.json with what the owner signed at the end."""
    delivery, digest = case.delivery, _privacy(case)
    if isinstance(digest, Problem):
        yield digest
    elif delivery.statement.privacy != digest:
        yield Problem("privacy.json is not what the owner signed", delivery.where)


def _privacy(case: Case) -> str | Problem:
    """Return the digest of the privacy statement."""
    try:
        data = read_bytes(case.folder / PRIVACY_FILE, MAX_SETTINGS)
        value = json.loads(data.decode(), object_pairs_hook=_object)
        return canonical_digest(value)
    except (EvidenceError, ValueError, RecursionError):
        return Problem("it is missing, or not JSON", PRIVACY_FILE)


def _object(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
    """Return a JSON object; one name twice would show people what is not signed."""
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a name occurs twice")
    return found


# -- the model -----------------------------------------------------------------------------


def delivered_file(case: Case) -> Found:
    """Compare the model's file with the digest in the delivery."""
    path, delivery = case.model, case.delivery
    try:
        if file_digest(path) != delivery.statement.subject:
            yield Problem("the file is not the one that the delivery names", path.name)
    except OSError:
        yield Problem("the file cannot be read", path.name)


def delivered_segments(case: Case) -> Iterator[Problem | Note]:
    """Compare the model's segments with what trainers signed last; find unsigned ones."""
    path, job = case.model, case.job.statement
    try:
        found = segment_digests(path)
    except EvidenceError as error:
        yield Problem(str(error), path.name)
        return
    for segment in range(1, job.trainers + 1):
        last = last_of(case.run, segment)
        if last is None or last.statement.subject != found.pop(segment, EMPTY):
            where = last.where if last else LINES_FILE
            yield Problem(f"segment {segment} of the model is another than was signed", where)
    own = {0, job.trainers + 1} if job.options.get("label-side") == "owner" else {0}
    for segment in sorted(set(found) - own):
        yield Problem(f"nobody signed segment {segment} of the model", path.name)
    yield Note("the owner's own segments are signed by the delivery alone")


def _head(case: Case) -> Line[LogHead]:
    if case.run.head is None:
        raise NotChecked(f"{LOG_FILE} cannot be read")
    return case.run.head

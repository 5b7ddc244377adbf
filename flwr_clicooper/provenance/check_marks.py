"""Checks of watermarks: keys committed to in time, and marks that are where they should be."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from itertools import pairwise
from os.path import lexists

from flwr_clicooper.errors import EvidenceError
from flwr_clicooper.provenance.attestation import FoundMark, RoundStatement
from flwr_clicooper.provenance.checking import ACCEPT, BITS, Case, NotChecked, Note, Problem
from flwr_clicooper.provenance.dsse import MAX_ENVELOPE
from flwr_clicooper.provenance.evidence import (
    KEYS_FILE,
    DisclosedKeys,
    Line,
    RunEvidence,
    read_bytes,
)
from flwr_clicooper.provenance.model_file import open_regular

_NONE = "no segment has a watermark of the last round"

Pair = tuple[Line[RoundStatement], Line[RoundStatement]]
"""A segment's statement, and the one before it, which commits to its key."""


def committed(case: Case) -> Iterator[Problem | Note]:
    """Find watermarks whose key was not committed to and logged before their round."""
    wanted = case.job.statement.options.get("watermark") is True
    rounds, seen = case.job.statement.rounds, set[str]()
    skipped: dict[str, str] = {}
    for lines in case.run.segments.values():
        for line in lines:
            mark = line.statement.watermark
            if mark.commitment in seen:
                yield Problem("it commits to a key that was committed to before", line.where)
            seen |= {mark.commitment} - {""}
            if mark.commitment and line.statement.round == rounds:
                yield Problem("it commits to a key after the last round", line.where)
            if mark.commitment and not wanted:
                yield Problem("it commits to a key; the job is without watermark", line.where)
    for line, before in _rounds(case.run):
        mark = line.statement.watermark
        if what := _uncommitted(line, before, wanted):
            yield Problem(what, line.where)
        elif not mark.bits:
            skipped[f"segment {line.statement.segment}"] = mark.skipped
    without = [f"{who} has none: {why}" for who, why in skipped.items()]
    if not wanted:
        raise NotChecked("the job is without watermark")
    if not seen:
        raise NotChecked("; ".join(without) or "no key was committed to")
    yield from map(Note, without)


def _uncommitted(
    line: Line[RoundStatement], before: Line[RoundStatement], wanted: bool
) -> str:
    """Return what is wrong with how a round's key was committed to, or nothing."""
    mark, commitment = line.statement.watermark, before.statement.watermark.commitment
    if mark.bits and not commitment:
        return "nothing committed to the key of its watermark before"
    if commitment and not mark.bits:
        return "its key was committed to, but there is no watermark"
    if not mark.bits and wanted and not mark.skipped:
        return "it has no watermark and does not say why"
    if commitment and line.statement.log.size <= before.index:
        return "the log that it saw does not have the commitment to its key"
    return ""


def marked(case: Case) -> Iterator[Problem | Note]:
    """Find watermarks that are not there, or that the owner did not find."""
    for line in case.run.rounds:
        mark = line.statement.watermark
        if mark.bits and (mark.bits != BITS or mark.matches < ACCEPT):
            yield Problem(_too_few(mark.matches, mark.bits), line.where)
    delivery, last = case.delivery, _last_marks(case)
    found = {it.segment: it for it in delivery.statement.watermarks}
    for segment in sorted(set(found) | set(last)):
        if segment not in found or segment not in last:
            who = "owner" if segment not in found else "trainer"
            what = f"the {who} says nothing of a watermark in segment {segment}"
            yield Problem(what, delivery.where)
        elif found[segment] != _expected(*last[segment]):
            what = f"the owner found another watermark in segment {segment} than its trainer"
            yield Problem(what, delivery.where)
    if not last:
        raise NotChecked(_NONE)
    yield Note(f"segments {', '.join(map(str, sorted(last)))}")


def _expected(line: Line[RoundStatement], before: Line[RoundStatement]) -> FoundMark:
    it, commitment = line.statement, before.statement.watermark.commitment
    if not commitment:
        raise NotChecked("a watermark has no commitment")
    mark = it.watermark
    return FoundMark(mark.bits, commitment, mark.matches, it.round, it.segment)


def disclosed(case: Case) -> Iterator[Problem]:
    """Compare the keys that trainers disclosed with their commitments."""
    keys = _keys(case)
    if isinstance(keys, Problem):
        yield keys
        return
    job, last = case.job, _last_marks(case)
    where = (keys.job, keys.round, keys.run)
    if where != (job.digest, job.statement.rounds, job.statement.run):
        yield Problem("it is of another run, attempt or round", KEYS_FILE)
    if set(keys.keys) != set(map(str, last)):
        yield Problem("its segments are not those that have a watermark", KEYS_FILE)
    for segment, (_, before) in last.items():
        key = bytes.fromhex(keys.keys.get(str(segment), ""))
        if sha256(key).hexdigest() != before.statement.watermark.commitment:
            what = f"the key of segment {segment} is not the one that was committed to"
            yield Problem(what, KEYS_FILE)


def detected(case: Case) -> Iterator[Problem | Note]:
    """Look for the watermarks of the last round in the model's file."""
    keys, path, last = _keys(case), case.model, _last_marks(case)
    if isinstance(keys, Problem):
        raise NotChecked(f"{keys.where} cannot be read")
    if not last:
        raise NotChecked(_NONE)
    try:
        from safetensors.torch import load_file

        from flwr_clicooper.provenance.watermark import Watermark
    except ImportError:
        raise NotChecked("PyTorch is not installed; it is needed to look for them") from None
    try:
        open_regular(path).close()
        tensors = load_file(path)
    except Exception:  # safetensors raises many kinds; that it opens is another check
        raise NotChecked(f"{path.name} cannot be read") from None
    for segment, (line, _) in last.items():
        prefix = f"{segment}."
        own = {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        try:
            matches = Watermark(bytes.fromhex(keys.keys[str(segment)]), own).matches(own)
        except (EvidenceError, KeyError) as error:
            yield Problem(f"segment {segment} cannot be compared: {error}", path.name)
            continue
        if matches < ACCEPT or matches != line.statement.watermark.matches:
            yield Problem(f"{_too_few(matches, BITS)} in segment {segment}", path.name)
        yield Note(f"segment {segment}: {matches} of {BITS}")


def _keys(case: Case) -> DisclosedKeys | Problem:
    path = case.folder / KEYS_FILE
    if not lexists(path):
        raise NotChecked(f"{KEYS_FILE} is with the owner" if _last_marks(case) else _NONE)
    try:
        return DisclosedKeys.parse(read_bytes(path, MAX_ENVELOPE))
    except EvidenceError as error:
        return Problem(str(error), KEYS_FILE)


def _last_marks(case: Case) -> dict[int, Pair]:
    """Return the statements of the last round's watermarks by segment.

    A trainer that took a segment over after its last round has no key to disclose.
    """
    rounds = case.job.statement.rounds
    return {
        line.statement.segment: (line, before)
        for line, before in _rounds(case.run)
        if line.statement.watermark.bits
        and line.statement.round == rounds
        and _has_it_still(case, line)
    }


def _has_it_still(case: Case, line: Line[RoundStatement]) -> bool:
    then, segment = case.run.job_of(line), line.statement.segment
    now = case.job.statement
    if then is None or segment > min(then.trainers, now.trainers):
        return True  # what is wrong there is another check's
    return then.party("trainer", segment) == now.party("trainer", segment)


def _rounds(run: RunEvidence) -> Iterator[Pair]:
    """Yield each statement of a round with the one before it on its segment."""
    for lines in run.segments.values():
        for before, line in pairwise(lines):
            if line.statement.kind == "round":
                yield line, before


def _too_few(matches: int, bits: int) -> str:
    return f"{matches} of {bits} bits match; {ACCEPT} of {BITS} must"

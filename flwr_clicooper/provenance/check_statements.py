"""Checks of what parties signed: who, for what, in which order, and whether it agrees."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from flwr_clicooper.errors import EvidenceError, TrustError
from flwr_clicooper.provenance.attestation import Job, RoundStatement
from flwr_clicooper.provenance.checking import Case, NotChecked, Problem
from flwr_clicooper.provenance.dsse import keyid
from flwr_clicooper.provenance.evidence import LINES_FILE, Line, RunEvidence, place
from flwr_clicooper.provenance.flow import Flow, facing

Found = Iterator[Problem]


# -- jobs ----------------------------------------------------------------------------------


def jobs(case: Case) -> Found:
    """Find attempts that are out of order, not linked, or on other terms than the first."""
    before: Line[Job] | None = None
    for number, line in enumerate(case.run.jobs, start=1):
        for what in _wrong_in_job(line.statement, number, before):
            yield Problem(what, line.where)
        before = line
    if before is None:
        yield Problem("there is no job that the parties agreed on", LINES_FILE)


def _wrong_in_job(job: Job, number: int, before: Line[Job] | None) -> Iterator[str]:
    if job.attempt != number:
        yield f"it is attempt {job.attempt} in the place of attempt {number}"
    if job.previous != (before.digest if before else ""):
        yield "it does not name the job of the attempt before"
    if job.resumes != _resumed(job, before):
        yield f"it resumes run {job.resumes!r}; run {_resumed(job, before)!r} came before it"
    if job.after < (before.statement.after if before else 0):
        yield f"it goes back to round {job.after}"
    if before is None and job.after:
        yield f"it goes on from round {job.after}, but nothing came before it"
    for name in ("rounds", "records", "options", "task", "cuts", "initial", "trainers"):
        if before is not None and getattr(job, name) != getattr(before.statement, name):
            yield f"its {name} are not those of the attempt before"
    try:
        Flow.of(job)
    except EvidenceError as error:
        yield str(error)


def _resumed(job: Job, before: Line[Job] | None) -> str:
    """Return the run that a job must say that it resumes."""
    if before is None:
        return ""
    earlier = before.statement
    return earlier.resumes if job.run == earlier.run else earlier.run


def agreement(case: Case) -> Found:
    """Find jobs that are not signed by exactly their parties."""
    _ = case.job
    for line in case.run.jobs:
        yield from _unless_signed(line, (party.key for party in line.statement.parties))


def trusted(case: Case) -> Found:
    """Find parties whose key is not in the trust file for their place."""
    if case.trust is None:
        raise NotChecked("no trust file is given (--trust): whose keys these are is unknown")
    _ = case.job
    for line in case.run.jobs:
        for party in line.statement.parties:
            try:
                case.trust.expect(party.role, party.stage, party.key)
            except TrustError as error:
                yield Problem(str(error), line.where)


# -- the sequence --------------------------------------------------------------------------


def complete(case: Case) -> Found:
    """Find statements that are missing, double, or of another run, attempt or segment."""
    _, run = case.job, case.run
    for where, count in Counter(place(line.statement) for line in run.rounds).items():
        if count > 1:
            what = f"{count} statements stand in the same place"
            yield Problem(what, run.places[where].where)
    yield from belonging(case)
    for job, until in zip(run.jobs, _ends(run), strict=True):
        yield from _missing(run, job, until)


def belonging(case: Case) -> Found:
    """Find statements that are of another run, attempt or segment."""
    ends = _ends(case.run)
    for line in case.run.rounds:
        if what := _misplaced(line.statement, case.run, ends):
            yield Problem(what, line.where)


def _misplaced(statement: RoundStatement, run: RunEvidence, ends: Sequence[int]) -> str:
    """Return why a statement does not belong to the run, or nothing."""
    number = run.attempts.get(statement.job)
    if number is None:
        return "it is of a job that is not here"
    job = run.jobs[number].statement
    if statement.run != job.run:
        return f"it is of run {statement.run!r}, its job of {job.run!r}"
    if statement.segment > job.trainers:
        return f"the job has {job.trainers} trainers"
    if statement.kind == "start":
        return (
            "" if statement.round == job.after else f"the attempt is after round {job.after}"
        )
    if job.after < statement.round <= ends[number]:
        return ""
    return f"the attempt has rounds {job.after + 1} to {ends[number]}"


def _missing(run: RunEvidence, job: Line[Job], until: int) -> Found:
    after, segments = job.statement.after, range(1, job.statement.trainers + 1)
    for segment in segments:
        if (job.digest, "start", after, segment) not in run.places:
            yield Problem(f"the start of segment {segment} is missing", job.where)
    for round_ in range(after + 1, until + 1):
        for segment in segments:
            if (job.digest, "round", round_, segment) not in run.places:
                yield Problem(f"round {round_} of segment {segment} is missing", job.where)


def _ends(run: RunEvidence) -> list[int]:
    """Return the last round of each attempt; of a run that ended early, the last there is."""
    if not run.jobs:
        return []
    last = run.jobs[-1]
    made = [it.statement.round for it in run.rounds if it.statement.job == last.digest]
    end = last.statement.rounds
    if not run.deliveries:
        end = min(end, max(made, default=last.statement.after))
    return [job.statement.after for job in run.jobs[1:]] + [end]


def ordered(case: Case) -> Found:
    """Find lines that do not stand in the order in which statements are made."""
    last = (-1, 0, 0, 0)
    for line in case.run.lines:
        here = _order(line.statement, case.run, line.digest)
        if here <= last:
            yield Problem("it stands behind what comes after it, or twice", line.where)
        last = max(last, here)


def _order(statement: object, run: RunEvidence, digest: str) -> tuple[int, int, int, int]:
    if isinstance(statement, Job):
        return run.attempts[digest], 0, 0, 0
    if isinstance(statement, RoundStatement):
        kind = 1 if statement.kind == "start" else 2
        number = run.attempts.get(statement.job, len(run.jobs))
        return number, kind, statement.round, statement.segment
    return len(run.jobs), 3, 0, 0


# -- signatures and links ------------------------------------------------------------------


def signed(case: Case) -> Found:
    """Find starts and rounds that their segment's trainer did not sign, or a stranger did."""
    for line in case.run.rounds:
        job, statement = case.run.job_of(line), line.statement
        if job is None or statement.segment > job.trainers:
            yield Problem("no job says whose signature it needs", line.where)
            continue
        keys, owner = [job.party("trainer", statement.segment)], job.party("owner")
        if statement.round == job.rounds and keyid(owner) in line.envelope.signed_by():
            keys.append(owner)  # that it is there is another check
        yield from _unless_signed(line, keys)


def countersigned(case: Case) -> Found:
    """Find last statements of segments that the owner did not sign."""
    _, job = case.delivery, case.job.statement
    for segment in range(1, job.trainers + 1):
        line = last_of(case.run, segment)
        if line is None:
            yield Problem(f"segment {segment} has no statement", LINES_FILE)
        else:
            keys = job.party("trainer", segment), job.party("owner")
            yield from _unless_signed(line, keys)


def _unless_signed(line: Line[Job] | Line[RoundStatement], keys: Iterable[object]) -> Found:
    try:
        line.envelope.verify(*keys)  # type: ignore[arg-type]
    except EvidenceError as error:
        yield Problem(str(error), line.where)


def chained_in_time(case: Case) -> Found:
    """Find statements that do not go on from the one before on their segment."""
    for lines in case.run.segments.values():
        before: Line[RoundStatement] | None = None
        for line in lines:
            statement = line.statement
            if statement.previous != (before.digest if before else ""):
                yield Problem("it does not name the segment's statement before it", line.where)
            elif before is None and statement.kind == "round":
                yield Problem("the segment has no start before it", line.where)
            elif before is None and _starts_otherwise(case.run.job_of(line), statement):
                yield Problem(
                    "it is not the segment that all agreed to start from", line.where
                )
            elif before is not None and _starts_elsewhere(statement, before.statement):
                yield Problem("it starts from another segment than the last one", line.where)
            before = line


def _starts_otherwise(job: Job | None, start: RoundStatement) -> bool:
    """Whether the first statement on a segment is not of the initial weights."""
    segment = start.segment
    return job is None or job.initial[segment - 1 : segment] != (start.subject,)


def _starts_elsewhere(statement: RoundStatement, before: RoundStatement) -> bool:
    return statement.kind == "start" and statement.subject != before.subject


def chained_by_segment(case: Case) -> Found:
    """Find rounds that do not name the statement of the segment before."""
    for line in case.run.rounds:
        it = line.statement
        if it.kind == "start" or it.segment == 1:
            continue  # that these name none is part of their form
        giver = case.run.places.get((it.job, "round", it.round, it.segment - 1))
        if giver is None or it.predecessor != giver.digest:
            yield Problem(f"it does not name segment {it.segment - 1}'s statement", line.where)


# -- what was done -------------------------------------------------------------------------


def worked(case: Case) -> Found:
    """Find rounds without the steps and records of the job."""
    flow, records = flow_of(case), case.job.statement.records
    for line in case.run.rounds:
        it = line.statement
        done, due = (it.steps, it.records), (flow.steps, records)
        if it.kind == "round" and done != due:
            what = f"{it.steps} steps on {it.records} records; the job says"
            yield Problem(f"{what} {flow.steps} on {records}", line.where)


def streams(case: Case) -> Found:
    """Find streams that are missing, or that neighbours do not agree on."""
    flow = flow_of(case)
    for line in case.run.rounds:
        it = line.statement
        if it.kind == "start":
            continue
        if wrong := sorted(flow.of_segment(it.segment) ^ set(it.roots)):
            known = "lacks" if wrong[0] not in it.roots else "has"
            yield Problem(f"it {known} {wrong[0]!r}", line.where)
        after = case.run.places.get((it.job, "round", it.round, it.segment + 1))
        for stream in ("activations-out", "gradients-in"):
            if after and it.roots.get(stream) != after.statement.roots.get(facing(stream)):
                what = f"its {stream!r} are not what segment {it.segment + 1} says"
                yield Problem(what, line.where)


def owner_streams(case: Case) -> Found:
    """Find streams on which the owner and a trainer do not agree."""
    delivery, flow, job = case.delivery, flow_of(case), case.job.statement
    given = {(s.release, s.segment, s.stream): s.root for s in delivery.statement.streams}
    expected = 0
    for release, segment, stream in flow.of_owner(job.rounds):
        root = given.get((release, segment, stream))
        if root is None:
            yield Problem(f"{stream!r} of segment {segment} is missing", delivery.where)
            continue
        expected += 1
        for round_ in (release,) if release else range(1, job.rounds + 1):
            line = case.run.round(segment, round_)
            if line is None:
                yield Problem(f"round {round_} of segment {segment} is missing", LINES_FILE)
            elif line.statement.roots.get(facing(stream)) != root:
                yield Problem(f"its {facing(stream)!r} are not the owner's", line.where)
    if expected != len(given):
        yield Problem("it has streams that the job does not", delivery.where)


# -- delivery ------------------------------------------------------------------------------


def delivered(case: Case) -> Found:
    """Find what is off with the delivery; that there is none, too."""
    run, job = case.run, case.job
    if not run.deliveries:
        rounds = max((it.statement.round for it in run.rounds), default=0)
        what = f"not delivered: the evidence ends after round {rounds}"
        yield Problem(f"{what} of {job.statement.rounds}", LINES_FILE)
        return
    if len(run.deliveries) > 1:
        yield Problem(f"there are {len(run.deliveries)} deliveries", LINES_FILE)
    line, it = case.delivery, case.delivery.statement
    try:
        line.envelope.verify(job.statement.party("owner"))
    except EvidenceError as error:
        yield Problem(str(error), line.where)
    if (it.run, it.job) != (job.statement.run, job.digest):
        yield Problem("it is of another run or attempt", line.where)
    if it.rounds != job.statement.rounds:
        what = f"{it.rounds} rounds are delivered; the job says {job.statement.rounds}"
        yield Problem(what, line.where)
    last = [last_of(run, segment) for segment in range(1, job.statement.trainers + 1)]
    if list(it.attestations) != [each.digest if each else "" for each in last]:
        yield Problem("it does not name the last statement of each segment", line.where)


def last_of(run: RunEvidence, segment: int) -> Line[RoundStatement] | None:
    """Return a segment's last statement."""
    lines = run.segments.get(segment)
    return lines[-1] if lines else None


def flow_of(case: Case) -> Flow:
    """Return what crosses the cuts of the run."""
    try:
        return Flow.of(case.job.statement)
    except EvidenceError as error:
        raise NotChecked(f"the job does not say what crosses its cuts: {error}") from error

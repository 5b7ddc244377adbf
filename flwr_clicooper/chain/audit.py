"""The audit: repeat chosen steps from what trainers opened, and compare."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path

import torch
from flwr.app import ArrayRecord
from torch import Tensor

from flwr_clicooper.chain.delivered import digest
from flwr_clicooper.chain.opened import AuditError, NotOpenedError, OpenedRound, rows_of
from flwr_clicooper.chain.records import StoredRecords
from flwr_clicooper.chain.repeat import Repetition, Source
from flwr_clicooper.errors import CooperError
from flwr_clicooper.grids.tensors import encode, encode_places, raw_arrays
from flwr_clicooper.provenance.attestation import RoundStatement
from flwr_clicooper.provenance.audit import AuditReport, Challenge, Outcome, Point
from flwr_clicooper.provenance.evidence import RunEvidence, load_run
from flwr_clicooper.provenance.flow import Flow
from flwr_clicooper.provenance.opening import STATES, is_kept
from flwr_clicooper.provenance.streams import Position as Place
from flwr_clicooper.provenance.streams import arrays_digest
from flwr_clicooper.split.batches import Position
from flwr_clicooper.split.specs import Tensors, TensorSpec
from flwr_clicooper.task import SplitTask

_OTHERWISE = (
    "Steps were skipped or trained otherwise than agreed, or the weights were changed in "
    "between."
)
_REPLACED = (
    "The weights that were signed are not those that were trained: stale, random or somebody "
    "else's weights took their place."
)
_INCOMPLETE = "Micro-batches were left out, doubled or invented."


def audit_run(
    run_dir: Path,
    task: SplitTask,
    challenge: Challenge,
    evidence_dir: Path | None = None,
    tolerance: float = 0.0,
    done: Callable[[Outcome], None] = lambda _: None,
) -> AuditReport:
    """Repeat the steps that a challenge asks for; what is off is an outcome, not an error.

    Parameters
    ----------
    run_dir : Path
        The run's folder, whose evidence `verify_run` has found to hold.
    task : SplitTask
        The verifier's own copy of the run's task.
    challenge : Challenge
        Which steps.
    evidence_dir : Path, optional
        Where trainers' folders ``evidence-<stage>`` are; default is the run's folder.
    tolerance : float
        What weights may differ by at most. 0: they, and all that the steps gave, must be
        equal to the bit, as they are on the same platform.
    done : callable
        Gets each outcome as soon as it is there.

    Raises
    ------
    EvidenceError
        The run's evidence cannot be read, or the challenge is not for it.
    """
    run = load_run(run_dir)
    challenge.check(run)
    auditor = Auditor(run, task, challenge, evidence_dir or run_dir, tolerance)
    outcomes = []
    for point in challenge.points:
        outcomes.append(auditor.audit(point))
        done(outcomes[-1])
    return AuditReport(challenge, tuple(outcomes))


class Auditor:
    """Repeats steps of one run.

    Parameters
    ----------
    run : RunEvidence
        Verified evidence.
    task, challenge, evidence_dir, tolerance
        As in `audit_run`.
    """

    def __init__(
        self,
        run: RunEvidence,
        task: SplitTask,
        challenge: Challenge,
        evidence_dir: Path,
        tolerance: float = 0.0,
    ) -> None:
        self.run = run
        self.task = task
        self.challenge = challenge
        self.evidence_dir = evidence_dir
        self.tolerance = tolerance
        self._by_digest = {line.digest: line for line in run.rounds}
        self._whole: dict[tuple[int, str, str], list[StoredRecords]] = {}

    def audit(self, point: Point) -> Outcome:
        """Repeat the steps of one point."""
        line = self.run.round(point.segment, point.round)
        assert line is not None  # the challenge was drawn from the run's statements
        it, until = line.statement, self.challenge.until(point)
        stated = it.seconds / it.steps if it.steps else 0.0
        place, meaning = (point.segment, point.round, point.step, until), ""
        try:
            what, seconds = self._repeated(point, it)
            return Outcome(*place, True, what, "", seconds, stated)
        except AuditError as error:
            what, meaning = str(error), error.meaning
        except CooperError as error:
            what = f"the steps cannot be repeated: {error}"
        except Exception as error:  # the task's own code, on tensors that anybody made up
            what = f"the steps cannot be repeated: {type(error).__name__}"
        return Outcome(*place, False, what, meaning or _OTHERWISE, 0.0, stated)

    def _repeated(self, point: Point, it: RoundStatement) -> tuple[str, float]:
        """Return what was found in words, and seconds per step; raise if something is off."""
        job = self.run.jobs[self.run.attempts[it.job]].statement
        before = self._by_digest[it.previous].statement
        repetition, until = (
            Repetition(self.task, job, point.segment),
            self.challenge.until(point),
        )
        opened = OpenedRound(self._folder(it), it)
        _check_places(opened, repetition, Flow.of(job), self.challenge.every)
        key = _key(opened, repetition, before)
        started = time.perf_counter()
        start = opened.state(point.step, repetition.module.state_dict())
        _restore(repetition, start, point, opened.who)
        note = "" if point.step else self._joined(start, before, repetition)
        repetition.marking.use(key)
        wrong = ""
        source = self._source(opened, repetition)
        for step in range(point.step, until):
            for stream, at, given in repetition.step(source, point.round, step):
                wrong = wrong or _wrong(opened, stream, at, given)
        seconds = (time.perf_counter() - started) / (until - point.step)
        end = opened.state(until, repetition.module.state_dict())
        note += self._compare(repetition.stage.escrow(), end, opened, until, it)
        if wrong and not self.tolerance:
            raise AuditError(wrong, "It gave its neighbours something else than it computed.")
        if until == repetition.plan.steps:
            repetition.stage.restore(end)
            repetition.marking.complete()
            if digest(repetition.module.state_dict()) != it.subject:
                raise AuditError(
                    f"segment {point.segment} after round {point.round} is not what its last "
                    "steps and its watermark give",
                    _REPLACED,
                )
            note += "; they lead to the signed segment"
        count = until - point.step
        return f"{count} steps, repeated, give what {opened.who} signed{note}", seconds

    # -- the state at the beginning and at the end ----------------------------------------

    def _joined(
        self, start: Mapping[str, Tensor], before: RoundStatement, repetition: Repetition
    ) -> str:
        """Check that a round goes on from where the one before ended; return a note."""
        own = repetition.module.state_dict()
        where = f"round {before.round + 1} of segment {before.segment}"
        if digest(own) != before.subject:
            raise AuditError(
                f"{where} does not begin with the weights that were signed after round "
                f"{before.round}",
                _REPLACED,
            )
        last: Mapping[str, Tensor] = repetition.fresh
        if before.round:
            try:
                last = self._end_of(before, repetition)
            except NotOpenedError as error:
                if not self._taken_over(before):
                    raise
                return f" (the optimizer's state was taken over and not compared: {error})"
        signed = {f"weights/{name}" for name in own}
        if _digest(_without(start, signed)) != _digest(_without(last, signed)):
            raise AuditError(
                f"{where} does not begin with the optimizer's state, or the buffers, with "
                f"which round {before.round} ended",
                _OTHERWISE,
            )
        seeded = before.round or _digest(start) == _digest(repetition.fresh)
        return "" if seeded else " (round 1 began with other weights than the seed gives here)"

    def _end_of(self, before: RoundStatement, repetition: Repetition) -> dict[str, Tensor]:
        statement = self._round_of(before)
        opened = OpenedRound(self._folder(statement), statement)
        return opened.state(repetition.plan.steps, repetition.module.state_dict())

    def _round_of(self, it: RoundStatement) -> RoundStatement:
        """Return the statement of the round that a start goes on from, or the round itself."""
        while it.kind == "start":
            it = self._by_digest[it.previous].statement
        return it

    def _taken_over(self, it: RoundStatement) -> bool:
        """Return whether a start is of another trainer than the round that it goes on from."""
        keys = {
            self.run.jobs[self.run.attempts[each.job]].statement.party("trainer", it.segment)
            for each in (it, self._round_of(it))
        }
        return len(keys) > 1

    def _compare(
        self,
        found: Mapping[str, Tensor],
        committed: Mapping[str, Tensor],
        opened: OpenedRound,
        until: int,
        it: RoundStatement,
    ) -> str:
        """Compare the state that the steps gave with the committed one; return a note."""
        if _digest(found) == opened.leaves.digest(STATES, (opened.round, until, 0)):
            return ""
        most, name = _difference(found, committed)
        if most <= self.tolerance:
            return f" within {most:.2g}"
        raise AuditError(
            f"the state after step {until - 1} is not what these inputs and the agreed "
            f"learning rate give: {name} differs by {most:.2g}",
            f"{_OTHERWISE} On another platform rounding differs, too (the trainer had PyTorch "
            f"{it.versions['torch']}, here is {torch.__version__}): then give a tolerance.",
        )

    # -- where the tensors come from -------------------------------------------------------

    def _folder(self, it: RoundStatement) -> Path:
        """Return where the evidence of a statement is; of a resumed run, beside it."""
        here, place = self.evidence_dir, (it.segment, it.round)
        earlier = here.absolute().parent / Path(it.run).name
        return earlier if not is_kept(here, *place) and is_kept(earlier, *place) else here

    def _source(self, opened: OpenedRound, repetition: Repetition) -> Source:
        plan, stage = repetition.plan, repetition.stage

        def rows(stream: str, at: Position, specs: list[TensorSpec] | None) -> Tensors:
            indices = plan.indices(at)
            if stream in repetition.uploaded:
                return rows_of(self._records(opened, stream, specs, plan.records), indices)
            return opened.batch(stream, at, specs, len(indices))

        return Source(
            lambda at: rows("activations-in", at, stage.incoming),
            lambda at: opened.gradients(at, stage.outgoing, len(plan.indices(at))),
            lambda at: rows("labels-in", at, None)[0],
        )

    def _records(
        self,
        opened: OpenedRound,
        stream: str,
        specs: list[TensorSpec] | None,
        records: int,
    ) -> list[StoredRecords]:
        """Return what was uploaded; the same for all rounds that have the same root."""
        which = opened.segment, stream, opened.leaves.root(stream)
        if which not in self._whole:
            self._whole[which] = opened.whole(stream, specs, records)
        return self._whole[which]


def _check_places(opened: OpenedRound, repetition: Repetition, flow: Flow, every: int) -> None:
    """Refuse streams that have leaves elsewhere than the round has micro-batches."""
    plan, round_ = repetition.plan, opened.round

    def due(stream: str, count: int) -> Iterator[Place]:
        if stream in repetition.uploaded:
            return ((0, chunk, 0) for chunk in range(count))
        if stream == STATES:
            return ((round_, s, 0) for s in (*range(0, plan.steps, every), plan.steps))
        return ((at.round, at.step, at.microbatch) for at in plan.positions(round_))

    for stream in sorted(flow.of_segment(opened.segment)):
        places = opened.leaves.positions(stream)
        pairs = zip_longest(places, due(stream, len(places)))
        if not places or any(one != other for one, other in pairs):
            raise AuditError(
                f"{opened.who} signed {stream!r} of other steps or micro-batches than round "
                f"{round_} has",
                _INCOMPLETE,
            )


def _key(opened: OpenedRound, repetition: Repetition, before: RoundStatement) -> str:
    """Return the key of the round's watermark, in hex; empty where it has none."""
    committed = before.watermark.commitment
    if not committed and not repetition.marking.skipped:
        raise AuditError(
            f"{opened.who} says that its segment cannot carry a watermark; it can",
            "Nobody will find out by a watermark whose work the segment is.",
        )
    return opened.key(committed)


def _restore(
    repetition: Repetition, state: Mapping[str, Tensor], point: Point, who: str
) -> None:
    """Set the segment to a committed state, if its optimizer has the agreed settings."""
    agreed = repetition.agreed_settings(point.round, point.step)
    found = repetition.settings(state)
    if found != agreed:
        raise AuditError(
            f"before step {point.step} the optimizer of {who} has other settings than agreed: "
            f"{_other_setting(found, agreed)}",
            f"{_OTHERWISE} (An optimizer that changes its own settings cannot be audited.)",
        )
    repetition.stage.restore(state)


def _other_setting(found: object, agreed: object) -> str:
    """Name the first setting that differs."""
    if not isinstance(found, list) or not isinstance(agreed, list):
        return "one has no optimizer"
    for mine, other in zip(agreed, found, strict=False):
        for name in sorted({*mine, *other}) if isinstance(other, dict) else ():
            if mine.get(name) != other.get(name):
                return f"{name[:64]!r} is {str(other.get(name))[:64]}, not {mine.get(name)}"
    return f"{len(found)} groups of parameters, not {len(agreed)}"


def _wrong(opened: OpenedRound, stream: str, at: Position, given: Mapping[int, Tensor]) -> str:
    """Return what is off with what a step gave, or nothing."""
    place = (at.round, at.step, at.microbatch)
    if _arrays_digest(encode_places(given)) == opened.leaves.digest(stream, place):
        return ""
    return (
        f"{stream} at step {at.step}, micro-batch {at.microbatch} is not what segment "
        f"{opened.segment} gives for these inputs"
    )


def _without(state: Mapping[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name not in names}


def _difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> tuple[float, str]:
    """Return by how much two states differ at most, and in what."""
    if set(one) != set(other):
        return math.inf, sorted(set(one) ^ set(other))[0]
    most, where = 0.0, ""
    for name, tensor in one.items():
        value = _apart(tensor, other[name])
        if not value <= most:  # NaN, too
            most, where = value, name
    return (math.inf if math.isnan(most) else most), where


def _apart(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape or one.dtype != other.dtype:
        return math.inf
    if not one.is_floating_point():
        return 0.0 if torch.equal(one, other) else math.inf
    return float((one.double() - other.double()).abs().max()) if one.numel() else 0.0


def _digest(state: Mapping[str, Tensor]) -> bytes:
    return _arrays_digest(encode(state))


def _arrays_digest(record: ArrayRecord) -> bytes:
    return arrays_digest(raw_arrays(record))

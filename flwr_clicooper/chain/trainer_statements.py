"""What a trainer signs: the segment it starts from, and each round that it trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from flwr.app import ArrayRecord
from torch import Tensor

from flwr_clicooper.chain.attestor import Attestor, digest_of
from flwr_clicooper.chain.kept_evidence import KeptEvidence
from flwr_clicooper.chain.messages import Header
from flwr_clicooper.chain.roles import OWNER, TRAINER, run_folder
from flwr_clicooper.errors import EvidenceError
from flwr_clicooper.files import write_atomically
from flwr_clicooper.grids.tensors import encode
from flwr_clicooper.provenance.attestation import (
    Job,
    RoundMark,
    RoundStatement,
    TreeHead,
    now,
    versions,
)
from flwr_clicooper.provenance.dsse import Envelope
from flwr_clicooper.provenance.evidence import OwnKeys
from flwr_clicooper.provenance.streams import Position as Place
from flwr_clicooper.provenance.streams import Streams
from flwr_clicooper.provenance.watermark import commitment, round_key
from flwr_clicooper.split.batches import Position


@dataclass(frozen=True)
class Work:
    """What a round did to a segment.

    Attributes
    ----------
    subject : str
        SHA-256 of the segment after the round.
    steps, records : int
        Optimizer steps, and records.
    bits, matches : int
        Of the round's watermark; 0 and 0 without one.
    skipped : str
        Why the segment has no watermark; empty if it has.
    """

    subject: str
    steps: int = 0
    records: int = 0
    bits: int = 0
    matches: int = 0
    skipped: str = ""


class TrainerStatements(Attestor):
    """Signs for one trainer; with `audit-every`, commits to its states and keeps evidence."""

    @cached_property
    def evidence(self) -> KeptEvidence | None:
        """Where to keep what opens the commitments."""
        if not self.options.audit_every:
            return None
        return KeptEvidence(run_folder(self.options, self.run), self.stage)

    def note_state(self, at: Position, tensors: Mapping[str, Tensor]) -> None:
        """Commit to the segment and its optimizer as they are before a step."""
        place = (at.round, at.step, 0)
        self._add(self.stage, "states", place, encode(tensors), at.round)

    def _measure(self, stream: str, at: Place, record: ArrayRecord) -> bytes:
        if self.evidence is not None:
            self.evidence.keep(stream, at, record)
        return super()._measure(stream, at, record)

    def start(self, header: Header, own: Mapping[str, Any], work: Work) -> dict[str, str]:
        """Agree on the job; return the signed job and the statement on the first segment.

        Parameters
        ----------
        own : mapping
            As `Attestor.agree`.
        work : Work
            The segment as it is before training.

        Raises
        ------
        EvidenceError
            The job is not this trainer's, or the segment is not the one that the attempt
            must go on from.
        """
        signed = self.agree(header, own)
        job = self.job
        if job.initial[self.stage - 1] != work.subject and not job.after:
            raise EvidenceError(
                f"segment {self.stage} does not begin with the weights that the owner has for "
                "it: both must run the same app and version of PyTorch, or be given "
                "initial_arrays"
            )
        previous = self._taken_over(header, job, work.subject)
        statement = self._statement("start", job.after, work, previous, self.see_log(header))
        self.kept.round = job.after + 1
        made = {"job": signed, "statement": self._signed(statement)}
        if job.after == job.rounds:  # what is left to do is to deliver
            self.kept.disclosed = self._own_key(job)
        return made

    def _own_key(self, job: Job) -> str:
        """Return the key of this trainer's watermark of the last round, or an empty text."""
        name = OwnKeys(keys={}, run=self.run, segment=self.stage).file_name
        for run in filter(None, (self.run, job.resumes)):
            path = run_folder(self.options, run) / name
            if path.exists():
                return OwnKeys.parse(path.read_bytes()).keys.get(str(job.rounds), "")
        return ""

    def disclosed(self) -> str:
        """Return the key of the last round's watermark in hex, or an empty text.

        Raises
        ------
        EvidenceError
            Training is not over.
        """
        if self._previous.round != self.job.rounds:
            raise EvidenceError("a segment is delivered, and a key disclosed, at the end only")
        return self.kept.disclosed

    def finish_round(self, header: Header, work: Work) -> dict[str, str]:
        """Return the signed statement on a round, after checking the predecessor's.

        Raises
        ------
        EvidenceError
            The predecessor's statement does not fit what came from it, or the round is
            not the next.
        """
        self.settle()
        round_ = header.get("round", int)
        before = self._previous
        if round_ != before.round + 1:
            raise EvidenceError(f"round {before.round} was signed last; {round_} is not next")
        roots = self._streams.roots()
        predecessor = self._predecessor(header, round_, roots)
        statement = self._statement(
            "round",
            round_,
            work,
            digest_of(self.kept.previous),
            self.see_log(header),
            predecessor=predecessor,
            roots=roots,
            seconds=round(self.kept.seconds, 3),
            moved=self.kept.moved,
        )
        if self.evidence is not None:
            self.evidence.close(round_, self._streams, self.kept.key)
        self.kept.round = round_ + 1
        self._streams.forget_rounds()
        self._changed.add(self.stage)
        self.kept.seconds, self.kept.moved = 0.0, 0
        return {"statement": self._signed(statement)}

    @property
    def _previous(self) -> RoundStatement:
        """The last statement on this trainer's segment."""
        return RoundStatement.parse(self.kept.previous.encode())

    @property
    def _streams(self) -> Streams:
        return self.streams.setdefault(self.stage, Streams())

    def _statement(
        self,
        kind: str,
        round_: int,
        work: Work,
        previous: str,
        seen: TreeHead,
        *,
        predecessor: str = "",
        roots: Mapping[str, str] | None = None,
        seconds: float = 0.0,
        moved: int = 0,
    ) -> RoundStatement:
        return RoundStatement(
            run=self.run,
            job=self.job_digest,
            kind=kind,
            segment=self.stage,
            round=round_,
            subject=work.subject,
            previous=previous,
            predecessor=predecessor,
            roots=roots or {},
            steps=work.steps,
            records=work.records,
            seconds=seconds,
            bytes=moved,
            log=seen,
            watermark=RoundMark(work.bits, "", work.matches, work.skipped),
            time=now(),
            versions=versions("torch"),
        )

    def _signed(self, statement: RoundStatement) -> str:
        """Sign a statement with the commitment to the next round's watermark."""
        job = self.job
        self.kept.disclosed, self.kept.key = self.kept.key, ""
        if not statement.watermark.skipped and statement.round < job.rounds:
            secret = self.identity.derive("watermark")
            key = round_key(
                secret,
                statement.chain(),
                run=self.run,
                segment=self.stage,
                round=statement.round + 1,
                signer=self.identity.public,
            )
            self.kept.key = key.hex()
            self._keep_key(statement.round + 1, key.hex())
            mark = replace(statement.watermark, commitment=commitment(key))
            statement = replace(statement, watermark=mark)
        payload = statement.payload()
        self.kept.previous = payload.decode()
        return Envelope.sign(payload, self.identity).to_json()

    def _keep_key(self, round_: int, key: str) -> None:
        """Keep a watermark's key for later claims, on this machine and for its owner only."""
        own = OwnKeys(keys={}, run=self.run, segment=self.stage)
        path = run_folder(self.options, self.run) / own.file_name
        if path.exists():
            own = OwnKeys.parse(path.read_bytes())
        own = replace(own, keys={**own.keys, str(round_): key})
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, own.to_bytes())

    def _taken_over(self, header: Header, job: Job, subject: str) -> str:
        """Return the digest of the statement that this attempt goes on from."""
        if job.attempt == 1:
            return ""
        before = Envelope.from_json(header.get("previous-job", str))
        if before.digest != job.previous:
            raise EvidenceError("the job does not follow the one that came with it")
        earlier = Job.parse(before.payload)
        keys = [earlier.party(TRAINER, self.stage)]
        envelope = Envelope.from_json(header.get("previous", str))
        if len(envelope.signatures) > 1:  # the owner had begun to take delivery
            keys.append(earlier.party(OWNER))
        statement = RoundStatement.parse(envelope.verify(*keys))
        place = (statement.job, statement.segment, statement.round)
        if place != (job.previous, self.stage, job.after):
            raise EvidenceError(
                f"the statement to go on from is not the one on segment {self.stage} after "
                f"round {job.after}"
            )
        if statement.subject != subject:
            raise EvidenceError(
                f"segment {self.stage} is not the one that was signed after round "
                f"{job.after}: its SHA-256 is another"
            )
        return envelope.digest

    def _predecessor(self, header: Header, round_: int, roots: Mapping[str, str]) -> str:
        """Return the digest of the predecessor's statement, if it fits what came."""
        text, job = header.get("predecessor", str), self.job
        if self.stage == 1:
            return ""
        envelope = Envelope.from_json(text)
        given = RoundStatement.parse(envelope.verify(job.party(TRAINER, self.stage - 1)))
        place = (given.run, given.job, given.segment, given.round, given.kind)
        if place != (self.run, self.job_digest, self.stage - 1, round_, "round"):
            raise EvidenceError(
                f"the statement that came is not the one on segment {self.stage - 1} after "
                f"round {round_}"
            )
        for theirs, mine in (
            ("activations-out", "activations-in"),
            ("gradients-in", "gradients-out"),
        ):
            if given.roots.get(theirs) != roots.get(mine):
                raise EvidenceError(
                    f"trainer {self.stage - 1} signed other {theirs} than trainer "
                    f"{self.stage} has as {mine} in round {round_}: one of them or the relay "
                    "changed them, or a mod did on their way"
                )
        return envelope.digest

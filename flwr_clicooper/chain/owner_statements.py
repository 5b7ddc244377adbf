"""What the owner signs: the job, each segment that it takes, and the delivery."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Message
from torch import Tensor

from flwr_clicooper.chain.attestor import Attestor
from flwr_clicooper.chain.messages import WATERMARK_KEY, Action, Header
from flwr_clicooper.chain.own_streams import OwnStreams
from flwr_clicooper.chain.roles import OWN_FOLDER, TRAINER, run_folder
from flwr_clicooper.errors import DeliveryError, EvidenceError, StateError
from flwr_clicooper.files import write_atomically
from flwr_clicooper.grids.tensors import decode
from flwr_clicooper.provenance.attestation import (
    Delivery,
    FoundMark,
    OwnerStream,
    RoundStatement,
    now,
    versions,
)
from flwr_clicooper.provenance.dsse import Envelope, keyid
from flwr_clicooper.provenance.evidence import KEYS_FILE, DisclosedKeys
from flwr_clicooper.provenance.fields import canonical_digest
from flwr_clicooper.provenance.watermark import BITS, Watermark, commitment, is_accepted


class OwnerStatements(Attestor):
    """Signs for the owner."""

    @property
    def nonce(self) -> str:
        """What the owner adds to the job, 64 hex digits; nobody knows it before the run."""
        return self.identity.derive(f"nonce/{self.run}").hex()

    def note(
        self, action: Action, header: Header, message: Message, sent: Mapping[str, ArrayRecord]
    ) -> None:
        """Measure the tensors of a message, and store what is complete."""
        super().note(action, header, message, sent)
        if action is Action.RELEASE:
            self._keep(0, header.get("release", int))
        elif action is Action.CLOSE_ROUND:
            self.settle()
            for segment in list(self.streams):
                self._keep(segment, header.get("round", int))

    def _keep(self, segment: int, round_: int) -> None:
        """Add what was measured to what is stored; only files have the whole."""
        self.settle()
        stored, new = self.own.of(round_, segment), self.streams.pop(segment)
        if self.options.release == "clean" and not stored.agrees(new):
            raise StateError(
                "the head gives other activations than when they were released first; a run "
                "goes on only where it was: same machine, threads and version of PyTorch"
            )
        stored.update(new)
        self._changed.add(segment)
        self.own.keep(round_, segment, stored)

    @property
    def own(self) -> OwnStreams:
        """What the owner gave and got in this run."""
        return OwnStreams(run_folder(self.options, self.run) / OWN_FOLDER / "streams")

    def agree_from(
        self, header: Header, own: Mapping[str, Any], initial: tuple[str, ...]
    ) -> str:
        """Sign the job as `agree`; take up what earlier attempts measured.

        Parameters
        ----------
        initial : tuple of str
            Digests of the trainers' segments before training. Later attempts have those of
            the first, whose initial arrays need not be given again.
        """
        signed = self.agree(header, own)
        if self.job.attempt == 1 and self.job.initial != initial:
            raise EvidenceError("the job begins with other weights than the owner has")
        if earlier := self.job.resumes:
            self.own.take_over(run_folder(self.options, earlier) / OWN_FOLDER / "streams")
        return signed

    def _own_streams(self, trainers: int) -> Iterator[OwnerStream]:
        """Yield the roots, each with the trainer's segment at the other end."""
        for round_, segment, stream, root in self.own.roots():
            others = [trainers if segment else 1]
            if stream == "labels-out":
                first = 1 if self.options.schedule == "local" else trainers
                others = list(range(first, trainers + 1))
            for other in others:
                yield OwnerStream(round_, root, other, stream)

    def collect(
        self,
        header: Header,
        message: Message,
        weights: Mapping[str, Tensor],
        digest: str,
        skipped: str,
    ) -> dict[str, str]:
        """Check a delivered segment against what its trainer signed; countersign that.

        Parameters
        ----------
        weights : mapping of str to Tensor
            The segment.
        digest : str
            Its SHA-256.
        skipped : str
            Why the segment cannot carry a watermark, as the owner sees it; empty if it can.

        Raises
        ------
        DeliveryError
            The segment is not the one that was signed, or does not carry the watermark.
        EvidenceError
            The statement is not the trainer's last one.
        """
        index, job = header.get("segment", int), self.job
        lines = [Envelope.from_json(text) for text in header.texts("statements")]
        trainer = job.party(TRAINER, index)
        statement = RoundStatement.parse(lines[-1].verify(trainer))
        place = (statement.run, statement.job, statement.segment, statement.round)
        if place != (self.run, self.job_digest, index, job.rounds):
            raise EvidenceError(
                f"the statement that came with segment {index} is not its trainer's on the "
                "last round"
            )
        if statement.subject != digest:
            raise DeliveryError(
                f"segment {index} is not the one that trainer {index} signed after the last "
                "round: its SHA-256 is another"
            )
        self.kept.last[str(index)] = lines[-1].digest
        if self.options.watermark:
            committed, marked = _last_round(lines)
            self._check_skipped(marked, skipped)
            # Whoever took the segment over after its last round has no key to disclose.
            if marked.watermark.bits and keyid(trainer) in lines[1].signed_by():
                record = message.content.array_records.get(WATERMARK_KEY)
                if record is None:
                    raise DeliveryError(
                        f"trainer {index} did not disclose the key of its last watermark"
                    )
                key = bytes(decode(record, "watermark key")["key"].numpy())
                self._check_mark(marked, committed, key, weights)
        return {"countersigned": lines[-1].countersigned(self.identity).to_json()}

    def _check_skipped(self, statement: RoundStatement, skipped: str) -> None:
        if bool(statement.watermark.bits) == bool(skipped):
            raise DeliveryError(
                f"trainer {statement.segment} says that its segment has "
                f"{statement.watermark.bits} bits of watermark, but by the owner's task it "
                f"{'can have none' if skipped else 'must have one'}"
            )

    def _check_mark(
        self,
        statement: RoundStatement,
        committed: str,
        key: bytes,
        weights: Mapping[str, Tensor],
    ) -> None:
        segment = statement.segment
        if commitment(key) != committed:
            raise DeliveryError(
                f"the key that trainer {segment} disclosed is not the one that it committed "
                "to before the last round"
            )
        matches = Watermark(key, weights).matches(weights)
        if not is_accepted(matches):
            raise DeliveryError(
                f"segment {segment} does not carry trainer {segment}'s watermark of the last "
                f"round: {matches} of {BITS} bits"
            )
        self.kept.marks[str(segment)] = (matches, key.hex())

    def deliver(
        self,
        header: Header,
        model: Path,
        metrics: Mapping[str, float],
        privacy: Mapping[str, Any],
    ) -> str:
        """Return the signed statement on what was delivered.

        Parameters
        ----------
        model : Path
            The model's file.
        metrics : mapping of str to float
            Held-out figures.
        privacy : mapping
            The privacy statement.
        """
        job, seen = self.job, self.see_log(header)
        delivery = Delivery(
            subject=hashlib.sha256(model.read_bytes()).hexdigest(),
            run=self.run,
            job=self.job_digest,
            rounds=job.rounds,
            attestations=tuple(self.kept.last[str(i + 1)] for i in range(job.trainers)),
            log=seen,
            privacy=canonical_digest(privacy),
            metrics={k: v for k, v in metrics.items() if math.isfinite(v)},
            watermarks=tuple(
                FoundMark(
                    BITS, commitment(bytes.fromhex(key)), matches, job.rounds, int(segment)
                )
                for segment, (matches, key) in self._marks()
            ),
            streams=tuple(self._own_streams(job.trainers)),
            time=now(),
            versions=versions("torch"),
        )
        self._keep_disclosed(job.rounds)
        return Envelope.sign(delivery.payload(), self.identity).to_json()

    def _marks(self) -> list[tuple[str, tuple[int, str]]]:
        """Return matches and key by segment, in order."""
        return sorted(self.kept.marks.items(), key=lambda it: int(it[0]))

    def _keep_disclosed(self, round_: int) -> None:
        """Keep the disclosed keys beside the model, for its owner only."""
        keys = {segment: key for segment, (_, key) in self._marks()}
        if keys:
            found = DisclosedKeys(job=self.job_digest, keys=keys, round=round_, run=self.run)
            path = run_folder(self.options, self.run) / KEYS_FILE
            write_atomically(path, found.to_bytes())


def _last_round(lines: Sequence[Envelope]) -> tuple[str, RoundStatement]:
    """Return the commitment to the last round's key, and the statement on that round.

    Raises
    ------
    EvidenceError
        The lines are not a statement, the last round's, and the starts of attempts that
        only delivered.
    """
    statements = [RoundStatement.parse(line.payload) for line in lines]
    chained = all(b.previous == a.digest for a, b in zip(lines, statements[1:], strict=False))
    kinds = [statement.kind for statement in statements[1:]]
    if not chained or kinds[:1] != ["round"] or set(kinds[1:]) - {"start"}:
        raise EvidenceError("the statements that came with a segment are not its last ones")
    if {it.subject for it in statements[1:]} != {statements[-1].subject}:
        raise EvidenceError("the segment changed after its last round")
    return statements[0].watermark.commitment, statements[1]

"""The relay's evidence of a run: the agreement, the signed statements, and their log."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr_clicooper.chain.messages import Action, Header
from flwr_clicooper.chain.relay import Relay
from flwr_clicooper.chain.roles import OWNER, RELAY, TRAINER
from flwr_clicooper.errors import EvidenceError
from flwr_clicooper.files import write_atomically
from flwr_clicooper.options import Options
from flwr_clicooper.provenance.attestation import (
    Delivery,
    Job,
    JobParty,
    LogHead,
    RoundStatement,
    now,
    parse_statement,
)
from flwr_clicooper.provenance.dsse import Envelope
from flwr_clicooper.provenance.evidence import LINES_FILE, LOG_FILE, read_lines
from flwr_clicooper.provenance.fields import canonical_digest
from flwr_clicooper.provenance.keys import Identity, PublicIdentity
from flwr_clicooper.provenance.log import MerkleLog


@dataclass
class Terms:
    """What the relay learned at setup that the job has to say.

    Attributes
    ----------
    after : int
        The closed round that the attempt goes on from.
    records : int
        Training records.
    cuts : list of list of str
        What crosses each cut.
    initial : list of str
        Digests of the trainers' segments before training, as the owner has them.
    nonce : str
        The owner's.
    privacy : dict
        The privacy statement.
    keys : list of str
        The identities of the owner and of trainers 1 to N.
    """

    after: int
    records: int
    cuts: list[list[str]]
    initial: list[str]
    nonce: str
    privacy: Mapping[str, Any]
    keys: Sequence[str]


@dataclass
class Notary:
    """Collects signed statements, and keeps them in a log that only grows.

    Attributes
    ----------
    folder : Path
        The run's folder on the relay.
    options : Options
        The run's options.
    task : dict
        The task's own options.
    identity : Identity
        The relay's.
    """

    folder: Path
    options: Options
    task: Mapping[str, Any]
    identity: Identity
    resumes: str = ""
    lines: list[Envelope] = field(default_factory=list)
    log: MerkleLog = field(default_factory=MerkleLog)
    _job: Envelope | None = None
    _of_segment: dict[int, list[int]] = field(default_factory=dict)
    _shown: dict[int, int] = field(default_factory=dict)
    _head: Envelope | None = None

    @classmethod
    def of(cls, folder: Path, options: Options, task: Mapping[str, Any]) -> Notary:
        """Return the notary of a run, with the relay's key from its file or a new one.

        Raises
        ------
        StateError
            The file does not hold a key that only its owner reads.
        """
        path = Path(options.relay_key).expanduser() if options.relay_key else None
        return cls(folder, options, task, Identity.load(path) if path else Identity.new())

    def take_over(self, earlier: Path, after: int) -> None:
        """Begin with the statements of a run that this one resumes, up to a round.

        Raises
        ------
        EvidenceError
            They are missing or damaged.
        """
        self.resumes = earlier.name
        kept = []
        for envelope in read_lines(earlier / LINES_FILE):
            statement = parse_statement(envelope.payload)
            if isinstance(statement, Delivery):
                raise EvidenceError(
                    f"{earlier.name} was delivered; there is nothing to resume"
                )
            if isinstance(statement, RoundStatement) and statement.round > after:
                break
            kept.append(envelope)
        self._append(kept)

    @property
    def job(self) -> Job:
        """The job of the attempt that goes on."""
        if self._job is None:
            raise EvidenceError("no job was agreed on")
        return Job.parse(self._job.payload)

    # -- statements ------------------------------------------------------------------

    def agree(self, relay: Relay, owner: int, trainers: Sequence[int], terms: Terms) -> None:
        """Have all parties sign the job, and each trainer the segment that it starts from.

        Raises
        ------
        ClientError
            A party refused.
        EvidenceError
            A signature is not by the party.
        """
        before = self._job
        job = self._new_job(terms, before)
        text = job.payload().decode()
        self._shown.clear()
        fields: dict[int, dict[str, Any]] = {owner: {"job": text}}
        for stage, node_id in enumerate(trainers, start=1):
            fields[node_id] = {"job": text, **self.shown_to(node_id)}
            if before is not None:
                fields[node_id] |= {
                    "previous-job": before.to_json(),
                    "previous": self.last(stage).to_json(),
                }
        replies = relay.ask_each(Action.AGREE, fields)
        envelope = Envelope.sign(job.payload(), self.identity)
        for node_id in (owner, *trainers):
            signed = Envelope.from_json(replies[node_id][0].get("job", str))
            envelope = envelope.with_signatures_of(signed)
        envelope.verify(*(party.key for party in job.parties))
        starts = [
            self._checked(job, stage, replies[node_id][0])
            for stage, node_id in enumerate(trainers, start=1)
        ]
        self._append([envelope, *starts])

    def agree_again(self, relay: Relay, owner: int) -> None:
        """Have an owner that came back as another node take up the job as it stands."""
        self._shown.pop(owner, None)
        relay.ask(owner, Action.AGREE, {"job": self.job.payload().decode()}, persist=True)

    def close_round(self, relay: Relay, trainers: Sequence[int], round_: int) -> None:
        """Have each trainer sign its round, after it has seen its predecessor's statement."""
        job, made = self.job, list[Envelope]()
        for stage, node_id in enumerate(trainers, start=1):
            fields = {
                "round": round_,
                "predecessor": made[-1].to_json() if made else "",
                **self.shown_to(node_id),
            }
            header, _ = relay.ask(node_id, Action.ATTEST, fields, persist=True)
            made.append(self._checked(job, stage, header))
        self._append(made)

    def for_collection(self, stage: int) -> dict[str, list[str]]:
        """Return a segment's statements from the one before its last round, for the owner."""
        places = self._of_segment[stage]
        statements = [RoundStatement.parse(self.lines[place].payload) for place in places]
        last = max(i for i, it in enumerate(statements) if it.kind == "round")
        return {"statements": [self.lines[place].to_json() for place in places[last - 1 :]]}

    def countersigned(self, stage: int, header: Header) -> None:
        """Take the owner's signature on a trainer's last statement."""
        given = Envelope.from_json(header.get("countersigned", str))
        place = self._of_segment[stage][-1]
        merged = self.lines[place].with_signatures_of(given)
        merged.verify(self.job.party(TRAINER, stage), self.job.party(OWNER, 0))
        self.lines[place] = merged

    def delivered(self, header: Header) -> None:
        """Take the owner's statement on what was delivered."""
        envelope = Envelope.from_json(header.get("delivery", str))
        envelope.verify(self.job.party(OWNER, 0))
        self._append([envelope])

    def last(self, stage: int) -> Envelope:
        """Return the last statement on a segment."""
        return self.lines[self._of_segment[stage][-1]]

    def _new_job(self, terms: Terms, before: Envelope | None) -> Job:
        keys = [PublicIdentity.parse(text) for text in terms.keys]
        roles = [(OWNER, 0), *((TRAINER, i) for i in range(1, len(keys)))]
        parties = [
            JobParty(role, stage, key) for (role, stage), key in zip(roles, keys, strict=True)
        ]
        return Job(
            run=self.folder.name,
            attempt=Job.parse(before.payload).attempt + 1 if before else 1,
            after=terms.after,
            previous=before.digest if before else "",
            resumes=self.resumes,
            rounds=self.options.num_rounds,
            records=terms.records,
            options=self.options.agreed(),
            task=dict(self.task),
            cuts=tuple(map(tuple, terms.cuts)),
            initial=Job.parse(before.payload).initial if before else tuple(terms.initial),
            nonce=terms.nonce,
            parties=(*parties, JobParty(RELAY, 0, self.identity.public)),
            subject=canonical_digest(terms.privacy),
        )

    def _checked(self, job: Job, stage: int, header: Header) -> Envelope:
        envelope = Envelope.from_json(header.get("statement", str))
        envelope.verify(job.party(TRAINER, stage))
        return envelope

    # -- the log -----------------------------------------------------------------------

    def shown_to(self, node_id: int) -> dict[str, Any]:
        """Return the fields that show a party the log, and that it has only grown."""
        if not self.log.size:
            return {"head": ""}
        seen = self._shown.get(node_id, 0)
        proof = self.log.consistency(seen, self.log.size) if seen else []
        self._shown[node_id] = self.log.size
        if self._head is None:
            self._head = self._signed_head({})
        return {"head": self._head.to_json(), "consistency": [part.hex() for part in proof]}

    def _signed_head(self, files: Mapping[str, str]) -> Envelope:
        root = self.log.root().hex()
        head = LogHead(root, self.folder.name, self.log.size, now(), dict(files))
        return Envelope.sign(head.payload(), self.identity)

    def _append(self, envelopes: Sequence[Envelope]) -> None:
        for envelope in envelopes:
            statement = parse_statement(envelope.payload)
            if isinstance(statement, Job):
                self._job = envelope
            elif isinstance(statement, RoundStatement):
                self._of_segment.setdefault(statement.segment, []).append(len(self.lines))
            self.lines.append(envelope)
            self.log.append(bytes.fromhex(envelope.digest))
        self._head = None
        self._write()

    def _write(self) -> None:
        text = "".join(envelope.to_json() + "\n" for envelope in self.lines)
        write_atomically(self.folder / LINES_FILE, text.encode())

    def close(self, files: Sequence[str]) -> None:
        """Write the lines with all signatures, and the head over them and other files."""
        if not self.lines:
            return
        self._write()
        digests = {
            name: hashlib.sha256((self.folder / name).read_bytes()).hexdigest()
            for name in files
            if (self.folder / name).exists()
        }
        head = self._signed_head(digests).to_json() + "\n"
        write_atomically(self.folder / LOG_FILE, head.encode())

    def summary(self) -> dict[str, Any]:
        """Return what a run's result says of its evidence."""
        return {"statements": self.log.size, "root": self.log.root().hex()}

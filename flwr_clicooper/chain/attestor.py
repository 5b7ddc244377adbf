"""What a party of the chain signs, and what it checks before it does.

Every party agrees on the job before training. From then on it measures the tensors that it
takes in and gives out, and follows the relay's log.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message
from torch import Tensor

from flwr_clicooper.chain.identity import check_keys, own_identity
from flwr_clicooper.chain.messages import (
    ACTIVATIONS,
    GRADIENTS,
    LABELS,
    Action,
    Header,
    payload_bytes,
)
from flwr_clicooper.chain.roles import OWNER, RELAY, TRAINER
from flwr_clicooper.chain.stage import Changes
from flwr_clicooper.errors import EvidenceError
from flwr_clicooper.grids.tensors import raw_arrays, snapshot
from flwr_clicooper.options import Options
from flwr_clicooper.provenance.attestation import Job, LogHead, TreeHead
from flwr_clicooper.provenance.dsse import Envelope
from flwr_clicooper.provenance.keys import Identity
from flwr_clicooper.provenance.log import check_consistency
from flwr_clicooper.provenance.streams import Position, Streams, arrays_digest
from flwr_clicooper.provenance.trust import place as in_words

STREAMS = "streams-"
_IN: dict[Action, dict[str, str]] = {
    Action.UPLOAD: {ACTIVATIONS: "activations-in", LABELS: "labels-in"},
    Action.FORWARD: {ACTIVATIONS: "activations-in", LABELS: "labels-in"},
    Action.BACKWARD: {GRADIENTS: "gradients-in"},
}
_OUT: dict[Action, dict[str, str]] = {
    Action.RELEASE: {ACTIVATIONS: "activations-out", LABELS: "labels-out"},
    Action.FORWARD: {
        ACTIVATIONS: "activations-out",
        GRADIENTS: "gradients-out",
        LABELS: "labels-out",
    },
    Action.BACKWARD: {GRADIENTS: "gradients-out"},
    Action.OUTPUTS: {ACTIVATIONS: "activations-out"},
}
_POOL = ThreadPoolExecutor(max_workers=1, thread_name_prefix="digest")
"""Digests are computed beside the training, not in its way."""
_AHEAD = 16
"""How many a party may leave to be computed, so that their tensors cannot fill its memory."""


@dataclass
class Kept:
    """What a party remembers between messages, besides its streams.

    Attributes
    ----------
    job : str
        The job that it agreed to, as text of the statement.
    previous : str
        Its last statement on its segment, as text.
    log_size, log_root :
        The tree head that it saw last.
    key, disclosed : str
        Keys of the watermarks of the round that goes on and of the one before, in hex;
        secrets.
    last : dict of str to str
        The owner's: digest of the last statement on each segment.
    marks : dict of str to (int, str)
        The owner's: matches and key of the watermark in each segment.
    round : int
        The round that goes on.
    chunks : dict of str to int
        The round in which a chunk came last.
    seconds, moved :
        Time in handlers, and bytes in and out, in the round so far.
    """

    job: str = ""
    previous: str = ""
    log_size: int = 0
    log_root: str = ""
    key: str = ""
    disclosed: str = ""
    last: dict[str, str] = field(default_factory=dict)
    marks: dict[str, tuple[int, str]] = field(default_factory=dict)
    round: int = 0
    chunks: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    moved: int = 0


class Attestor:
    """Measures, checks and signs for one party.

    Parameters
    ----------
    context : Context
        The node and the run.
    folder : Path
        The node's state, which keeps an identity for this run only.
    stage : int
        The party's stage, 0 for the owner.
    """

    def __init__(self, context: Context, folder: Path, stage: int) -> None:
        self.context = context
        self.folder = folder
        self.stage = stage
        self.run = str(context.run_id)
        self.options = Options.from_config(context.run_config)
        self.kept = Kept()
        self.streams: dict[int, Streams] = {}
        self._pending: deque[tuple[int, str, Position, Future[bytes]]] = deque()
        self._changed: set[int] = set()

    @cached_property
    def identity(self) -> Identity:
        """The party's identity; its public key is in the job."""
        return own_identity(self.context.node_config, self.folder)

    @property
    def job_digest(self) -> str:
        """Digest of the job, by which statements name it."""
        return digest_of(self.kept.job)

    @property
    def job(self) -> Job:
        """The job that was agreed on.

        Raises
        ------
        EvidenceError
            None was.
        """
        if not self.kept.job:
            raise EvidenceError("no job was agreed on: 'train.agree' comes before training")
        return Job.parse(self.kept.job.encode())

    # -- what goes in and out ------------------------------------------------------

    def note(
        self, action: Action, header: Header, message: Message, sent: Mapping[str, ArrayRecord]
    ) -> None:
        """Measure the tensors of a message and of its reply."""
        if action not in _IN and action not in _OUT:
            return
        segment = self.stage or header.optional("segment", 0)
        if "step" in header:
            round_, step = header.get("round", int), header.get("step", int)
            place = (round_, step, header.get("microbatch", int))
        else:
            place = (0, header.optional("chunk", 0), 0)
        came = message.content.array_records
        release = header.optional("release", header.optional("round", 0))
        if self.stage and release not in (0, self.kept.round):
            raise EvidenceError(f"a message is of round {release}, not of {self.kept.round}")
        for names, records in ((_IN.get(action), came), (_OUT.get(action), sent)):
            for name, stream in (names or {}).items():
                if name in records:
                    self.kept.moved += payload_bytes(records[name])
                    self._add(segment, stream, place, records[name], place[0] or release)

    def _add(
        self, segment: int, stream: str, place: Position, record: ArrayRecord, round_: int
    ) -> None:
        """Measure arrays as a leaf of a stream, meanwhile; `round_` is when they came."""
        arrays = snapshot(record)  # mods may change the message before its turn comes
        digest = _POOL.submit(self._measure, stream, (round_, *place[1:]), arrays)
        self._pending.append((segment, stream, place, digest))
        self.settle(_AHEAD)

    def _measure(self, stream: str, at: Position, record: ArrayRecord) -> bytes:
        """Return the digest of arrays."""
        return arrays_digest(raw_arrays(record))

    def settle(self, left: int = 0) -> None:
        """Wait for the digests that are still being computed, but for some that came last."""
        while len(self._pending) > left:
            segment, stream, place, digest = self._pending.popleft()
            self._settle(segment, stream, place, digest.result())
            self._changed.add(segment)

    def _settle(self, segment: int, stream: str, place: Position, digest: bytes) -> None:
        """Add a leaf; what was trained on cannot be put in another's place afterwards."""
        streams = self.streams.setdefault(segment, Streams())
        where = f"{segment}/{stream}/{place[1]}"
        known = streams.has(stream, place)
        if known and place[0]:
            raise EvidenceError(f"{stream} of round, step, micro-batch {place} came twice")
        changed = known and streams.digest(stream, place) != digest
        if changed and self.stage and self.kept.chunks.get(where, 0) >= self.kept.round:
            raise EvidenceError(f"chunk {place[1]} of {stream} came again as another one")
        if not place[0]:
            self.kept.chunks[where] = self.kept.round
        streams.add(stream, *place, digest)

    # -- the job -------------------------------------------------------------------

    def agree(self, header: Header, own: Mapping[str, Any]) -> str:
        """Sign the job if it is what this party was asked to do; return the envelope.

        Parameters
        ----------
        own : mapping
            What the fields of the job must be, by name.

        Raises
        ------
        EvidenceError
            The job is not a job, or differs in a field.
        TrustError
            A party's key is not the one that must be there.
        """
        text = header.get("job", str)
        job = Job.parse(text.encode())
        for name, value in {"run": self.run, **own}.items():
            if getattr(job, name) != value:
                raise EvidenceError(
                    f"the job differs from what {self.who} was set up for in {name!r}; "
                    "all parties must have the same app and run config"
                )
        role = TRAINER if self.stage else OWNER
        if job.party(role, self.stage) != self.identity.public:
            raise EvidenceError(f"the job names another key for {self.who}")
        check_keys(
            {
                in_words(p.role, p.stage): (p.role, p.stage, p.key)
                for p in job.parties
                if (p.role, p.stage) != (role, self.stage)
            },
            self.context,
            warn=not self.options.seal,  # sealing has warned of the same keys
        )
        self.kept = Kept(job=text)
        self.streams = {}
        return Envelope.sign(text.encode(), self.identity).to_json()

    @property
    def who(self) -> str:
        """What people call the party."""
        return in_words(TRAINER, self.stage) if self.stage else "the owner"

    # -- the log -------------------------------------------------------------------

    def see_log(self, header: Header) -> TreeHead:
        """Take the relay's tree head, if it grew out of the one that was seen last.

        Raises
        ------
        EvidenceError
            It is not signed by the relay, of another run, or not consistent.
        """
        text = header.get("head", str)
        if not text:
            if self.kept.log_size:
                raise EvidenceError("the relay showed no tree head; it showed one before")
            return TreeHead("", 0)
        head = LogHead.parse(Envelope.from_json(text).verify(self.job.party(RELAY, 0)))
        if head.run != self.run:
            raise EvidenceError("the tree head is of another run")
        if self.kept.log_size:
            proof = [bytes.fromhex(part) for part in header.texts("consistency")]
            old = bytes.fromhex(self.kept.log_root)
            new = bytes.fromhex(head.root)
            check_consistency(self.kept.log_size, old, head.size, new, proof)
        self.kept.log_size, self.kept.log_root = head.size, head.root
        return TreeHead(head.root, head.size)

    # -- state ---------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """Return the part of the state that is JSON."""
        return {"attest": asdict(self.kept)}

    def take_changes(self) -> Changes:
        """Return the streams that changed since the last time, as tensors."""
        self.settle()
        changed, self._changed = self._changed, set()
        return {f"{STREAMS}{segment}": self._stored(segment) for segment in changed}

    def _stored(self, segment: int) -> dict[str, Tensor] | None:
        if segment not in self.streams:
            return None
        data = bytearray(self.streams[segment].to_bytes())
        return {"leaves": torch.frombuffer(data, dtype=torch.uint8)}

    def load(
        self, facts: Mapping[str, Any], parts: Mapping[str, Mapping[str, Tensor]]
    ) -> None:
        """Set what `facts` and `take_changes` gave."""
        self.kept = Kept(**facts["attest"])
        self.streams = {
            int(name.removeprefix(STREAMS)): Streams.from_bytes(
                bytes(tensors["leaves"].numpy())
            )
            for name, tensors in parts.items()
        }


def digest_of(statement: str) -> str:
    """Return the digest by which other statements name one, from its text."""
    return hashlib.sha256(statement.encode()).hexdigest()

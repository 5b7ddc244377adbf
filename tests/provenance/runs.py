"""Signed runs without training: real statements, keys, log and files, made in milliseconds.

`Made` builds a run and writes its folder. What a test wants to be off it changes while the
run is made, so that all that follows agrees with it (`alter`, `signers`), or afterwards
(`lines`, then `write_lines` and, with the relay's help, `sign_log`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import tomli_w

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
from flwr_clicooper.provenance.dsse import Envelope
from flwr_clicooper.provenance.evidence import DisclosedKeys
from flwr_clicooper.provenance.flow import Flow, facing
from flwr_clicooper.provenance.keys import Identity
from flwr_clicooper.provenance.log import MerkleLog
from flwr_clicooper.provenance.statement import Statement
from flwr_clicooper.provenance.trust import Party, Trust
from flwr_clicooper.provenance.verify import Report
from tests.provenance.signed import TIME

OPTIONS: dict[str, Any] = {
    "release": "clean",
    "epsilon": 0.0,
    "schedule": "lockstep",
    "label-side": "trainer",
    "batch-size": 16,
    "audit-every": 0,
    "watermark": True,
    "seed": 0,
}
RECORDS = 100
PRIVACY = {"format": "flwr-clicooper/privacy/v1", "epsilon": 2.5, "words": "Nothing leaves."}
VERSIONS = {"flwr-clicooper": "0.1.0", "python": "3.12.0", "torch": "2.6.0"}
WIDTH = 128
"""Of a segment of the model: 128 x 128 weights carry a watermark."""

Alter = Callable[[str, Any], Any]
Signers = Callable[[str, list[Identity]], Sequence[Identity]]


@cache
def identity(name: str) -> Identity:
    """The same identity for the same name."""
    return Identity.new()


def sha(*parts: object) -> str:
    return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()


@dataclass(frozen=True)
class Attempt:
    """One attempt: its run, the round that it goes on from, and who is new since before."""

    run: str = "7"
    after: int = 0
    new: tuple[str, ...] = ()


@dataclass
class Made:
    """A run's evidence, as honest parties make it unless told otherwise.

    Attributes
    ----------
    attempts : sequence of Attempt
        The first, and one for each hand-over, retry and resume.
    model : bool
        Whether the owner's files are here: the model, and the watermarks' keys.
    marked : bool
        Whether the model carries the watermarks that trainers say it does.
    unsigned : int
        Segments of the model that nobody signed.
    delivered : bool
        Whether the owner signs a delivery.
    disclosed : bool
        Whether the watermarks' keys are here, also without a model.
    task_option : float
        A value of the task's; two runs that differ in it have nothing in common.
    alter : callable
        Gets the name of each statement, such as ``round 2.1`` for round 2 of segment 1, and
        the statement; returns the one to sign.
    signers : callable
        Gets that name, or ``counter 1``, and who signs it; returns who does.
    """

    folder: Path
    trainers: int = 2
    rounds: int = 2
    attempts: Sequence[Attempt] = (Attempt(),)
    options: dict[str, Any] = field(default_factory=dict)
    model: bool = False
    marked: bool = True
    unsigned: int = 0
    delivered: bool = True
    disclosed: bool = False
    task_option: float = 0.1
    alter: Alter = lambda _, statement: statement
    signers: Signers = lambda _, identities: identities

    def __post_init__(self) -> None:
        self.options = OPTIONS | self.options
        self.lines: list[Envelope] = []
        self.names: list[str] = []
        self.log = MerkleLog()
        self.parties: dict[str, Identity] = {}
        self.last: dict[int, RoundStatement] = {}
        self.own_marks: dict[int, tuple[Any, bytes]] = {}
        self.jobs: list[Job] = []
        self.digests = weights(self) if self.model else {}
        for number in range(1, len(self.attempts) + 1):
            self._attempt(number)
        if self.delivered:
            self.sign("delivery", self._delivery(), ["owner"])
            self._countersign()
        self.close()

    # -- making it -------------------------------------------------------------------

    def sign(self, name: str, statement: Statement, who: Sequence[str]) -> Any:
        """Sign a statement and append it; return it as it was signed."""
        altered = self.alter(name, statement)
        if altered is None:
            return statement  # left out
        identities = self.signers(name, [self.parties[it] for it in who])
        envelope = Envelope.sign(altered.payload(), *identities)
        self.names.append(name)
        self.lines.append(envelope)
        self.log.append(bytes.fromhex(envelope.digest))
        return altered

    def _attempt(self, number: int) -> None:
        it = self.attempts[number - 1]
        for party in ("owner", *(f"trainer {s}" for s in self.stages), "relay"):
            if party not in self.parties or party in it.new:
                self.parties[party] = identity(f"{party} of attempt {number}")
        before = self.jobs[-1] if self.jobs else None
        job = self.sign(f"job {number}", self._job(number, it, before), [*self.parties])
        self.jobs.append(job)
        seen = self.head() if before else TreeHead("", 0)
        for segment in self.stages:
            self._sign_round(segment, it.after, "start", seen, "", f"start {number}.{segment}")
        later = self.attempts[number:]
        for round_ in range(it.after + 1, (later[0].after if later else self.rounds) + 1):
            seen, given = self.head(), ""
            for segment in self.stages:
                name = f"round {round_}.{segment}"
                given = self._sign_round(segment, round_, "round", seen, given, name)

    def _job(self, number: int, it: Attempt, before: Job | None) -> Job:
        runs = [each.run for each in self.attempts[: number - 1] if each.run != it.run]
        places = [("owner", 0), *(("trainer", s) for s in self.stages), ("relay", 0)]
        keys = [self.parties[f"{role} {stage}" if stage else role] for role, stage in places]
        return Job(
            subject=hashlib.sha256(canonical(PRIVACY)).hexdigest(),
            run=it.run,
            attempt=number,
            after=it.after,
            previous=digest(before) if before else "",
            resumes=runs[-1] if runs else "",
            rounds=self.rounds,
            records=RECORDS,
            options=self.options,
            task=self.task,
            cuts=[["float32[4]"] for _ in range(self.trainers + 1)],
            initial=tuple(self.subject(segment, 0) for segment in self.stages),
            nonce=sha("nonce", number),
            parties=tuple(
                JobParty(role, stage, key.public)
                for (role, stage), key in zip(places, keys, strict=True)
            ),
        )

    def _sign_round(
        self, segment: int, round_: int, kind: str, seen: TreeHead, given: str, name: str
    ) -> str:
        job, flow = self.jobs[-1], Flow.of(self.jobs[-1])
        before, start = self.last.get(segment), kind == "start"
        mark, next_key = self.options["watermark"], self.key(segment, round_ + 1)
        committed = mark and round_ < self.rounds
        bits = 256 if mark and not start else 0
        statement = RoundStatement(
            subject=before.subject if start and before else self.subject(segment, round_),
            run=job.run,
            job=digest(job),
            kind=kind,
            segment=segment,
            round=round_,
            previous=digest(before) if before else "",
            predecessor=given,
            roots={}
            if start
            else {s: self.root(s, segment, round_) for s in self._own(segment)},
            steps=0 if start else flow.steps,
            records=0 if start else RECORDS,
            seconds=0.0 if start else 1.25,
            bytes=0 if start else 4096,
            log=seen,
            watermark=RoundMark(
                bits, hashlib.sha256(next_key).hexdigest() if committed else "", bits, ""
            ),
            time=TIME,
            versions=VERSIONS,
        )
        self.last[segment] = self.sign(name, statement, [f"trainer {segment}"])
        if kind == "round" and round_ == self.rounds and mark:
            trainer = self.parties[f"trainer {segment}"]
            self.own_marks[segment] = (trainer, self.key(segment, round_))
        return digest(self.last[segment])

    def _delivery(self) -> Delivery:
        job = self.jobs[-1]
        file = self.folder / "model.safetensors"
        return Delivery(
            subject=hashlib.sha256(file.read_bytes() if self.model else b"").hexdigest(),
            run=job.run,
            job=digest(job),
            rounds=self.rounds,
            attestations=tuple(digest(self.last[s]) for s in self.stages),
            log=self.head(),
            privacy=hashlib.sha256(canonical(PRIVACY)).hexdigest(),
            metrics={"accuracy": 0.75, "loss": 0.5},
            watermarks=tuple(
                FoundMark(256, sha256(key), 256, self.rounds, segment)
                for segment, key in self.keys().items()
            ),
            streams=tuple(
                OwnerStream(
                    release, self.root(facing(stream), segment, release), segment, stream
                )
                for release, segment, stream in Flow.of(job).of_owner(self.rounds)
            ),
            time=TIME,
            versions=VERSIONS,
        )

    def _countersign(self) -> None:
        for segment in self.stages:
            last = digest(self.last[segment])
            for place, envelope in enumerate(self.lines):
                if envelope.digest == last:
                    for it in self.signers(f"counter {segment}", [self.parties["owner"]]):
                        self.lines[place] = self.lines[place].countersigned(it)

    def close(self) -> None:
        """Write the folder; the relay signs the log as the lines are."""
        self.folder.mkdir(exist_ok=True)
        run = {"run": {"id": self.jobs[-1].run, "status": "completed"}}
        options = {**self.options, **self.task, "num-rounds": self.rounds, "link": "live"}
        self.write("run.toml", tomli_w.dumps(run | {"options": options}))
        self.write("metrics.jsonl", json.dumps({"kind": "round", "loss": 0.5}) + "\n")
        self.write("privacy.json", json.dumps(PRIVACY, indent=2) + "\n")
        if self.model or self.disclosed:
            keys = {str(segment): key.hex() for segment, key in self.keys().items()}
            job = self.jobs[-1]
            disclosed = DisclosedKeys(digest(job), keys, self.rounds, job.run)
            self.write("watermark.json", disclosed.to_bytes().decode())
        self.write_lines()
        self.sign_log()

    # -- facts of the run ------------------------------------------------------------

    @property
    def task(self) -> dict[str, float]:
        return {"task.lr": self.task_option}

    @property
    def stages(self) -> range:
        return range(1, self.trainers + 1)

    @property
    def trust(self) -> Trust:
        """A trust file that lists everybody who ever took part, trainers with their stage."""
        parties = {(it.role, it.stage, it.key) for job in self.jobs for it in job.parties}
        return Trust(
            tuple(
                Party(f"{role} {stage}, no. {i}", role, key, stage)
                for i, (role, stage, key) in enumerate(sorted(parties, key=str))
            )
        )

    def keys(self) -> dict[int, bytes]:
        """The keys of the last round's watermarks, of who still has the segment."""
        return {
            segment: key
            for segment, (trainer, key) in self.own_marks.items()
            if trainer is self.parties[f"trainer {segment}"]
        }

    def key(self, segment: int, round_: int) -> bytes:
        """The key of a round's watermark, of the attempt that goes on."""
        return hashlib.sha256(f"{len(self.jobs)}/{segment}/{round_}".encode()).digest()

    def subject(self, segment: int, round_: int) -> str:
        last = round_ == self.rounds and segment in self.digests
        return self.digests[segment] if last else sha("weights", segment, round_)

    def root(self, stream: str, segment: int, round_: int) -> str:
        """The root of a trainer's stream; both ends of a cut have the same."""
        what = stream.rpartition("-")[0]
        cut = segment - (stream in ("activations-in", "gradients-out"))
        once = Flow.of(self.jobs[-1]).once and (
            what == "labels" or (what, cut) == ("activations", 0)
        )
        place = {"labels": 0, "states": segment}.get(stream.partition("-")[0], cut)
        return sha(what or stream, place, 0 if once else round_)

    def _own(self, segment: int) -> list[str]:
        return sorted(Flow.of(self.jobs[-1]).of_segment(segment))

    def head(self) -> TreeHead:
        return TreeHead(self.log.root().hex(), self.log.size)

    # -- changing it afterwards ------------------------------------------------------

    def index(self, name: str) -> int:
        return self.names.index(name)

    def replace(self, name: str, payload: bytes, *who: Identity) -> None:
        """Put another statement in a line's place; without anybody, signatures stay."""
        place = self.index(name)
        kept = self.lines[place].signatures
        self.lines[place] = Envelope.sign(payload, *who) if who else Envelope(payload, kept)
        self.write_lines()

    def write_lines(self) -> None:
        self.write("attestations.jsonl", "".join(it.to_json() + "\n" for it in self.lines))

    def sign_log(self, alter: Alter = lambda _, it: it, who: str = "relay") -> None:
        """Let the relay close the log over the lines and files as they are now."""
        log = MerkleLog(bytes.fromhex(it.digest) for it in self.lines)
        files = {
            name: hashlib.sha256((self.folder / name).read_bytes()).hexdigest()
            for name in ("run.toml", "metrics.jsonl", "privacy.json")
        }
        head = LogHead(log.root().hex(), self.jobs[-1].run, log.size, TIME, files)
        signed = Envelope.sign(alter("log", head).payload(), self.parties[who])
        self.write("log.json", signed.to_json() + "\n")

    def write_trust(self, path: Path) -> None:
        """Write the trust file of all parties."""
        path.write_text("\n".join(party.to_toml() for party in self.trust.parties))

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)


def failed(report: Report) -> set[str]:
    return {check.name for check in report.failed}


def unchecked(report: Report) -> set[str]:
    return {check.name for check in report.checks if check.outcome == "not checked"}


def digest(statement: Statement) -> str:
    return hashlib.sha256(statement.payload()).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def weights(made: Made) -> dict[int, str]:
    """Write a model that carries the last round's watermarks; return its segments' digests."""
    import torch
    from safetensors.torch import save
    from torch import nn

    from flwr_clicooper.chain.delivered import digest as segment_digest
    from flwr_clicooper.provenance.watermark import Watermark

    made.folder.mkdir(exist_ok=True)
    trained = [it for it in made.attempts if it.after < made.rounds]
    made.jobs = trained  # type: ignore[assignment]  # `key` counts them
    own, tensors = {}, {"0.weight": torch.ones(2, 2)}
    for segment in range(1, made.trainers + made.unsigned + 1):
        torch.manual_seed(segment)
        module = nn.Linear(WIDTH, WIDTH)
        if made.marked:
            Watermark(made.key(segment, made.rounds), module.state_dict()).top_up(module)
        state = {k: v.detach().clone() for k, v in module.state_dict().items()}
        own[segment] = segment_digest(state)
        tensors |= {f"{segment}.{k}": v for k, v in state.items()}
    made.jobs = []
    path = made.folder / "model.safetensors"
    path.write_bytes(save(tensors, {"format": "flwr-clicooper/model/v1"}))
    return own

"""Which streams cross between whom in a run, as its job says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from flwr_clicooper.errors import EvidenceError
from flwr_clicooper.provenance.attestation import Job
from flwr_clicooper.provenance.fields import choice, integer, number

OwnerPlace = tuple[int, int, str]
"""Release (the round, 0 for once), the trainer's segment, and the owner's stream."""
_RELEASES = ("clean", "local-dp", "central-dp", "interactive")


@dataclass(frozen=True)
class Flow:
    """What crosses the cuts of a run.

    Attributes
    ----------
    trainers : int
        Their number.
    steps : int
        Optimizer steps in a round.
    head_trains : bool
        Whether the owner gives activations step by step and gets gradients.
    once : bool
        Whether the owner gives activations and labels once, before training.
    local : bool
        Whether each trainer trains by itself.
    owner_loss : bool
        Whether the owner has the last segment and the labels.
    audited : bool
        Whether trainers commit to their states.
    """

    trainers: int
    steps: int
    head_trains: bool
    once: bool
    local: bool
    owner_loss: bool
    audited: bool

    @classmethod
    def of(cls, job: Job) -> Flow:
        """Return the flow of a job.

        Raises
        ------
        EvidenceError
            An option that it depends on is missing or has a value that is not allowed.
        """
        options = job.options
        for name, kind in (
            ("release", choice(*_RELEASES)),
            ("schedule", choice("lockstep", "local")),
            ("label-side", choice("trainer", "owner")),
            ("epsilon", number(0)),
            ("batch-size", integer(1)),
            ("audit-every", integer()),
        ):
            if name not in options:
                raise EvidenceError(f"a job has no option {name!r}")
            kind(options[name], f"a job: option {name!r}")
        interactive = options["release"] == "interactive"
        return cls(
            trainers=job.trainers,
            steps=-(-job.records // options["batch-size"]),
            head_trains=interactive and options["epsilon"] == 0,
            once=not interactive,
            local=options["schedule"] == "local",
            owner_loss=options["label-side"] == "owner",
            audited=options["audit-every"] > 0,
        )

    def of_segment(self, segment: int) -> frozenset[str]:
        """Return the streams that a trainer's statement of a round must have."""
        last = segment == self.trainers
        present = {
            "activations-in": True,
            "activations-out": not last or self.owner_loss,
            "gradients-in": not self.local and (not last or self.owner_loss),
            "gradients-out": not self.local and (segment > 1 or self.head_trains),
            "labels-in": not self.owner_loss and (last or self.local),
            "states": self.audited,
        }
        return frozenset(stream for stream, occurs in present.items() if occurs)

    def of_owner(self, rounds: int) -> Iterator[OwnerPlace]:
        """Yield the owner's own streams; the delivery must have exactly these."""
        takers = range(1, self.trainers + 1) if self.local else (self.trainers,)
        for release in (0,) if self.once else range(1, rounds + 1):
            yield release, 1, "activations-out"
            if not self.owner_loss:
                yield from ((release, taker, "labels-out") for taker in takers)
        for round_ in range(1, rounds + 1):
            if self.head_trains:
                yield round_, 1, "gradients-in"
            if self.owner_loss:
                yield round_, self.trainers, "activations-in"
                yield round_, self.trainers, "gradients-out"


def facing(stream: str) -> str:
    """Return what the party at the other end calls a stream, such as ``labels-in``."""
    name, _, way = stream.rpartition("-")
    return f"{name}-{'in' if way == 'out' else 'out'}"

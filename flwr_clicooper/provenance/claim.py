"""Answers which trainer's watermark, of which round, a model carries."""

from __future__ import annotations

import hmac
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import Tensor

from flwr_clicooper.errors import EvidenceError
from flwr_clicooper.provenance.watermark import (
    BITS,
    Watermark,
    commitment,
    inside,
    is_accepted,
    log2_false_positive,
    too_small,
)

if TYPE_CHECKING:
    from flwr_clicooper.provenance.realign import Verdict


@dataclass(frozen=True)
class WatermarkKey:
    """A disclosed key, and what it is the key of.

    Attributes
    ----------
    run : str
        The run's ID.
    segment, round : int
        Whose watermark, after which round.
    key : bytes
        32 bytes; they do not show in a representation.
    commitment : str
        The SHA-256 in hex that was published before the round.
    """

    run: str
    segment: int
    round: int
    key: bytes = field(repr=False)
    commitment: str


@dataclass(frozen=True)
class Finding:
    """What one key finds in a suspect.

    Attributes
    ----------
    run : str
        The run's ID.
    segment, round : int
        Whose watermark, after which round.
    matches, bits : int
        Bits found, of how many.
    log2_false_positive : float
        A bound on the probability that any comparison of the claim finds as many by chance,
        as a power of two.
    accepted : bool
        Whether the suspect carries this watermark.
    skipped : str
        Why the suspect cannot carry it, or empty.
    aligned : Verdict or None
        What it shows after its units were put back, if that was asked for.
    """

    run: str
    segment: int
    round: int
    matches: int
    bits: int
    log2_false_positive: float
    accepted: bool
    skipped: str = ""
    aligned: Verdict | None = None

    @property
    def carried(self) -> bool:
        """Whether the suspect carries this watermark, as it is or re-aligned."""
        return self.accepted or (self.aligned is not None and self.aligned.accepted)

    def as_dict(self) -> dict[str, object]:
        """Return what JSON takes."""
        aligned = self.aligned and self.aligned.as_dict()
        return {**vars(self), "aligned": aligned}


@dataclass(frozen=True)
class ClaimReport:
    """What all keys find in a suspect.

    Attributes
    ----------
    findings : tuple of Finding
        One per key, in the order of the keys.
    tests : int
        Comparisons made, which every bound accounts for.
    """

    findings: tuple[Finding, ...]
    tests: int

    @property
    def accepted(self) -> tuple[Finding, ...]:
        """The watermarks that the suspect carries."""
        return tuple(finding for finding in self.findings if finding.carried)

    def as_dict(self) -> dict[str, object]:
        """Return what JSON takes; no keys."""
        return {
            "accepted": bool(self.accepted),
            "tests": self.tests,
            "findings": [finding.as_dict() for finding in self.findings],
        }

    def with_aligned(self, verdicts: Sequence[Verdict]) -> ClaimReport:
        """Return the report with what each key finds after re-alignment, in its order."""
        found = zip(self.findings, verdicts, strict=True)
        return replace(self, findings=tuple(replace(it, aligned=v) for it, v in found))


def claim(
    suspect: Mapping[str, Tensor], keys: Sequence[WatermarkKey], *, suspects: int = 1
) -> ClaimReport:
    """Look for watermarks in a suspect's weights.

    Parameters
    ----------
    suspect : mapping of str to Tensor
        Its tensors: of a delivered model, where the weights of segment 1 are called
        ``1.<name>``, or of a segment alone.
    keys : sequence of WatermarkKey
        Whose watermarks are looked for, at least one.
    suspects : int
        Models that are looked at in all; for the bound.

    Raises
    ------
    EvidenceError
        There is no key, a key is not the one committed to, ``suspects`` is below 1, or a
        weight is NaN or infinite.
    """
    if not keys or suspects < 1:
        raise EvidenceError(
            f"{len(keys)} watermark keys and {suspects} suspects; allowed is 1 or more of each"
        )
    for key in keys:
        if not hmac.compare_digest(commitment(key.key), key.commitment):
            raise EvidenceError(
                f"the watermark key of run {key.run}, segment {key.segment}, round "
                f"{key.round} is not the one committed to before the round"
            )
    found = [
        [
            Watermark(key.key, layout).matches(layout)
            for layout in _layouts(suspect, key.segment)
        ]
        for key in keys
    ]
    tests = max(1, sum(map(len, found))) * suspects
    reason = too_small(suspect)
    return ClaimReport(
        tuple(
            Finding(
                run=key.run,
                segment=key.segment,
                round=key.round,
                matches=(matches := max(each, default=0)),
                bits=BITS,
                log2_false_positive=log2_false_positive(matches, tests),
                accepted=is_accepted(matches, tests),
                skipped="" if each else reason,
            )
            for key, each in zip(keys, found, strict=True)
        ),
        tests,
    )


def _layouts(suspect: Mapping[str, Tensor], segment: int) -> Iterator[Mapping[str, Tensor]]:
    """Yield the segment's weights in a delivered model, and all as those of one segment."""
    for layout in (inside(suspect, f"{segment}."), suspect):
        if not too_small(layout):
            yield layout

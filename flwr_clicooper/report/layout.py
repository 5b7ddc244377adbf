"""Where the statements of a run stand in its picture: rounds across, segments down."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from flwr_clicooper.provenance.attestation import RoundStatement
from flwr_clicooper.provenance.evidence import Line
from flwr_clicooper.report.facts import Facts

WIDE, THIN = 132, 9
"""Widths of a column whose cells have text, and of a folded one."""
LINK, SEAM, BETWEEN = 24, 2, 48
"""Gaps: before a wide column, between folded ones, and between attempts."""

_ROOM = 12
"""Columns of an attempt that all stay wide."""
_FIRST, _LAST = 2, 2
"""Rounds at both ends of an attempt that stay wide in any case."""
_WRONG = 6
"""Rounds with a failed check that stay wide at most."""


@dataclass(frozen=True)
class Column:
    """The statements of one round, or of the start of an attempt.

    Attributes
    ----------
    attempt : int
        Place in the run's attempts; one more than the last for statements of no job.
    kind : str
        ``start`` or ``round``.
    round : int
        Which, or after which.
    cells : dict of int to Line
        By segment.
    x, width : int
        Where it stands.
    """

    attempt: int
    kind: str
    round: int
    cells: dict[int, Line[RoundStatement]] = field(default_factory=dict)
    x: int = 0
    width: int = WIDE

    @property
    def wide(self) -> bool:
        """Whether its cells have text."""
        return self.width == WIDE


@dataclass(frozen=True)
class Grid:
    """All columns and rows.

    Attributes
    ----------
    attempts : tuple of tuple of Column
        Columns from left to right, by attempt.
    segments : tuple of int
        From top to bottom.
    end : int
        Where the last column ends.
    """

    attempts: tuple[tuple[Column, ...], ...]
    segments: tuple[int, ...]
    end: int


def grid_of(facts: Facts, x: int) -> Grid:
    """Return the grid of a run's statements; every one of them has a cell.

    Parameters
    ----------
    x : int
        Where the first column begins.
    """
    attempts = []
    for columns in _by_attempt(facts):
        placed: list[Column] = []
        for column in _folded(facts, columns):
            before = placed[-1] if placed else None
            if before is not None:
                x += LINK if column.wide or before.wide else SEAM
            placed.append(replace(column, x=x))
            x += column.width
        attempts.append(tuple(placed))
        x += BETWEEN
    job = facts.job
    segments = {*range(1, job.trainers + 1)} if job else set()
    segments |= set(facts.evidence.segments)
    return Grid(tuple(attempts), tuple(sorted(segments)), x - BETWEEN * bool(attempts))


def _by_attempt(facts: Facts) -> list[list[Column]]:
    """Return the columns of each attempt; a place that is taken twice makes another one."""
    evidence = facts.evidence
    count = len(evidence.jobs)
    found: list[dict[tuple[bool, int], list[Column]]] = [{} for _ in range(count + 1)]
    for number, job in enumerate(evidence.jobs):
        start = Column(number, "start", job.statement.after)
        found[number][False, start.round] = [start]
    for line in evidence.rounds:
        it, number = line.statement, evidence.attempts.get(line.statement.job, count)
        columns = found[number].setdefault((it.kind == "round", it.round), [])
        free = next((c for c in columns if it.segment not in c.cells), None)
        if free is None:
            columns.append(free := Column(number, it.kind, it.round))
        free.cells[it.segment] = line
    if not found[-1]:
        found.pop()
    return [[c for key in sorted(each) for c in each[key]] for each in found]


def _folded(facts: Facts, columns: list[Column]) -> list[Column]:
    """Fold the middle rounds of a long attempt; rounds that failed stay as they are."""
    if len(columns) <= _ROOM:
        return columns
    ends = {*range(_FIRST + 1), *range(len(columns) - _LAST, len(columns))}
    wrong = [
        place
        for place, column in enumerate(columns)
        if place not in ends
        and any(facts.round_state(line) == "failed" for line in column.cells.values())
    ]
    wide = ends | {*wrong[:_WRONG]}
    return [c if i in wide else replace(c, width=THIN) for i, c in enumerate(columns)]

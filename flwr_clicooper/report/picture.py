"""A run as a picture: the owner's release, the chain by round and segment, the delivery."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from flwr_clicooper.provenance.attestation import RoundStatement
from flwr_clicooper.provenance.checking import ACCEPT
from flwr_clicooper.provenance.evidence import Line
from flwr_clicooper.report.ends import TALL, TOP, delivery, log, owner, owner_links, who
from flwr_clicooper.report.facts import Facts
from flwr_clicooper.report.layout import LINK, THIN, WIDE, Column, Grid, grid_of
from flwr_clicooper.report.svg import (
    CLASSES,
    box,
    card,
    count,
    cut,
    escaped,
    path,
    seconds,
    text,
    titled,
)

HEIGHT, GAP = 80, 30
"""Of a cell, and between two."""
JOB = 62
"""Height of the card of a job."""
FIRST_ROW = TOP + JOB + 34
LEFT, RIGHT = 272, 50
"""Where the chain begins, and what is between it and the delivery."""
SHRUNK = 0.85
"""How small a picture becomes before it scrolls."""


def picture(facts: Facts) -> tuple[str, int]:
    """Return the SVG of a run, well-formed XML in the page's classes, and its width."""
    grid = grid_of(facts, LEFT)
    rows = {segment: FIRST_ROW + i * (HEIGHT + GAP) for i, segment in enumerate(grid.segments)}
    bottom = max(rows.values(), default=TOP) + HEIGHT
    width = grid.end + RIGHT + TALL + 20
    parts = [
        *(_panel(columns, bottom) for columns in grid.attempts),
        *_folds(grid, rows),
        *_links(grid, rows),
        *(_column(facts, column, rows) for each in grid.attempts for column in each),
        *_jobs(facts, grid),
        owner(facts, bottom),
        owner_links(facts, rows, HEIGHT),
        *_arrivals(facts, grid, rows),
        delivery(facts, grid.end + RIGHT, bottom),
        log(facts, bottom, width),
    ]
    what = f"Lineage of run {escaped(facts.report.run)}"
    height = bottom + 108
    size = f"max-width:{width}px;min-width:{width * SHRUNK:.0f}px"
    head = (
        f'<svg viewBox="0 0 {width} {height}" style="{size}" role="img" aria-label="{what}">'
    )
    return f"{head}{''.join(parts)}</svg>", width


# -- attempts ------------------------------------------------------------------------------


def _panel(columns: tuple[Column, ...], bottom: int) -> str:
    """Return the ground of an attempt."""
    x, end = columns[0].x - 14, columns[-1].x + columns[-1].width + 14
    return box(x, TOP - 12, end - x, bottom - TOP + 26, "panel", 12)


def _jobs(facts: Facts, grid: Grid) -> Iterator[str]:
    """Yield the cards of jobs above their starts, and the headings of rounds."""
    for columns in grid.attempts:
        for column in columns:
            if column.wide and column.kind == "round":
                yield text(
                    column.x + WIDE / 2, FIRST_ROW - 12, f"round {column.round}", "head"
                )
        number = columns[0].attempt
        if number < len(facts.evidence.jobs):
            yield _job(facts, number, columns[0].x)
        else:
            yield text(columns[0].x, TOP + 20, "of no job here", "strong")


def _job(facts: Facts, number: int, x: int) -> str:
    line, words = facts.evidence.jobs[number], facts.attempts[number]
    state = facts.state(line.where, "agreement")
    job = line.statement
    how = {
        "begins": words,
        "tried": f"retry after {job.after}",
        "resumes": f"resumes after {job.after}",
        "hand-over": f"hand-over after {job.after}",
    }.get(words.split()[0], f"after round {job.after}")
    inside = (
        card(x, TOP, WIDE, JOB, state)
        + text(x + 14, TOP + 20, f"Attempt {job.attempt}", "strong")
        + text(x + 14, TOP + 37, cut(how, 18), "small")
        + text(x + 14, TOP + 53, line.digest[:8], "mono")
    )
    title = f"Job of attempt {job.attempt} of run {job.run}, which {words}."
    return titled(_title(facts, line.where, title), inside, f"line-{line.index + 1}")


# -- cells ---------------------------------------------------------------------------------


def _column(facts: Facts, column: Column, rows: dict[int, int]) -> str:
    return "".join(
        _cell(facts, column, column.cells[segment], y)
        if segment in column.cells
        else _missing(column, segment, y)
        for segment, y in rows.items()
    )


def _missing(column: Column, segment: int, y: int) -> str:
    what = "start" if column.kind == "start" else f"round {column.round}"
    inside = box(column.x, y, column.width, HEIGHT, "missing")
    if column.wide:
        inside += text(column.x + WIDE / 2, y + HEIGHT / 2 + 4, "no statement", "head")
    return titled(f"There is no statement on the {what} of segment {segment}.", inside)


def _cell(facts: Facts, column: Column, line: Line[RoundStatement], y: int) -> str:
    state = facts.round_state(line)
    if not column.wide:
        inside = box(column.x, y, THIN, HEIGHT, f"thin {CLASSES[state]}", 2)
    else:
        inside = card(column.x, y, WIDE, HEIGHT, state)
        start = line.statement.kind == "start"
        x = column.x + 14
        inside += _start(facts, line, x, y) if start else _round(line, x, y)
    return titled(_title(facts, line.where, _words(facts, line)), inside, _target(line))


def _start(facts: Facts, line: Line[RoundStatement], x: int, y: int) -> str:
    key, job = facts.trainer(line), facts.evidence.job_of(line)
    it = line.statement
    parts = [
        text(x, y + 20, cut(f"Segment {it.segment}", 16), "strong"),
        *who(facts, key, x, y + 38),
        text(x, y + 69, it.subject[:8], "mono soft"),
    ]
    if job is not None and it.segment in facts.handed_over(job):
        parts.append(box(x + 36, y - 15, 74, 18, "handed", 9))
        parts.append(text(x + 73, y - 2, "hand-over", "badge"))
    return "".join(parts)


def _round(line: Line[RoundStatement], x: int, y: int) -> str:
    it, mark = line.statement, line.statement.watermark
    parts = [
        text(x, y + 20, f"{count(it.steps)} steps", "strong"),
        text(x, y + 36, f"{count(it.records)} records", "small"),
        text(x, y + 69, it.subject[:8], "mono soft"),
        text(x + WIDE - 26, y + 69, seconds(it.seconds), "end soft"),
    ]
    if not mark.bits:
        return "".join([*parts, text(x, y + 53, "no watermark", "none")])
    filled = 48 * mark.matches / mark.bits
    kind = "full" if mark.matches >= ACCEPT else "little"
    return "".join(
        [
            *parts,
            box(x, y + 46, 48, 6, "rail", 3),
            box(x, y + 46, filled, 6, kind, 3),
            path(f"M{x + 48 * ACCEPT / mark.bits:g} {y + 44}v10", "least"),
            text(x + 56, y + 53, f"{mark.matches}/{mark.bits}", "small"),
        ]
    )


def _words(facts: Facts, line: Line[RoundStatement]) -> str:
    it, mark, by = line.statement, line.statement.watermark, facts.trainer_name(line)
    what = "Start" if it.kind == "start" else "Round"
    text = f"{what} {it.round} of segment {it.segment} by {by}, {it.time}"
    if it.kind == "round":
        watermark = f"{mark.matches} of {mark.bits}" if mark.bits else mark.skipped or "none"
        text += (
            f": {it.steps:,} steps on {it.records:,} records in {it.seconds:g} s; watermark: "
            f"{watermark}"
        )
    return f"{text}; segment {it.subject[:16]}, statement {line.digest[:16]}"


def _title(facts: Facts, where: str, words: str) -> str:
    return "\n".join(map(escaped, (words, *facts.wrong.get(where, ())[:3])))


def _target(line: Line[RoundStatement]) -> str:
    return f"line-{line.index + 1}"


# -- links ---------------------------------------------------------------------------------


def _folds(grid: Grid, rows: dict[int, int]) -> Iterator[str]:
    """Yield what holds folded rounds together, and which they are."""
    for columns in grid.attempts:
        for wide, group in groupby(columns, lambda column: column.wide):
            if wide:
                continue
            folded = list(group)
            x, end = folded[0].x, folded[-1].x + THIN
            for y in rows.values():
                yield path(f"M{x - LINK} {y + HEIGHT / 2:g}H{end + LINK}", "link")
            for column in folded:
                if column.round % 10 == 0:
                    yield text(column.x + THIN / 2, FIRST_ROW - 12, column.round, "tick")
            what = f"rounds {folded[0].round} to {folded[-1].round}, folded"
            yield text((x + end) / 2, FIRST_ROW - 30, what, "head")


def _links(grid: Grid, rows: dict[int, int]) -> Iterator[str]:
    """Yield the arrows to wide cells, from the statement before and the segment above."""
    above = dict(zip(grid.segments[1:], grid.segments, strict=False))
    columns = [column for each in grid.attempts for column in each]
    places = {line.digest: c for c in columns for line in c.cells.values()}
    for column in columns:
        for segment, line in column.cells.items() if column.wide else ():
            y, it = rows[segment], line.statement
            if it.previous:
                yield _in_time(places.get(it.previous), column, y + HEIGHT // 2)
            giver = column.cells.get(above.get(segment, 0))
            if it.kind == "start":
                yield path(f"M{column.x + WIDE / 2:g} {y}v{-GAP}", "link faint")
            elif it.predecessor:
                held = giver is not None and giver.digest == it.predecessor
                kind = "arrow" if held else "arrow broken"
                yield path(f"M{column.x + WIDE / 2:g} {y - GAP + 1}V{y - 3}", kind)


def _in_time(before: Column | None, column: Column, y: int) -> str:
    """Return the arrow from the statement before on a segment; it is broken if that is not."""
    x = column.x - 3
    if before is None or before.x >= column.x:
        return path(f"M{x - LINK + 6} {y}H{x}", "arrow broken")
    end = before.x + before.width
    return path(f"M{end + 1} {y}H{x}", "arrow" if x - end < 3 * LINK else "arrow far")


def _arrivals(facts: Facts, grid: Grid, rows: dict[int, int]) -> Iterator[str]:
    """Yield the arrows into the delivery, which names the last statement of each segment."""
    delivered = facts.evidence.deliveries
    named = set(delivered[-1].statement.attestations) if delivered else set()
    columns = [column for each in grid.attempts for column in each]
    last = {s: c for c in columns for s, line in c.cells.items() if line.digest in named}
    for segment, column in last.items():
        y = rows[segment] + HEIGHT / 2
        yield path(f"M{column.x + column.width + 1} {y:g}H{grid.end + RIGHT - 3}", "arrow")

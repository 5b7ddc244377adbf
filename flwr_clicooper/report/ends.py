"""The ends of a run's picture: the owner's release, the delivery, and the log."""

from __future__ import annotations

from collections.abc import Mapping

from flwr_clicooper.errors import EvidenceError
from flwr_clicooper.provenance.attestation import Job
from flwr_clicooper.provenance.evidence import LINES_FILE, LOG_FILE
from flwr_clicooper.provenance.flow import Flow
from flwr_clicooper.provenance.keys import PublicIdentity
from flwr_clicooper.report.facts import Facts, option
from flwr_clicooper.report.svg import box, card, count, cut, escaped, path, text, titled

TOP = 26
"""Where the uppermost cards begin."""
TALL = 172
"""Width of the cards at both ends."""
_X = 20

_OWNER = ("privacy as agreed", "owner's streams")
_DELIVERED = ("delivery", "countersignatures")
_FILES = (
    *("model file", "segments of the model", "watermarks", "watermarks in the model"),
    *("disclosed keys", "privacy as delivered"),
)
_LOG = ("log", "tree heads")
_COVERED = ("files", "options")


def owner(facts: Facts, bottom: int) -> str:
    """Return the card of what the owner gives."""
    job = facts.job
    if job is None:
        return box(_X, TOP, TALL, bottom - TOP, "missing")
    key, x = job.party("owner"), _X + 14
    crossing = ", ".join(job.cuts[0]) if job.cuts else ""
    lines = [
        ("Owner's release", "strong"),
        *_named(facts, key),
        ("", ""),
        (cut(option(job, "release"), 18), "strong"),
        (f"{count(job.records)} records", "small"),
        (cut(crossing, 20), "mono soft"),
        (f"privacy {job.subject[:8]}", "mono soft"),
    ]
    inside = card(_X, TOP, TALL, bottom - TOP, facts.outcome(_OWNER))
    title = f"The owner, {facts.name(key)}, releases: {option(job, 'release')}"
    words = "\n".join(map(escaped, (title, *facts.failed(*_OWNER))))
    return titled(words, inside + _stack(x, lines))


def owner_links(facts: Facts, rows: Mapping[int, int], height: int) -> str:
    """Return the arrows between the owner and the chain, each with what crosses."""
    if facts.job is None:
        return ""
    parts = []
    for segment, streams in _owner_streams(facts.job).items():
        if segment not in rows:
            continue
        step = min(24, height / len(streams))
        y = rows[segment] + height / 2 - step * (len(streams) - 1) / 2 + 4
        for i, stream in enumerate(streams):
            name, _, way = stream.rpartition("-")
            ends = (_X + TALL + 2, 269) if way == "out" else (269, _X + TALL + 3)
            parts.append(path(f"M{ends[0]} {y + i * step:g}H{ends[1]}", "arrow"))
            parts.append(text(232, y + i * step - 5, name, "tick"))
    return "".join(parts)


def _owner_streams(job: Job) -> dict[int, list[str]]:
    """Return by segment what it gets from the owner or gives to it."""
    found: dict[int, list[str]] = {}
    try:
        for _, segment, stream in Flow.of(job).of_owner(1):
            found.setdefault(segment, []).append(stream)
    except EvidenceError:  # that the job does not say it is a check
        pass
    return found


def delivery(facts: Facts, x: int, bottom: int) -> str:
    """Return the card of what was delivered; a run that was not has an empty one."""
    height = bottom - TOP
    if not facts.evidence.deliveries:
        inside = box(x, TOP, TALL, height, "missing")
        inside += text(x + TALL / 2, TOP + height / 2, "not delivered", "head")
        title = "\n".join(
            map(escaped, ("There is no delivery.", *facts.wrong.get(LINES_FILE, ())))
        )
        return titled(title, inside)
    line, job = facts.evidence.deliveries[-1], facts.job
    it = line.statement
    lines = [
        ("Delivery", "strong"),
        *(_named(facts, job.party("owner")) if job else ()),
        (_time(it.time), "soft"),
        ("", ""),
        *(
            (f"{cut(name, 14)} {_figure(v)}", "strong")
            for name, v in [*it.metrics.items()][:2]
        ),
        (f"watermarks {len(it.watermarks)} of {len(it.attestations)}", "small"),
        (f"model {it.subject[:8]}", "mono soft"),
    ]
    inside = card(x, TOP, TALL, height, facts.outcome(_DELIVERED, *_FILES))
    words = f"Delivery of model.safetensors {it.subject}, {it.time}"
    title = "\n".join(map(escaped, (words, *facts.failed(*_DELIVERED, *_FILES))))
    return titled(title, inside + _stack(x + 14, lines), f"line-{line.index + 1}")


def log(facts: Facts, bottom: int, width: int) -> str:
    """Return the band of the relay's log, which is below everything."""
    y, head, job = bottom + 36, facts.evidence.head, facts.job
    if head is None or job is None:
        inside = box(_X, y, width - 40, 52, "missing")
        inside += text(_X + 14, y + 30, f"{LOG_FILE} cannot be read", "small")
        return titled("There is no tree head.", inside)
    it, relay = head.statement, job.party("relay")
    inside = card(_X, y, width - 40, 52, facts.outcome(_LOG, *_COVERED))
    files = ", ".join(it.files) or "no file"
    what = f"{it.size:,} statements, {_time(it.time)}; covers {cut(files, 50)}"
    said = f"{cut(facts.name(relay), 30)}: {what}"
    inside += text(_X + 14, y + 21, "Relay's log", "strong") + text(
        _X + 14, y + 39, said, "small"
    )
    inside += text(width - 60, y + 21, f"root {it.root[:8]}", "mono end")
    words = (f"The tree head: root {it.root}", *facts.failed(*_LOG, *_COVERED))
    return titled("\n".join(map(escaped, words)), inside)


def who(facts: Facts, key: PublicIdentity | None, x: int, y: int) -> list[str]:
    """Return who a party is in two lines, of which the second may be empty."""
    if key is None:
        return [text(x, y, "unknown", "small")]
    lines = _named(facts, key)
    return [text(x, y + 15 * i, value, kind) for i, (value, kind) in enumerate(lines)]


def _named(facts: Facts, key: PublicIdentity) -> list[tuple[str, str]]:
    """Return a party's name, if it is known, and the beginning of its fingerprint."""
    name = facts.names.get(key)
    known = [(cut(name, 18), "small")] if name else []
    return [*known, (key.fingerprint[:14], "mono")]


def _stack(x: int, lines: list[tuple[str, str]]) -> str:
    """Return lines of text below one another; an empty one is half as high."""
    parts, y = [], TOP + 20
    for value, kind in lines:
        parts.append(text(x, y, value, kind) if value else "")
        y += 18 if value else 9
    return "".join(parts)


def _time(moment: str) -> str:
    return moment.replace("T", " ").rstrip("Z")


def _figure(value: float) -> str:
    return f"{value:.4g}"

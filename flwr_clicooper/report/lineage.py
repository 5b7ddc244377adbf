"""The lineage of a run as a page: one HTML file that needs nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from flwr_clicooper.provenance.attestation import RoundStatement
from flwr_clicooper.provenance.checking import Outcome, Report
from flwr_clicooper.provenance.evidence import Line, RunEvidence
from flwr_clicooper.provenance.keys import PublicIdentity
from flwr_clicooper.provenance.statement import Statement
from flwr_clicooper.report.facts import Facts
from flwr_clicooper.report.picture import picture
from flwr_clicooper.report.style import CSS
from flwr_clicooper.report.svg import CLASSES, box, escaped, icon, path
from flwr_clicooper.report.terms import job_rows, party_rows

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Lineage of run {run}</title>
<style>{css}</style>
</head>
<body>
<main style="max-width:{width}px">
<h1>Lineage of run {run}</h1>
<p class="soft">Who trained which part of the model, in which order, on what, as its parties
signed it.</p>
{verdict}
{figure}
{sections}
</main>
</body>
</html>
"""
_MARGINS = 50
"""What is left and right of the picture on the page."""
_TIPS = (
    '<svg width="0" height="0" style="position:absolute" aria-hidden="true"><defs>'
    '<marker id="{}" viewBox="0 0 8 8" refX="6.5" refY="4" markerWidth="7" markerHeight="7" '
    'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 .5 7.5 4 0 7.5z"/></marker>'
    "</defs></svg>"
)
_CAPTION = (
    "From left to right, rounds; from top to bottom, segments. The eight digits are the "
    "beginning of a SHA-256: of the weights after the round, of the job, of the model. Each "
    "cell leads to its statement in full."
)


def lineage_html(
    evidence: RunEvidence,
    report: Report,
    *,
    names: Mapping[PublicIdentity, str] | None = None,
    privacy: Sequence[str] = (),
    faults: Mapping[str, tuple[str, ...]] | None = None,
) -> str:
    """Return the page of a run, as one file without scripts and without links to others.

    Parameters
    ----------
    evidence : RunEvidence
        The run's statements; those of an empty one if they cannot be read.
    report : Report
        What verifying them gave.
    names : mapping of PublicIdentity to str, optional
        What parties are called.
    privacy : sequence of str
        The words of the privacy statement.
    faults : mapping of str to tuple of str, optional
        All that is off, by the place where, as `facts_of` finds it; a report has only the
        first of each check.
    """
    return page_of(Facts(evidence, report, names or {}, tuple(privacy), faults or {}))


def page_of(facts: Facts) -> str:
    """Return the page of a run; see `lineage_html`."""
    sections = (_job(facts), _parties(facts), _checks(facts), _privacy(facts), _all(facts))
    figure, width = _figure(facts)
    return _PAGE.format(
        run=escaped(facts.report.run or "(none)"),
        css=CSS,
        width=max(width, 1180) + _MARGINS,
        verdict=_verdict(facts),
        figure=figure,
        sections="\n".join(filter(None, sections)),
    )


def _verdict(facts: Facts) -> str:
    state: Outcome = "passed" if facts.report.ok else "failed"
    title = "The evidence holds" if facts.report.ok else "The evidence does not hold"
    failed = "".join(
        f"<li>{escaped(f'{it.name}: {it.what}')}</li>" for it in facts.report.failed
    )
    said = f"<b>{title}</b>{escaped(_counts(facts.report))}" + (
        f"<ul>{failed}</ul>" * bool(failed)
    )
    if not facts.names:
        said += "<div>No trust file was given: whose keys these are is unknown.</div>"
    sign = f'<svg width="20" height="20" aria-hidden="true">{icon(10, 10, state)}</svg>'
    return f'<div class="verdict {CLASSES[state]}">{sign}<div>{said}</div></div>'


def _counts(report: Report) -> str:
    """Return how many checks had which outcome."""
    found = Counter(it.outcome for it in report.checks)
    return "Checks: " + ", ".join(f"{found[it]} {it}" for it in CLASSES if found[it]) + "."


def _figure(facts: Facts) -> tuple[str, int]:
    """Return the picture with its legend, and how wide it is at most."""
    if not facts.evidence.lines:
        return "<p>There are no statements to show.</p>", 0
    drawn, width = picture(facts)
    tips = _TIPS.format("tip") + _TIPS.format("broken")
    return (
        f'{tips}<figure><div class="wide">{drawn}</div>{_legend()}'
        f"<figcaption>{_CAPTION}</figcaption></figure>"
    ), width


def _legend() -> str:
    arrow = path("M1 10H29", "arrow")
    mark = (
        box(0, 7, 26, 6, "rail", 3) + box(0, 7, 24, 6, "full", 3) + path("M21 5v10", "least")
    )
    swatches = [
        *(
            (box(1, 1, 28, 18, f"card {kind}") + icon(15, 10, s), s)
            for s, kind in CLASSES.items()
        ),
        (box(1, 1, 28, 18, "missing"), "missing"),
        (arrow, "names the statement before it"),
        (path("M1 10H27", "arrow broken"), "does not name it"),
        (mark, "watermark: bits that are there, and how many must be"),
        (box(1, 2, 28, 16, "handed", 8), "another trainer takes over"),
    ]
    items = (
        f'<li><svg width="30" height="20" aria-hidden="true">{drawn}</svg>{said}</li>'
        for drawn, said in swatches
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


# -- sections ------------------------------------------------------------------------------


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>"


def _table(head: Sequence[str], rows: Iterator[str], kind: str = "") -> str:
    titles = "".join(f"<th>{title}</th>" for title in head)
    return (
        f'<div style="overflow-x:auto"><table class="{kind}"><thead><tr>{titles}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _job(facts: Facts) -> str:
    if facts.job is None:
        return ""
    pairs = "".join(
        f"<dt>{name}</dt><dd>{escaped(value)}</dd>" for name, value in job_rows(facts)
    )
    return _section("Job", f'<dl class="facts">{pairs}</dl>')


def _parties(facts: Facts) -> str:
    if facts.job is None:
        return ""
    return _section(
        "Parties",
        _table(
            ("role", "name", "fingerprint", "public key"),
            (
                f"<tr><td>{escaped(role)}</td><td>{escaped(name)}</td>"
                f"<td><code>{escaped(key.fingerprint)}</code></td>"
                f"<td><code>{escaped(key)}</code></td></tr>"
                for role, name, key in party_rows(facts)
            ),
        ),
    )


def _checks(facts: Facts) -> str:
    rows = (
        f'<tr><td>{escaped(it.name)}</td><td class="outcome {CLASSES[it.outcome]}">'
        f"{it.outcome}</td><td>{'<br>'.join(map(escaped, filter(None, parts)))}</td></tr>"
        for it in facts.report.checks
        for parts in [(it.what, it.where and f"in {it.where}", it.meaning)]
    )
    return _section("Checks", _table(("check", "outcome", "what"), rows))


def _privacy(facts: Facts) -> str:
    if not facts.privacy:
        return ""
    return _section("Privacy", "".join(f"<p>{escaped(line)}</p>" for line in facts.privacy))


# -- every statement -----------------------------------------------------------------------


def _all(facts: Facts) -> str:
    head = ("line", "statement", "signer", "time", "work", "watermark", "subject", "statement")
    rows = (_row(facts, line) for line in facts.evidence.lines)
    inside = _table(head, rows, "all")
    return _section(
        "Every statement",
        f"<details><summary>all lines of the log</summary>{inside}</details>",
    )


def _row(facts: Facts, line: Line[Statement]) -> str:
    it, place = line.statement, line.where.partition("(")[2].rstrip(")")
    subject = getattr(it, "subject", "")
    who, work, mark = "all parties", "", ""
    if isinstance(it, RoundStatement):
        who = facts.trainer_name(Line(line.index, line.envelope, it, line.digest))
        work = (
            f"{it.steps:,} steps, {it.records:,} records, {it.seconds:g} s, {it.bytes:,} bytes"
        )
        mark = f"{it.watermark.matches} of {it.watermark.bits}"
    elif facts.evidence.deliveries and place == "delivery" and facts.job:
        who = facts.name(facts.job.party("owner"))
    texts = (line.index + 1, place, who, getattr(it, "time", ""), work, mark)
    cells = "".join(f"<td>{escaped(value)}</td>" for value in texts)
    digests = f"<td><code>{subject}</code></td><td><code>{line.digest}</code></td>"
    return f'<tr id="line-{line.index + 1}">{cells}{digests}</tr>'

"""``clicooper inspect``: who trained what in a run, on the terminal, as JSON, or as a page."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr_clicooper.errors import EvidenceError
from flwr_clicooper.provenance.trust import Trust

if TYPE_CHECKING:
    from rich.table import Table

    from flwr_clicooper.provenance.attestation import RoundStatement
    from flwr_clicooper.provenance.evidence import Line, RunEvidence
    from flwr_clicooper.report.facts import Facts

FORMAT = "flwr-clicooper/inspect/v1"
_WIDTH = 140
"""Columns of a table in a file."""
Commands = argparse._SubParsersAction  # what `add_subparsers` returns has no public name


def add_to(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the command to the parser of ``clicooper``."""
    command = commands.add_parser("inspect", help="show who trained what in a run")
    command.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="such as runs/<run-id>")
    command.add_argument(
        "--trust", type=Path, metavar="FILE", help="such as trust.toml; it has the names"
    )
    command.add_argument("--json", action="store_true", help="for machines")
    command.add_argument(
        "--html", type=Path, metavar="FILE", help="write a page with a picture"
    )
    command.set_defaults(command=inspect)


def inspect(arguments: argparse.Namespace) -> int:
    """Verify a run and show its lineage."""
    from flwr_clicooper.provenance.checking import Case
    from flwr_clicooper.provenance.verify import verify_run
    from flwr_clicooper.report.facts import facts_of

    run_dir: Path = arguments.run_dir.expanduser()
    trust = Trust.load(arguments.trust.expanduser()) if arguments.trust else None
    report = verify_run(run_dir, trust)
    facts = facts_of(Case(run_dir, _evidence(run_dir), trust), report)
    if arguments.html is not None:
        from flwr_clicooper.report.lineage import page_of

        arguments.html.expanduser().write_text(page_of(facts), encoding="utf-8")
    if arguments.json:
        print(json.dumps(as_json(facts), indent=2))
    else:
        _show(facts)
        if arguments.html is not None:
            print(f"\n{arguments.html} has this as a page, with a picture of the chain.")
    return 0 if report.ok else 1


def _evidence(run_dir: Path) -> RunEvidence:
    """Return what of the evidence can be read; what cannot be is in the report."""
    from flwr_clicooper.provenance.evidence import (
        LINES_FILE,
        LOG_FILE,
        RunEvidence,
        read_head,
        read_lines,
    )

    try:
        head = read_head(run_dir / LOG_FILE)
    except EvidenceError:
        head = None
    try:
        return RunEvidence.of(read_lines(run_dir / LINES_FILE), head)
    except EvidenceError:
        return RunEvidence((), head)


# -- for machines --------------------------------------------------------------------------


def as_json(facts: Facts) -> dict[str, Any]:
    """Return the lineage of a run as JSON values."""
    from flwr_clicooper.report.terms import party_rows

    run, head = facts.evidence, facts.evidence.head
    return {
        "format": FORMAT,
        "run": facts.report.run,
        "ok": facts.report.ok,
        "verify": facts.report.as_json(),
        "job": _job_as_json(facts),
        "privacy": list(facts.privacy),
        "parties": [
            {"role": role, "name": name, "key": str(key), "fingerprint": key.fingerprint}
            for role, name, key in party_rows(facts)
        ],
        "attempts": [
            {
                "attempt": line.statement.attempt,
                "run": line.statement.run,
                "after": line.statement.after,
                "how": how,
                "digest": line.digest,
            }
            for line, how in zip(run.jobs, facts.attempts, strict=True)
        ],
        "statements": [_line_as_json(facts, line) for line in run.rounds],
        "delivery": _delivery_as_json(facts),
        "log": {"root": head.statement.root, "size": head.statement.size} if head else None,
    }


def _job_as_json(facts: Facts) -> dict[str, Any] | None:
    job = facts.job
    if job is None:
        return None
    return {
        "rounds": job.rounds,
        "records": job.records,
        "options": dict(job.options),
        "task": dict(job.task),
        "cuts": [list(cut) for cut in job.cuts],
        "privacy": job.subject,
    }


def _line_as_json(facts: Facts, line: Line[RoundStatement]) -> dict[str, Any]:
    it, job = line.statement, facts.evidence.attempts.get(line.statement.job)
    key = facts.trainer(line)
    return {
        "line": line.index + 1,
        "attempt": None if job is None else job + 1,
        "kind": it.kind,
        "round": it.round,
        "segment": it.segment,
        "trainer": facts.trainer_name(line),
        "key": None if key is None else str(key),
        "time": it.time,
        "steps": it.steps,
        "records": it.records,
        "seconds": it.seconds,
        "bytes": it.bytes,
        "watermark": asdict(it.watermark),
        "subject": it.subject,
        "digest": line.digest,
        "outcome": facts.round_state(line),
        "wrong": list(facts.wrong.get(line.where, ())),
    }


def _delivery_as_json(facts: Facts) -> dict[str, Any] | None:
    if not facts.evidence.deliveries:
        return None
    line = facts.evidence.deliveries[-1]
    it = line.statement
    return {
        "line": line.index + 1,
        "time": it.time,
        "model": it.subject,
        "metrics": dict(it.metrics),
        "watermarks": [asdict(mark) for mark in it.watermarks],
        "digest": line.digest,
    }


# -- for people ----------------------------------------------------------------------------


def _show(facts: Facts) -> None:
    from rich.console import Console, Group
    from rich.table import Table
    from rich.text import Text

    from flwr_clicooper.report.terms import job_rows

    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    style = "bold green" if facts.report.ok else "bold red"
    console.print(Text(facts.verdict(), style), soft_wrap=True)
    for check in facts.report.failed:
        found = f"  {check.name}: {check.what} (in {check.where})"
        console.print(Text(found, "red"), soft_wrap=True)
    if not facts.names:
        console.print(Text("Whose keys these are is unknown: pass --trust with a file."))
    if not facts.evidence.lines:
        return
    terms = Table.grid(padding=(0, 2))
    for name, value in [("run", facts.report.run), *job_rows(facts)]:
        terms.add_row(Text(name, "bold"), _plain(value))
    console.print(Group(Text(), terms, Text(), _parties(facts), Text(), *_statements(facts)))


def _plain(value: object) -> Any:
    """Return a text that came with the evidence; a terminal obeys nothing in it."""
    from rich.text import Text

    from flwr_clicooper.provenance.checking import shown

    return Text(shown(str(value)))


def _parties(facts: Facts) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from flwr_clicooper.report.terms import party_rows

    table = Table("role", "name", "fingerprint", box=SIMPLE_HEAD)
    for role, name, key in party_rows(facts):
        table.add_row(role, _plain(name), key.fingerprint)
    return table


def _statements(facts: Facts) -> Iterator[Table]:
    """Yield a table of trainers' statements for each attempt."""
    attempts = facts.evidence.attempts
    for number, lines in groupby(
        facts.evidence.rounds, lambda line: attempts.get(line.statement.job)
    ):
        title = "statements of no job here"
        if number is not None:
            title = f"attempt {number + 1} {facts.attempts[number]}"
        yield _table(facts, title, lines)


def _table(facts: Facts, title: str, lines: Iterable[Line[RoundStatement]]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Column, Table
    from rich.text import Text

    numbers = ("steps", "records", "seconds", "bytes", "watermark")
    table = Table(
        *(Column(name, overflow="fold") for name in ("round", "segment", "trainer", "time")),
        *(Column(name, justify="right", overflow="fold") for name in numbers),
        *(Column(name, no_wrap=True) for name in ("weights", "statement", "outcome")),
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title=_plain(title),
        title_justify="left",
        title_style="bold",
    )
    styles = {"passed": "green", "failed": "bold red", "not checked": "yellow"}
    for line in lines:
        state = facts.round_state(line)
        cells = [_plain(value) for value in _cells(facts, line)]
        table.add_row(*cells, Text(state, styles[state]))
    return table


def _cells(facts: Facts, line: Line[RoundStatement]) -> tuple[str, ...]:
    it, mark = line.statement, line.statement.watermark
    start = it.kind == "start"
    done = (f"{it.steps:,}", f"{it.records:,}", f"{it.seconds:.3g}", f"{it.bytes:,}")
    return (
        f"start {it.round}" if start else str(it.round),
        str(it.segment),
        facts.trainer_name(line),
        it.time.replace("T", " ").rstrip("Z"),
        *(("",) * len(done) if start else done),
        f"{mark.matches} of {mark.bits}" if mark.bits else "" if start else "none",
        it.subject[:8],
        line.digest[:8],
    )

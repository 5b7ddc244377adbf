"""``clicooper audit`` and ``clicooper open``: repeat some of a run's steps."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from flwr_clicooper.commands.inputs import add_task, load_task
from flwr_clicooper.errors import EvidenceError
from flwr_clicooper.files import write_atomically
from flwr_clicooper.provenance.trust import Trust

if TYPE_CHECKING:
    from flwr_clicooper.provenance.audit import AuditReport, Challenge, Outcome
    from flwr_clicooper.task import SplitTask

AUDITS = 10
"""How many audits there are when nobody says."""
Commands = argparse._SubParsersAction  # what `add_subparsers` returns has no public name


def add_to(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add both commands to the parser of ``clicooper``."""
    command = commands.add_parser(
        "audit", help="repeat steps that a nonce chooses, from what trainers open"
    )
    command.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="such as runs/<run-id>")
    add_task(command, required=True)
    command.add_argument(
        "--steps",
        type=_count,
        metavar="K",
        help=f"how many stretches of steps to repeat, each up to the next state that the "
        f"trainer committed to (default: {AUDITS})",
    )
    command.add_argument(
        "--challenge", type=Path, metavar="FILE", help="made if it does not exist, else read"
    )
    command.add_argument(
        "--evidence",
        type=Path,
        metavar="DIR",
        help="where the trainers' opened evidence is (default: RUN_DIR)",
    )
    command.add_argument(
        "--tolerance",
        type=_tolerance,
        default=0.0,
        metavar="X",
        help="what weights may differ by; 0, the default, on the trainers' platform",
    )
    command.add_argument("--trust", type=Path, metavar="FILE", help="such as trust.toml")
    command.add_argument("--json", action="store_true", help="for machines")
    command.set_defaults(command=audit)

    command = commands.add_parser("open", help="as a trainer: open what a challenge asks for")
    for name, what in (
        ("challenge", "the verifier's file"),
        ("evidence_dir", "the run's folder on your machine, runs/<run-id>"),
        ("out", "a folder for the copies, to be sent to the verifier"),
    ):
        command.add_argument(name, type=Path, metavar=name.upper(), help=what)
    command.set_defaults(command=open_)


def audit(arguments: argparse.Namespace) -> int:
    """Draw or read a challenge, and repeat the steps that it asks for."""
    from flwr_clicooper.provenance.audit import Challenge
    from flwr_clicooper.provenance.evidence import load_run
    from flwr_clicooper.provenance.verify import verify_run

    run_dir: Path = arguments.run_dir.expanduser()
    trust = Trust.load(arguments.trust.expanduser()) if arguments.trust else None
    report = verify_run(run_dir, trust)
    if not report.ok:
        names = ", ".join(check.name for check in report.failed)
        raise EvidenceError(
            f"the evidence of {run_dir} does not hold ({names}), so nothing is audited: see "
            f"clicooper verify {shlex.quote(str(run_dir))}"
        )
    run = load_run(run_dir)
    path: Path | None = arguments.challenge and arguments.challenge.expanduser()
    if path is not None and path.exists():
        challenge = load_challenge(path)
    else:
        challenge = Challenge.draw(run, arguments.steps or AUDITS)
        if path is not None:
            write_atomically(path, challenge.to_bytes())
    challenge.check(run)
    given: Path | None = arguments.evidence and arguments.evidence.expanduser()
    if given is None and (missing := _unopened(challenge, run_dir)):
        print(_who_must_open(missing, path), file=sys.stderr)
        return 1
    task = load_task(arguments.task, arguments.app_dir)
    made = _repeat(run_dir, task, challenge, given or run_dir, arguments)
    _show(made, arguments, trusted=trust is not None)
    return 0 if made.ok else 1


def open_(arguments: argparse.Namespace) -> int:
    """Copy what a challenge asks for, and nothing else."""
    from flwr_clicooper.provenance.opening import open_evidence

    challenge = load_challenge(arguments.challenge.expanduser())
    out: Path = arguments.out.expanduser()
    opened, copied = open_evidence(challenge, arguments.evidence_dir.expanduser(), out)
    for it in opened:
        last = challenge.until(it) - 1
        print(f"opened segment {it.segment}, round {it.round}, steps {it.step} to {last}")
    own = {it.segment for it in opened}
    for it in challenge.points:
        if it.segment in own and it not in opened:
            print(
                f"not here: segment {it.segment}, round {it.round}; see earlier runs or nodes"
            )
    print(
        f"{out} has them: {copied:,} bytes. They are what your segment was and what came to "
        "it in these steps, with the keys of these rounds' watermarks: send them to the "
        "verifier only, and encrypted."
    )
    return 0


def load_challenge(path: Path) -> Challenge:
    """Return the challenge of a file.

    Raises
    ------
    EvidenceError
        It is missing or not a challenge.
    """
    from flwr_clicooper.provenance.audit import MAX_CHALLENGE, Challenge
    from flwr_clicooper.provenance.evidence import read_bytes

    return Challenge.parse(read_bytes(path, MAX_CHALLENGE))


def _unopened(challenge: Challenge, run_dir: Path) -> list[int]:
    """Return the segments of a challenge of which nothing is in the run's folder."""
    from flwr_clicooper.provenance.opening import segment_folder

    segments = sorted({it.segment for it in challenge.points})
    return [it for it in segments if not segment_folder(run_dir, it).is_dir()]


def _who_must_open(missing: list[int], challenge: Path | None) -> str:
    who = " and ".join(f"trainer {it}" for it in missing)
    if challenge is None:
        return (
            f"clicooper: nothing was audited: the evidence of {who} is not here. Pass "
            "--challenge FILE, and send that file to them"
        )
    return (
        f"clicooper: nothing was audited yet: send {challenge} to {who}, to be opened with\n"
        f"  clicooper open {shlex.quote(challenge.name)} runs/<run-id> opened\n"
        "put the folders that come back side by side in one folder, and call again with "
        "--evidence and that folder"
    )


def _repeat(
    run_dir: Path,
    task: SplitTask,
    challenge: Challenge,
    evidence: Path,
    arguments: argparse.Namespace,
) -> AuditReport:
    from rich.console import Console
    from rich.progress import Progress

    from flwr_clicooper.chain.audit import audit_run

    with Progress(console=Console(stderr=True), transient=True) as progress:
        shown = progress.add_task("repeating steps", total=len(challenge.points))

        def done(_: Outcome) -> None:
            progress.advance(shown)

        return audit_run(run_dir, task, challenge, evidence, arguments.tolerance, done)


def _show(report: AuditReport, arguments: argparse.Namespace, *, trusted: bool) -> None:
    if arguments.json:
        print(json.dumps(report.as_json(), indent=2))
        return
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    from flwr_clicooper.provenance.checking import shown

    table = Table("segment", "round", "steps", "outcome", Column("what", overflow="fold"))
    for title in ("s/step here", "s/step stated"):
        table.add_column(title, justify="right")
    for it in report.outcomes:
        outcome = Text("passed", "green") if it.passed else Text("failed", "bold red")
        table.add_row(
            str(it.segment),
            str(it.round),
            f"{it.step} to {it.until - 1}",
            outcome,
            Text("\n".join(filter(None, (shown(it.what), it.meaning)))),
            f"{it.seconds:.4f}" if it.seconds else "",
            f"{it.stated:.4f}",
        )
    console = Console()
    console.print(table)
    console.print(Text(_closing(report, trusted=trusted)))


def _closing(report: AuditReport, *, trusted: bool) -> str:
    """Return what to do with a report, in a line."""
    if not report.ok:
        who = sorted({f"trainer {it.segment}" for it in report.failed})
        return (
            f"FAILED: {', '.join(who)}. Do not pay for this work, or rely on the model, "
            "before that was explained."
        )
    unknown = " Nothing says whose keys these are: pass --trust with a file that lists them."
    return (
        f"All {len(report.outcomes)} stretches of steps give what was signed. What was not "
        f"drawn was not repeated.{'' if trusted else unknown}"
    )


def _count(text: str) -> int:
    from flwr_clicooper.provenance.audit import MAX_AUDITS

    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= MAX_AUDITS):
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 1 to {MAX_AUDITS}")
    return int(text)


def _tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0")
    return value

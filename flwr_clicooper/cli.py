"""The ``clicooper`` command.

A command is a function that takes its arguments and returns the exit code; `_parser` says
which arguments. 0 is success, 1 a named error or a check that failed, 2 a wrong call.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import tomli_w

from flwr_clicooper.commands import audit, claim, inspect
from flwr_clicooper.errors import CooperError
from flwr_clicooper.provenance.keys import Identity, PublicIdentity
from flwr_clicooper.provenance.trust import ROLES, Party, Trust

if TYPE_CHECKING:
    from flwr_clicooper.provenance.verify import Report


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments; those of the process if not given.
    """
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.command(arguments))
    except (CooperError, OSError) as error:
        print(f"clicooper: {error}", file=sys.stderr)
        return 1


def keygen(arguments: argparse.Namespace) -> int:
    """Make an identity and say how to use it."""
    path: Path = arguments.path.expanduser().absolute()
    identity = Identity.new()
    identity.save(path)
    public = identity.public
    own = tomli_w.dumps({"identity-key": str(path)}).strip().replace(" = ", "=", 1)
    config = shlex.quote(f'role="trainer" stage=1 {own} trust-file="trust.toml"')
    entry = Party("your name", "trainer", public).to_toml().strip().replace("\n", "\n  ")
    print(
        f"identity     {path} (a secret: keep it, and let nobody read it)\n"
        f"public key   {public}\n"
        f"fingerprint  {public.fingerprint}\n\n"
        f"start your SuperNode with your role and, as a trainer, stage:\n"
        f"  --node-config {config}\n\n"
        f"have your name, role and key in everybody's trust.toml:\n  {entry}\n\n"
        f"which this does:\n  clicooper trust trust.toml add 'your name' trainer {public}"
    )
    return 0


def trust_add(arguments: argparse.Namespace) -> int:
    """Append a party to a trust file."""
    key = PublicIdentity.parse(arguments.key)
    party = Party(arguments.name, arguments.role, key, arguments.stage)
    Trust.add(arguments.file.expanduser(), party)
    print(f"{arguments.file} lists {party.name!r} as {party.place} ({key.fingerprint})")
    return 0


def trust_show(arguments: argparse.Namespace) -> int:
    """Print the parties of a trust file."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for title in ("party", "may be", "fingerprint", "public key"):
        table.add_column(title, overflow="fold")
    for party in Trust.load(arguments.file.expanduser()).parties:
        stands = party.place if party.stage or party.role != "trainer" else "any trainer"
        texts = (party.name, stands, party.key.fingerprint, str(party.key))
        table.add_row(*map(Text, texts))  # a name is not markup
    Console().print(table)
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """Check all evidence of a run."""
    from flwr_clicooper.provenance.verify import verify_run

    model = arguments.model.expanduser() if arguments.model else None
    report = verify_run(arguments.run_dir.expanduser(), _trust(arguments), model)
    return _show(report, arguments)


def proof(arguments: argparse.Namespace) -> int:
    """Write the proof that a statement is in a run's log."""
    from flwr_clicooper.files import write_atomically
    from flwr_clicooper.provenance.evidence import load_run
    from flwr_clicooper.provenance.proof import Proof

    run = load_run(arguments.run_dir.expanduser())
    data = Proof.of_run(run, arguments.segment, arguments.round).to_bytes()
    if arguments.out is None:
        print(data.decode(), end="")  # without a line end, so that `> FILE` makes a proof
        return 0
    write_atomically(arguments.out.expanduser(), data)
    path = shlex.quote(str(arguments.out))
    print(f"{arguments.out} is made; to check it: clicooper check-proof {path}")
    return 0


def check_proof(arguments: argparse.Namespace) -> int:
    """Check such a proof by itself."""
    from flwr_clicooper.provenance.evidence import read_bytes
    from flwr_clicooper.provenance.proof import MAX_PROOF, check_proof

    data = read_bytes(arguments.file.expanduser(), MAX_PROOF)
    return _show(check_proof(data, _trust(arguments)), arguments)


def _trust(arguments: argparse.Namespace) -> Trust | None:
    return Trust.load(arguments.trust.expanduser()) if arguments.trust else None


def _show(report: Report, arguments: argparse.Namespace) -> int:
    """Print a report as a table or as JSON; return the exit code."""
    if arguments.json:
        print(json.dumps(report.as_json(), indent=2))
        return 0 if report.ok else 1
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    styles = {"passed": "green", "failed": "bold red", "not checked": "yellow"}
    table = Table("check", "outcome", Column("what", overflow="fold"))
    for check in report.checks:
        parts = (check.what, check.where and f"in {check.where}", check.meaning)
        table.add_row(
            Text(check.name),
            Text(check.outcome, styles[check.outcome]),
            Text("\n".join(filter(None, parts))),  # what came with the evidence is not markup
        )
    console = Console()
    console.print(table)
    console.print(Text(_closing(report, trusted=arguments.trust is not None)))
    return 0 if report.ok else 1


def _closing(report: Report, *, trusted: bool) -> str:
    """Return what to do with a report, in a line."""
    if not report.ok:
        names = ", ".join(check.name for check in report.failed)
        return (
            f"FAILED: {names}. Do not rely on this evidence, or on the model that it is of, "
            "before its parties have explained it."
        )
    absent = sum(check.outcome == "not checked" for check in report.checks)
    skipped = f" Checks that could not be made: {absent}." if absent else ""
    if not trusted:
        return (
            "Nothing failed, but nothing says whose keys these are: pass --trust with a file "
            f"that lists the parties.{skipped}"
        )
    return f"All that was checked of run {report.run} holds.{skipped}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="clicooper", description="Keys and proofs for client-cooperative split learning."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("keygen", help="make an identity (an Ed25519 key)")
    command.add_argument("path", type=Path, metavar="PATH", help="a file that does not exist")
    command.set_defaults(command=keygen)

    command = commands.add_parser("trust", help="whose keys are trusted, as what")
    command.add_argument("file", type=Path, metavar="FILE", help="such as trust.toml")
    _add_trust_actions(command)

    command = commands.add_parser("verify", help="check all evidence of a run, offline")
    _add_run(command)
    command.add_argument(
        "--model", type=Path, metavar="FILE", help="default: model.safetensors of the run"
    )
    _add_report(command, verify)

    command = commands.add_parser("proof", help="prove that a statement is in a run's log")
    _add_run(command)
    for name, what in (("segment", "the trainer's stage"), ("round", "0: its first start")):
        command.add_argument(f"--{name}", type=int, required=True, metavar="N", help=what)
    command.add_argument("--out", type=Path, metavar="FILE", help="default: print it")
    command.set_defaults(command=proof)

    command = commands.add_parser("check-proof", help="check such a proof by itself")
    command.add_argument("file", type=Path, metavar="FILE", help="what 'proof' wrote")
    _add_report(command, check_proof)

    inspect.add_to(commands)
    claim.add_to(commands)
    audit.add_to(commands)
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="such as runs/<run-id>")


def _add_report(parser: argparse.ArgumentParser, command: object) -> None:
    parser.add_argument("--trust", type=Path, metavar="FILE", help="such as trust.toml")
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.set_defaults(command=command)


def _add_trust_actions(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    action = actions.add_parser("add", help="list a party; makes the file if it is missing")
    action.add_argument("name", metavar="NAME", help="what people call the party")
    action.add_argument("role", metavar="ROLE", choices=ROLES, help=", ".join(ROLES))
    action.add_argument("key", metavar="KEY", help="its public key, as keygen prints it")
    action.add_argument(
        "--stage",
        type=_stage,
        default=0,
        metavar="N",
        help="the only stage of a trainer (default: any)",
    )
    action.set_defaults(command=trust_add)
    actions.add_parser("show", help="print the parties").set_defaults(command=trust_show)


def _stage(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())

"""The ``clicooper`` command.

A command is a function that takes its arguments and returns the exit code; `_parser` says
which arguments. 0 is success, 1 a named error or a check that failed, 2 a wrong call.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import tomli_w

from flwr_clicooper.errors import CooperError
from flwr_clicooper.provenance.keys import Identity, PublicIdentity
from flwr_clicooper.provenance.trust import ROLES, Party, Trust


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
    return parser


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

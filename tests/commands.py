"""Calling the command in this process."""

from __future__ import annotations

from flwr_clicooper.cli import main


def calls(*argv: object) -> int:
    """Return the exit code of a call."""
    try:
        return main([str(part) for part in argv])
    except SystemExit as stop:  # how argparse ends
        return int(stop.code or 0)

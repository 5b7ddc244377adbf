"""Cost of evidence: statements made and verified, a run's verification, sizes of proofs.

Statements are those of a run of 4 trainers and 100 rounds, signed as in a run but without
training it; verified is all of it, from the files, without weights.

    python benchmarks/provenance.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from benchmarks.machine import machine, save  # noqa: E402
from flwr_clicooper.provenance.attestation import RoundStatement  # noqa: E402
from flwr_clicooper.provenance.dsse import Envelope  # noqa: E402
from flwr_clicooper.provenance.evidence import LINES_FILE, load_run  # noqa: E402
from flwr_clicooper.provenance.log import MerkleLog  # noqa: E402
from flwr_clicooper.provenance.verify import verify_run  # noqa: E402
from tests.provenance.runs import Made  # noqa: E402

TRAINERS, ROUNDS, REPEATS, STATEMENTS = 4, 100, 7, 200
SIZES = (100, 1_000, 10_000, 100_000)


def main() -> None:
    with TemporaryDirectory() as folder:
        made = Made(Path(folder) / "run", TRAINERS, ROUNDS)
        trust = made.folder.parent / "trust.toml"
        trust.write_text("\n".join(party.to_toml() for party in made.trust.parties))
        figures = {**of_statements(made), **of_run(made, trust)}
    proofs = {f"{size:,}": of_log(size) for size in SIZES}
    console = Console(width=110)
    console.print(table(f"{TRAINERS} trainers, {ROUNDS} rounds", figures))
    console.print(proof_table(proofs))
    console.print(" ".join(f"{k}={v}" for k, v in machine().items()), highlight=False)
    path = save("provenance", {"run": figures, "proofs by size of the log": proofs})
    print(f"raw output: {path.relative_to(ROOT)}")


def of_statements(made: Made) -> dict[str, float]:
    """Return how fast one core makes and verifies a trainer's statements."""
    line = made.lines[made.index(f"round {ROUNDS // 2}.2")]
    statement, signer = RoundStatement.parse(line.payload), made.parties["trainer 2"]
    text = line.to_json()

    def make() -> None:
        for step in range(STATEMENTS):
            payload = replace(statement, steps=step).payload()
            Envelope.sign(payload, signer).to_json()

    def verify() -> None:
        for _ in range(STATEMENTS):
            RoundStatement.parse(Envelope.from_json(text).verify(signer.public))

    return {
        "statements made per second": round(STATEMENTS / seconds(make)),
        "statements verified per second": round(STATEMENTS / seconds(verify)),
        "bytes per round statement": len(text) + 1,
    }


def of_run(made: Made, trust: Path) -> dict[str, float]:
    """Return what a whole run's evidence takes."""

    def verify() -> None:
        assert verify_run(made.folder, made.trust).ok

    argv = [sys.executable, "-m", "flwr_clicooper.cli", "verify", str(made.folder)]

    def command() -> None:
        subprocess.run(
            [*argv, "--trust", str(trust)], check=True, cwd=ROOT, capture_output=True
        )

    return {
        "statements": len(load_run(made.folder).lines),
        f"bytes of {LINES_FILE}": (made.folder / LINES_FILE).stat().st_size,
        "verify_run, seconds": round(seconds(verify), 3),
        "clicooper verify, seconds": round(seconds(command), 3),
    }


def of_log(size: int) -> dict[str, float]:
    """Return hashes of 32 bytes in proofs of a log of a size, and how fast it grows."""
    log = MerkleLog()
    started = time.perf_counter()
    for leaf in range(size):
        log.append(leaf.to_bytes(32, "big"))
    took = time.perf_counter() - started
    places = range(0, size, max(1, size // 97))
    return {
        "inclusion, hashes at most": max(len(log.inclusion(place)) for place in places),
        "consistency, hashes at most": max(len(log.consistency(1 + old)) for old in places),
        "appends per second": round(size / took),
    }


def seconds(call: Callable[[], object]) -> float:
    """Return the median of repeated calls."""
    call()
    found = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def table(title: str, figures: dict[str, float]) -> Table:
    found = Table(title=title)
    found.add_column("")
    found.add_column("median", justify="right")
    for name, value in figures.items():
        found.add_row(name, f"{value:,}")
    return found


def proof_table(proofs: dict[str, dict[str, Any]]) -> Table:
    found = Table(title="Proofs; a hash has 32 bytes")
    names = next(iter(proofs.values()))
    for name in ("lines", *names):
        found.add_column(name, justify="right")
    for size, figures in proofs.items():
        found.add_row(size, *(f"{figures[name]:,}" for name in names))
    return found


if __name__ == "__main__":
    main()

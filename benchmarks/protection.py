"""What protection costs: training time with sealing, attestations, and watermarks.

The quickstart's CNN with 3 trainers, with one protection more in each run: all parties in
one process on a LocalGrid, or with ``--deployment`` in a stock federation (SuperLink and
SuperNodes on loopback, live links, TLS). The speed of a machine drifts, so the runs take
turns, each time in another order, and compared is what ran in the same turn: the median step,
and the median round with all that a round's end costs. The first round, in which memory and
caches settle, is left out. The cost of sealing is against nothing, that of the others against
sealing; beside it stand the quartiles over the turns, which tell how far to trust it.

    python benchmarks/protection.py [--deployment] [--turns 12] [--rounds 3]
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "quickstart")]

from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402
from rich.table import Table  # noqa: E402

from benchmarks.chain import BATCH, TRAINERS, Few  # noqa: E402
from benchmarks.machine import machine, save  # noqa: E402
from benchmarks.throughput import STEPS, chain, noted  # noqa: E402
from examples.deployment.federation import Federation, NodeConfig  # noqa: E402
from flwr_clicooper import CooperStrategy, LocalGrid, cooper_client  # noqa: E402

NODES: list[NodeConfig] = [{"role": "owner"}]
NODES += [{"role": "trainer", "stage": i + 1} for i in range(TRAINERS)]
KINDS = ("seal", "attest", "watermark")
MODES = {
    "nothing": (False, False, False),
    "sealing": (True, False, False),
    "sealing + attestations": (True, True, False),
    "sealing + attestations + watermarks": (True, True, True),
}
Run = Callable[[Path, dict[str, bool], int], None]
"""Trains in a folder, with some protection, for some rounds."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--deployment", action="store_true", help="a federation on loopback")
    parser.add_argument("--turns", type=int, default=12, help="at least 2")
    parser.add_argument("--rounds", type=int, default=3, help=f"of {STEPS} steps, above 1")
    arguments = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    rows: list[dict[str, Any]] = [{"with": mode, "steps": [], "rounds": []} for mode in MODES]
    with tempfile.TemporaryDirectory() as folder:
        where = deployment if arguments.deployment else local
        with where(Path(folder)) as run:
            for turn in track(range(arguments.turns), "turns"):
                for place in range(len(rows)):
                    row = rows[(turn + place) % len(rows)]
                    runs = Path(folder) / f"runs-{turn}-{place}"
                    on = dict(zip(KINDS, MODES[row["with"]], strict=True))
                    run(runs, on, arguments.rounds)
                    for kind, first in (("step", STEPS), ("round", 1)):
                        times = [it["seconds"] for it in noted(runs, kind)[first:]]
                        row[f"{kind}s"].append(round(statistics.median(times), 5))
    show(rows)
    facts: dict[str, Any] = {"seed": 0, "trainers": TRAINERS, "batch-size": BATCH}
    facts |= {"steps": STEPS, "rounds": arguments.rounds, "seconds": "a run's median"}
    name = "protection-deployment" if arguments.deployment else "protection"
    print(f"raw output: {save(name, {**facts, 'rows': rows}).relative_to(ROOT)}")


@contextmanager
def local(_: Path) -> Iterator[Run]:
    """Give runs of all parties in this process."""
    Few.records = STEPS * BATCH

    def run(runs: Path, on: dict[str, bool], rounds: int) -> None:
        config: dict[str, Any] = {"release": "clean", "batch-size": BATCH, **on}
        config |= {"num-rounds": rounds, "run-dir": str(runs)}
        CooperStrategy.from_config(config).start(
            LocalGrid(cooper_client(Few()), NODES, config)
        )

    yield run


@contextmanager
def deployment(folder: Path) -> Iterator[Run]:
    """Give runs in a federation of stock Flower processes."""
    with Federation(folder / "federation", NODES) as federation:

        def run(runs: Path, on: dict[str, bool], rounds: int) -> None:
            given = " ".join(f"{kind}={str(value).lower()}" for kind, value in on.items())
            chain(federation, runs, TRAINERS, f"num-rounds={rounds} {given}")

        yield run


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"Quickstart CNN, {TRAINERS} trainers, rounds of {STEPS} steps")
    for name in ("with", "step, ms", "cost", "round, s", "cost"):
        table.add_column(name, justify="right" if name != "with" else "left")
    for row in rows:
        base = rows[0 if row["with"] == "sealing" else 1]  # of the others, against sealing
        new = row is not rows[0]
        table.add_row(
            row["with"],
            f"{statistics.median(row['steps']) * 1000:.1f}",
            cost(row["steps"], base["steps"]) if new else "",
            f"{statistics.median(row['rounds']):.2f}",
            cost(row["rounds"], base["rounds"]) if new else "",
        )
    console = Console(width=110)
    console.print(table)
    console.print(" ".join(f"{k}={v}" for k, v in machine().items()), highlight=False)


def cost(seconds: list[float], others: list[float]) -> str:
    """Return the median of the costs in each turn, and their quartiles."""
    costs = [one / other - 1 for one, other in zip(seconds, others, strict=True)]
    low, middle, high = statistics.quantiles(costs, n=4, method="inclusive")
    return f"{middle:+.1%} ({low:+.1%} to {high:+.1%})"


if __name__ == "__main__":
    main()

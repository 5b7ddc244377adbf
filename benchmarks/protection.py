"""What protection costs: training time with sealing, attestations, and watermarks.

The quickstart's CNN with 3 trainers in a stock deployment (SuperLink and SuperNodes on
loopback, live links, TLS), with one protection more in each run. The speed of a machine
drifts, so the runs take turns, each time in another order, and compared is what ran in the
same turn: the median of whole rounds, with all that a round's end costs. The first round, in
which memory and caches settle, is left out. Beside the cost stands its range over the turns,
which tells how far to trust it.

    python benchmarks/protection.py [--repeats 6] [--rounds 5]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402
from rich.table import Table  # noqa: E402

from benchmarks.machine import machine, save  # noqa: E402
from benchmarks.throughput import BATCH, STEPS, chain, noted  # noqa: E402
from examples.deployment.federation import Federation, NodeConfig  # noqa: E402

TRAINERS = 3
MODES = {
    "nothing": "seal=false attest=false watermark=false",
    "sealing": "seal=true attest=false watermark=false",
    "sealing, attestations": "seal=true attest=true watermark=false",
    "sealing, attestations, watermarks": "seal=true attest=true watermark=true",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5, help=f"of {STEPS} steps, above 1")
    arguments = parser.parse_args()
    nodes: list[NodeConfig] = [{"role": "owner"}]
    nodes += [{"role": "trainer", "stage": i + 1} for i in range(TRAINERS)]
    rounds: dict[str, list[list[float]]] = {mode: [] for mode in MODES}
    modes = list(MODES)
    with tempfile.TemporaryDirectory() as folder:
        with Federation(Path(folder) / "federation", nodes) as federation:
            for repeat in track(range(arguments.repeats), "runs"):
                first = repeat % len(modes)
                for number, mode in enumerate([*modes[first:], *modes[:first]]):
                    runs = Path(folder) / f"runs-{repeat}-{number}"
                    config = f"num-rounds={arguments.rounds} {MODES[mode]}"
                    chain(federation, runs, TRAINERS, config)
                    seconds = [it["seconds"] for it in noted(runs, "round")[1:]]
                    rounds[mode].append([round(s, 4) for s in seconds])
    rows = [{"with": mode, "round-seconds": turns} for mode, turns in rounds.items()]
    show(rows)
    facts = {"seed": 0, "trainers": TRAINERS, "steps": STEPS, "batch-size": BATCH}
    print(f"raw output: {save('protection', {**facts, 'rows': rows}).relative_to(ROOT)}")


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"Quickstart CNN, {TRAINERS} trainers, rounds of {STEPS} steps")
    for name in ("with", "round, s", "against nothing", "against the row above"):
        table.add_column(name, justify="right" if name != "with" else "left")
    turns = [[statistics.median(it) for it in row["round-seconds"]] for row in rows]
    for number, row in enumerate(rows):
        costs = (cost(turns[number], other) for other in (turns[0], turns[max(0, number - 1)]))
        table.add_row(row["with"], f"{statistics.median(turns[number]):.2f}", *costs)
    console = Console(width=110)
    console.print(table)
    console.print(" ".join(f"{k}={v}" for k, v in machine().items()), highlight=False)


def cost(seconds: list[float], others: list[float]) -> str:
    """Return the median of the costs in each turn, and their range."""
    costs = [one / other - 1 for one, other in zip(seconds, others, strict=True)]
    return f"{statistics.median(costs):+.1%} ({min(costs):+.1%} to {max(costs):+.1%})"


if __name__ == "__main__":
    main()

"""What protection costs: training time with sealing, attestations, and watermarks.

The quickstart's CNN with 3 trainers in a stock deployment (SuperLink and SuperNodes on
loopback, live links, TLS), with one protection more in each run. The runs take turns, since
the speed of a machine drifts; compared are medians of whole rounds, with all that a round's
end costs. The first round, in which memory and caches settle, is left out.

    python benchmarks/protection.py [--repeats 4] [--rounds 5]
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
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5, help=f"of {STEPS} steps, above 1")
    arguments = parser.parse_args()
    nodes: list[NodeConfig] = [{"role": "owner"}]
    nodes += [{"role": "trainer", "stage": i + 1} for i in range(TRAINERS)]
    rounds: dict[str, list[float]] = {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory() as folder:
        with Federation(Path(folder) / "federation", nodes) as federation:
            for repeat in track(range(arguments.repeats), "runs"):
                for number, (mode, config) in enumerate(MODES.items()):
                    runs = Path(folder) / f"runs-{repeat}-{number}"
                    chain(
                        federation, runs, TRAINERS, f"num-rounds={arguments.rounds} {config}"
                    )
                    rounds[mode] += [it["seconds"] for it in noted(runs, "round")[1:]]
    rows = [
        {
            "with": mode,
            "round-seconds-median": statistics.median(seconds),
            "round-seconds": [round(s, 4) for s in seconds],
        }
        for mode, seconds in rounds.items()
    ]
    show(rows)
    facts = {"seed": 0, "trainers": TRAINERS, "steps": STEPS, "batch-size": BATCH}
    print(f"raw output: {save('protection', {**facts, 'rows': rows}).relative_to(ROOT)}")


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"Quickstart CNN, {TRAINERS} trainers, rounds of {STEPS} steps")
    for name in ("with", "round, s", "against nothing", "against the row above"):
        table.add_column(name, justify="right" if name != "with" else "left")
    first = above = rows[0]["round-seconds-median"]
    for row in rows:
        seconds = row["round-seconds-median"]
        costs = (f"{seconds / other - 1:+.1%}" for other in (first, above))
        table.add_row(row["with"], f"{seconds:.2f}", *costs)
        above = seconds
    console = Console(width=110)
    console.print(table)
    console.print(" ".join(f"{k}={v}" for k, v in machine().items()), highlight=False)


if __name__ == "__main__":
    main()

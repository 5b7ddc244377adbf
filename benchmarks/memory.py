"""Memory of the relay and of every party over 2,000 steps, and by the size of the data set.

A stock deployment on loopback, 3 trainers on the quickstart's CNN, batch 16. Counted is
each process's own memory (``RssAnon``); pages of files that are mapped are not, since the
system takes them back when it needs them.

    python benchmarks/memory.py
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from benchmarks.machine import machine, save  # noqa: E402
from examples.deployment.federation import Federation, NodeConfig  # noqa: E402

APP = ROOT / "benchmarks" / "throughput_app"
BATCH, TRAINERS, TIMEOUT = 16, 3, 400.0
PARTIES = ["relay", "owner", *(f"trainer {i + 1}" for i in range(TRAINERS))]
Sample = dict[str, float]


def main() -> None:
    nodes: list[NodeConfig] = [{"role": "owner"}]
    nodes += [{"role": "trainer", "stage": i + 1} for i in range(TRAINERS)]
    with tempfile.TemporaryDirectory() as folder:
        with Federation(Path(folder) / "federation", nodes) as federation:
            long = run(federation, Path(folder) / "long", records=11776, rounds=3)
            short = run(federation, Path(folder) / "short", records=1472, rounds=24)
    console = Console(width=110)
    console.print(show(long, short))
    console.print(" ".join(f"{k}={v}" for k, v in machine().items()), highlight=False)
    facts = {"batch-size": BATCH, "seed": 0}
    samples = {"11776-records": long, "1472-records": short}
    path = save("memory", {**facts, "own-memory-MB": samples})
    print(f"raw output: {path.relative_to(ROOT)}")


def run(
    federation: Federation, runs: Path, *, records: int, rounds: int
) -> list[dict[str, float]]:
    """Train 2,208 steps; return samples of every process's memory, with the step."""
    config = f"run-dir='{runs}' batch-size={BATCH} num-rounds={rounds} "
    federation.submit(APP, f"{config} task.trainers={TRAINERS} task.records={records}")
    samples: list[Sample] = []
    deadline = time.monotonic() + TIMEOUT
    while not (notes := read(runs)) or notes[-1]["kind"] != "delivery":
        if time.monotonic() > deadline:
            raise TimeoutError(f"the run took more than {TIMEOUT:.0f} s")
        steps = sum(note["kind"] == "step" for note in notes)
        if steps:
            samples.append({"step": steps, **memory(federation)})
        time.sleep(1)
    if federation.wait()["status"] != "finished:completed":
        raise RuntimeError("the run failed")
    return [sample for sample in samples if len(sample) == 1 + len(PARTIES)]


def read(runs: Path) -> list[dict[str, Any]]:
    lines = [x for path in runs.glob("*/metrics.jsonl") for x in path.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def memory(federation: Federation) -> Sample:
    """Return the MB of each party's process."""
    home = federation.environment["FLWR_HOME"].encode()
    found: Sample = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environment = (entry / "environ").read_bytes()
            command = (entry / "cmdline").read_bytes()
            status = (entry / "status").read_text()
        except OSError:
            continue  # it has ended
        if home not in environment or b"RssAnon" not in status.encode():
            continue
        (line,) = [x for x in status.splitlines() if x.startswith("RssAnon")]
        megabytes = round(int(line.split()[1]) * 1024 / 1e6, 1)
        if b"flwr-serverapp" in command:
            found["relay"] = megabytes
        elif b"flwr-clientapp" in command:
            (mark,) = [x for x in environment.split(b"\0") if x.startswith(b"CLICOOPER_NODE=")]
            found[PARTIES[1 + int(mark.split(b"=")[1])]] = megabytes
    return found


def show(long: list[Sample], short: list[Sample]) -> Table:
    table = Table(title="Own memory of each process, MB")
    marks = (200, 1000, 2000)
    table.add_column("")
    for mark in marks:
        table.add_column(f"11,776 records\nstep {mark}", justify="right")
    table.add_column("1,472 records\nstep 2000", justify="right")
    for party in PARTIES:
        cells = [f"{at(long, mark)[party]:.1f}" for mark in marks]
        table.add_row(party, *cells, f"{at(short, marks[-1])[party]:.1f}")
    return table


def at(samples: list[Sample], step: int) -> Sample:
    """Return the first sample at or after a step."""
    return next(sample for sample in samples if sample["step"] >= step)


if __name__ == "__main__":
    main()

"""Samples per second of a chain in a stock deployment, beside what it is measured against.

1 to 4 trainers on the quickstart's CNN: the chain (SuperLink and SuperNodes with stock
flags on loopback, live links, TLS; with and without sealing), the same model in one
process, and ``torch.distributed.pipelining`` over gloo with the same segments and
micro-batches. They run in turn, one after the other on the same cores, each with PyTorch's
default threads.
The first 60 steps are left out: memory and caches settle, most of all in the chain.

    python benchmarks/throughput.py [--trainers 1 2 3 4] [--repeats 2] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
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
PEERS = ROOT / "benchmarks" / "peers.py"
BATCH, STEPS, WARM_UP = 256, 40, 60
TIMEOUT = 300
ONE, PEER, CHAIN, SEALED = "one process", "pipelining", "chain", "chain, sealed"
WITH = {
    CHAIN: "seal=false attest=false watermark=false",
    SEALED: "seal=true attest=false watermark=false",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trainers", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--microbatches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help=f"of {STEPS} steps, above 1")
    arguments = parser.parse_args()
    rounds = arguments.rounds
    rows = []
    for trainers in arguments.trainers:
        rows += measure(trainers, arguments.microbatches, arguments.repeats, rounds)
    show(rows)
    facts = {
        "seed": 0,
        "steps": STEPS * rounds,
        "warm-up": WARM_UP,
        "repeats": arguments.repeats,
        "batch-size": BATCH,
    }
    print(f"raw output: {save('throughput', {**facts, 'rows': rows}).relative_to(ROOT)}")


def measure(
    trainers: int, microbatches: list[int], repeats: int, rounds: int
) -> list[dict[str, Any]]:
    """Run everything for a number of trainers, in turn; return a row for each."""
    times: dict[tuple[str, int], list[float]] = {}
    nodes: list[NodeConfig] = [{"role": "owner"}]
    nodes += [{"role": "trainer", "stage": i + 1} for i in range(trainers)]
    with tempfile.TemporaryDirectory() as folder:
        with Federation(Path(folder) / "federation", nodes) as federation:
            for repeat in range(repeats):
                take(times, (ONE, 1), peer("one-process", trainers, rounds, 1))
                for count in microbatches:
                    if trainers > 1:
                        seconds = peer("pipelining", trainers, rounds, count)
                        take(times, (PEER, count), seconds)
                    for what in (CHAIN, SEALED):
                        runs = Path(folder) / f"runs-{repeat}-{count}-{len(what)}"
                        config = f"microbatches={count} num-rounds={rounds} {WITH[what]}"
                        chain(federation, runs, trainers, config)
                        seconds = [step["seconds"] for step in noted(runs, "step")]
                        take(times, (what, count), seconds)
    return [
        {
            "trainers": trainers,
            "what": what,
            "microbatches": count,
            "step-seconds-median": statistics.median(seconds),
            "step-seconds": [round(s, 5) for s in seconds],
        }
        for (what, count), seconds in times.items()
    ]


def take(
    times: dict[tuple[str, int], list[float]], key: tuple[str, int], seconds: list[float]
) -> None:
    times.setdefault(key, []).extend(seconds[WARM_UP:])


def peer(name: str, trainers: int, rounds: int, microbatches: int) -> list[float]:
    command = [sys.executable, str(PEERS), name, "--trainers", str(trainers)]
    command += ["--steps", str(STEPS), "--rounds", str(rounds)]
    command += ["--microbatches", str(microbatches)]
    # As the federation sets it for the chain: waiting threads leave the cores to others.
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def chain(federation: Federation, runs: Path, trainers: int, config: str) -> None:
    """Run the app in a federation; what it noted lies under the folder of runs."""
    config += f" run-dir='{runs}' task.trainers={trainers} task.records={STEPS * BATCH}"
    federation.submit(APP, config)
    # Asking Flower starts a process that takes a core: only once training is over.
    deadline = time.monotonic() + TIMEOUT
    while not any('"delivery"' in path.read_text() for path in runs.glob("*/metrics.jsonl")):
        if time.monotonic() > deadline:
            raise TimeoutError(f"a run took more than {TIMEOUT} s")
        time.sleep(0.5)
    run = federation.wait()
    if run["status"] != "finished:completed":
        raise RuntimeError(f"the run ended as {run['status']}")


def noted(runs: Path, kind: str) -> list[dict[str, Any]]:
    (path,) = runs.glob("*/metrics.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"Quickstart CNN, batch {BATCH}, clean, medians")
    for name in ("trainers", "", "micro-\nbatches", "step, ms", "samples/s"):
        table.add_column(name, justify="right" if name else "left")
    table.add_column("speed\nx one process", justify="right")
    table.add_column("step time\nx pipelining", justify="right")
    middle = {
        (r["trainers"], r["what"], r["microbatches"]): r["step-seconds-median"] for r in rows
    }
    for (trainers, what, count), seconds in middle.items():
        against = middle.get((trainers, PEER, count)) if what in (CHAIN, SEALED) else None
        table.add_row(
            str(trainers),
            what,
            str(count),
            f"{seconds * 1000:.1f}",
            f"{BATCH / seconds:,.0f}",
            f"{middle[trainers, ONE, 1] / seconds:.2f}",
            f"{seconds / against:.2f}" if against else "",
        )
    console = Console(width=110)
    console.print(table)
    console.print(" ".join(f"{k}={v}" for k, v in machine().items()), highlight=False)


if __name__ == "__main__":
    main()

"""One request and its reply by payload: mailbox, live link, LocalGrid.

In a Flower simulation, and in a deployment of a SuperLink and a SuperNode with stock flags,
all on loopback.

    python benchmarks/links.py
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

import numpy as np  # noqa: E402
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict  # noqa: E402
from flwr.clientapp import ClientApp  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from benchmarks.machine import machine, save  # noqa: E402
from examples.deployment.federation import Federation  # noqa: E402
from examples.simulate import simulate  # noqa: E402
from flwr_clicooper import LocalGrid  # noqa: E402
from flwr_clicooper.grids.exchange import exchange  # noqa: E402

SIZES = {"1 KB": 1000, "1 MB": 1_000_000, "16 MB": 16_000_000}
APP = ROOT / "benchmarks" / "echo_app"
Times = dict[str, list[float]]


def main() -> None:
    rows: dict[str, Times] = {"LocalGrid": local()}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "simulation.json"
        expect(simulate(APP, 1, f"result='{result}' repeats=10"))
        rows |= named("simulation", result)
        result = Path(folder) / "deployment.json"
        with Federation(Path(folder) / "federation", [{"role": "owner"}]) as federation:
            expect(federation.run(APP, f"result='{result}' repeats=3"))
        rows |= named("deployment", result)
    show(rows)
    print(f"raw output: {save('links', {'seconds': rows}).relative_to(ROOT)}")


def expect(run: dict[str, Any]) -> None:
    if run["status"] != "finished:completed":
        raise RuntimeError(f"the run ended as {run['status']}: {run.get('status-details')}")


def named(where: str, result: Path) -> dict[str, Times]:
    return {f"{where}, {how}": times for how, times in json.loads(result.read_text()).items()}


def local() -> Times:
    app = ClientApp()

    @app.train("echo")
    def echo(message: Message, context: Context) -> Message:
        return Message(message.content, reply_to=message)

    grid = LocalGrid(app, [{}], {})
    (node_id,) = grid.get_node_ids()
    times: Times = {}
    for name, size in SIZES.items():
        data = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
        times[name] = []
        for _ in range(30):
            started = time.perf_counter()
            content = RecordDict({"data": ArrayRecord({"0": Array(data)})})
            exchange(grid, [Message(content, node_id, "train.echo", ttl=60.0)], timeout=60)
            times[name].append(time.perf_counter() - started)
    return times


def show(rows: dict[str, Times]) -> None:
    table = Table(title="One request and its reply, median (min to max), ms")
    table.add_column("")
    for name in SIZES:
        table.add_column(name, justify="right")
    for where, times in rows.items():
        cells = []
        for values in times.values():
            low, middle, high = min(values), statistics.median(values), max(values)
            cells.append(f"{middle * 1000:.2f} ({low * 1000:.2f} to {high * 1000:.2f})")
        table.add_row(where, *cells)
    console = Console(width=120)
    console.print(table)
    console.print(" ".join(f"{k}={v}" for k, v in machine().items()), highlight=False)


if __name__ == "__main__":
    main()

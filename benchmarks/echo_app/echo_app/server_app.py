"""Times requests to one node, by mailbox and over a live link."""

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from flwr_clicooper.chain.messages import Action, instruction
from flwr_clicooper.grids.exchange import exchange
from flwr_clicooper.grids.live import LiveGrid

app = ServerApp()
SIZES = {"1 KB": 1000, "1 MB": 1_000_000, "16 MB": 16_000_000}


@app.main()
def main(grid: Grid, context: Context) -> None:
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.1)
    config = context.run_config
    results = {"mailbox": measure(grid, nodes[0], int(config["repeats"]))}
    live = LiveGrid(grid)
    message = instruction(Action.LIVE, nodes[0], live.invite(nodes[0]), ttl=3600)
    (message_id,) = grid.push_messages([message])
    live.expect(nodes[0], message_id)
    while not live.linked():
        live.wait(0.1)
    results["live"] = measure(live, nodes[0], int(config["live-repeats"]))
    live.close()
    Path(str(config["result"])).write_text(json.dumps(results))


def measure(grid: Grid, node_id: int, repeats: int) -> dict[str, list[float]]:
    """Return seconds per request and reply, the Flower message's encoding included."""
    times: dict[str, list[float]] = {}
    for name, size in SIZES.items():
        times[name] = []
        data = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
        for _ in range(repeats):
            started = time.perf_counter()
            content = RecordDict(
                {"data": ArrayRecord({"0": Array(data)}), "clicooper": ConfigRecord({"n": 1})}
            )
            message = Message(content, node_id, "train.echo", ttl=600.0)
            (reply,) = exchange(grid, [message], timeout=120)
            times[name].append(time.perf_counter() - started)
            assert len(reply.content.array_records["data"]["0"].data) > size
    return times

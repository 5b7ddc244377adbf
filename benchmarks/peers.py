"""What the chain is measured against, each in processes of its own.

The same model trained in one process, and by ``torch.distributed.pipelining`` over gloo
with one process per trainer's segment. Both print the seconds of each step as JSON.

    python benchmarks/peers.py one-process --trainers 3 --steps 40 --rounds 3
    python benchmarks/peers.py pipelining --trainers 3 --steps 40 --microbatches 4
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks" / "throughput_app")]

import torch  # noqa: E402
from throughput_app.task import ThroughputTask  # noqa: E402
from torch import Tensor, distributed, nn  # noqa: E402

from benchmarks.one_process import step_seconds  # noqa: E402
from examples.simulate import free_ports  # noqa: E402
from flwr_clicooper.chain.build import build_segments  # noqa: E402
from flwr_clicooper.options import task_config  # noqa: E402

BATCH = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("peer", choices=["one-process", "pipelining", "rank"])
    parser.add_argument("--trainers", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True, help="per round")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--rank", type=int, default=0)
    arguments = parser.parse_args()
    config = {
        "release": "clean",
        "batch-size": BATCH,
        "num-rounds": arguments.rounds,
        "learning-rate": 0.1,
        "task.trainers": arguments.trainers,
        "task.records": arguments.steps * BATCH,
    }
    if arguments.peer == "one-process":
        print(json.dumps(step_seconds(ThroughputTask(), config)))
    elif arguments.peer == "rank":
        print(json.dumps(rank(arguments.rank, arguments.microbatches, config)))
    else:
        start_ranks(arguments)


def start_ranks(arguments: argparse.Namespace) -> None:
    """Start one process per segment; print what the first says."""
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_ports(1)[0]),
        "WORLD_SIZE": str(arguments.trainers),
    }
    command = [sys.executable, __file__, "rank", "--trainers", str(arguments.trainers)]
    command += ["--steps", str(arguments.steps), "--rounds", str(arguments.rounds)]
    command += ["--microbatches", str(arguments.microbatches)]
    ranks = [
        subprocess.Popen(
            [*command, "--rank", str(i)],
            env={**environment, "RANK": str(i)},
            stdout=subprocess.PIPE if i == 0 else subprocess.DEVNULL,
            text=True,
        )
        for i in range(arguments.trainers)
    ]
    said, _ = ranks[0].communicate()
    if any(process.wait() for process in ranks):
        raise RuntimeError("a rank failed")
    print(said.splitlines()[-1])


def rank(index: int, microbatches: int, run_config: dict[str, Any]) -> list[float]:
    """Train one segment in the pipeline; return the seconds per step.

    As in the chain, the head's activations are there before training begins.
    """
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

    distributed.init_process_group("gloo")
    task, config = ThroughputTask(), task_config(run_config, {})
    stages = config["task.trainers"]
    head, *segments = build_segments(task, config)
    train, _ = task.datasets(config)
    with torch.no_grad():
        activations = torch.cat([head(x) for x in torch.split(train.tensors[0], BATCH)])
    labels = train.tensors[1].long()
    segment: nn.Module = segments[index].train()
    optimizer = task.optimizer(segment, config)
    stage = PipelineStage(segment, index, stages, torch.device("cpu"))

    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, target)

    # 1F1B takes no fewer micro-batches than stages; with fewer the two are the same.
    kind: Any = Schedule1F1B if microbatches >= stages else ScheduleGPipe
    schedule = kind(stage, microbatches, loss_fn=loss)
    times = []
    rounds = range(config["num-rounds"])
    order = torch.cat([torch.randperm(len(labels)) for _ in rounds])
    for rows in torch.split(order, BATCH):
        distributed.barrier()
        started = time.perf_counter()
        inputs = (activations[rows],) if index == 0 else ()
        schedule.step(*inputs, target=labels[rows] if index == stages - 1 else None)
        optimizer.step()
        optimizer.zero_grad()
        distributed.barrier()
        times.append(time.perf_counter() - started)
    distributed.destroy_process_group()
    return times


if __name__ == "__main__":
    main()

"""Speed of what is done to each activation before it leaves: clip, noise, seal, open.

Median of repeated calls on a batch of 12,000 activations of 3,136 numbers (150 MB), per
mechanism, and of sealing for 3.2 MB, one message of the quickstart.

    python benchmarks/mechanisms.py
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from benchmarks.machine import machine, save  # noqa: E402
from flwr_clicooper.privacy.release import GaussianRelease, add_noise  # noqa: E402
from flwr_clicooper.privacy.sealing import KeyRing, introduce  # noqa: E402
from flwr_clicooper.provenance.keys import Identity  # noqa: E402

RECORDS, ELEMENTS, REPEATS = 12_000, 3136, 7
MESSAGE = 3_211_264


def main() -> None:
    batch = torch.randn(RECORDS, ELEMENTS)
    size = batch.numel() * batch.element_size()
    target = batch.clone()
    owner, trainer = rings()
    data = memoryview(bytearray(MESSAGE))
    sealed = owner.seal("trainer 1", b"step", data)
    speeds = {
        "clip and noise, record": speed(
            lambda: GaussianRelease("record", 1.0, 2.0)(batch), size
        ),
        "clip and noise, element": speed(
            lambda: GaussianRelease("element", 1.0, 2.0)(batch), size
        ),
        "noise": speed(lambda: add_noise(target, 1.0), size),
        "clip, record": speed(lambda: GaussianRelease("record", 1.0, 0.0)(batch), size),
        "seal": speed(lambda: owner.seal("trainer 1", b"step", data), MESSAGE),
        "open": speed(lambda: trainer.open("owner", b"step", sealed), MESSAGE),
    }
    table = Table(title="MB/s, median")
    table.add_column("")
    table.add_column("MB/s", justify="right")
    for name, value in speeds.items():
        table.add_row(name, f"{value:,.0f}")
    console = Console(width=110)
    console.print(table)
    console.print(" ".join(f"{k}={v}" for k, v in machine().items()), highlight=False)
    print(f"raw output: {save('mechanisms', {'MB/s': speeds}).relative_to(ROOT)}")


def rings() -> tuple[KeyRing, KeyRing]:
    names, keys = ("owner", "trainer 1"), (Identity.new(), Identity.new())
    made = [
        introduce("1", name, str(key.public), key.sign)
        for name, key in zip(names, keys, strict=True)
    ]
    (one, one_key), (two, two_key) = made
    return KeyRing(one, one_key, {names[1]: two}), KeyRing(two, two_key, {names[0]: one})


def speed(call: Callable[[], object], size: int) -> float:
    """Return megabytes per second."""
    call()
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return round(size / statistics.median(seconds) / 1e6, 1)


if __name__ == "__main__":
    main()

"""Memory does not grow with the number of steps."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from tests.live_process import ProcessGrid
from tests.tasks import ConvTask, run_local

STEPS_PER_ROUND, ROUNDS = 39, 18
EARLY, ALLOWED = 200, 3e6


def own_memory(pid: int | str) -> int:
    """Bytes of a process that are not mapped files."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    (line,) = [x for x in status.splitlines() if x.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


def test_memory_of_relay_and_trainers_stays_over_700_steps(tmp_path: Path) -> None:
    grids: list[ProcessGrid] = []
    samples: list[tuple[int, dict[str, int]]] = []
    over = threading.Event()

    class Grid(ProcessGrid):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)
            grids.append(self)

    def watch() -> None:
        while not over.wait(0.5):
            steps = 0
            for path in tmp_path.glob("*/metrics.jsonl"):
                notes = map(json.loads, path.read_text().splitlines())
                steps = sum(note["kind"] == "step" for note in notes)
            found = {"relay": own_memory("self")}
            for name, (process, _) in dict(grids[0].processes if grids else {}).items():
                found[name] = own_memory(process.pid)
            if steps > EARLY and len(found) == 4 and all(found.values()):
                samples.append((steps, found))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run_local(
            ConvTask(),
            2,
            tmp_path,
            Grid,
            link="live",
            release="interactive",
            batch_size=2,
            num_rounds=ROUNDS,
            **{"task.middle": 1},
        )
    finally:
        over.set()
        watcher.join()
    (first_step, first), (last_step, last) = samples[0], samples[-1]
    assert last_step > first_step + STEPS_PER_ROUND * ROUNDS / 2
    grown = {name: last[name] - first[name] for name in first}
    assert max(grown.values()) < ALLOWED, grown

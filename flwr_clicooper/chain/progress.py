"""What a person sees while a run goes on: a bar on a terminal, lines in a log."""

from __future__ import annotations

import time
from logging import INFO

from flwr.common.logger import log
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_LINE_EVERY = 5.0
_WIDTH = 24


class StepProgress:
    """Shows steps done, loss, samples per second and bytes.

    On a terminal this is one bar that moves. Elsewhere, as in ``flwr run --stream``, it is
    a line every five seconds and at the end of each round.

    Parameters
    ----------
    rounds, steps : int
        Rounds, and steps per round.
    done : int
        Rounds that an earlier part of the run has done.
    """

    def __init__(self, rounds: int, steps: int, done: int = 0) -> None:
        self.rounds, self.steps = rounds, steps
        self._done = done * steps
        self._records = 0
        self._started = self._shown = time.monotonic()
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TextColumn("{task.fields[facts]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task(
                "training", total=rounds * steps, completed=self._done, facts=""
            )
            self._bar.start()

    def step(self, round_: int, step: int, loss: float, records: int, nbytes: int) -> None:
        """Show that a step is done.

        Parameters
        ----------
        records : int
            Records in the step.
        nbytes : int
            Tensor bytes sent since the run began.
        """
        self._done += 1
        self._records += records
        now = time.monotonic()
        speed = self._records / max(now - self._started, 1e-9)
        facts = f"loss {loss:.4f}  {speed:,.0f} samples/s  {size(nbytes)} sent"
        if self._bar is not None:
            name = f"round {round_}/{self.rounds}"
            self._bar.update(self._task, advance=1, description=name, facts=facts)
        elif now - self._shown > _LINE_EVERY or step == self.steps - 1:
            self._shown = now
            filled = _WIDTH * self._done // (self.rounds * self.steps)
            bar = "#" * filled + "-" * (_WIDTH - filled)
            place = f"round {round_}/{self.rounds} step {step + 1}/{self.steps}"
            log(INFO, "[%s] %s  %s", bar, place, facts)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()


def size(nbytes: int) -> str:
    """Return a number of bytes for people, in powers of 1000."""
    value = float(nbytes)
    for unit in ("B", "KB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"

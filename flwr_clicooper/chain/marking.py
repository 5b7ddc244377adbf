"""The watermark of a segment in training: pushed step by step, complete at a round's end."""

from __future__ import annotations

from torch import nn

from flwr_clicooper.provenance.watermark import BITS, EVERY, Watermark, skip_reason
from flwr_clicooper.split.batches import Position

OFF = "the option 'watermark' is false"


class Marking:
    """Marks one segment with the key of each round.

    Parameters
    ----------
    module : nn.Module
        The segment.
    wanted : bool
        The option `watermark`.
    """

    def __init__(self, module: nn.Module, *, wanted: bool) -> None:
        self._module = module
        self._key = ""
        self._mark: Watermark | None = None
        self.skipped = skip_reason(module) if wanted else OFF

    def use(self, key: str) -> None:
        """Mark with a key from now on; an empty one is for no mark."""
        if key != self._key:
            self._key, self._mark = key, None

    def before_step(self, at: Position) -> None:
        """Set the mark in a round's first step, and hold it in some of the others.

        Training then goes on around the mark. Set at the end alone, it would cost accuracy.
        """
        if at.step % EVERY == 0 and (mark := self._watermark()) is not None:
            if at.step == 0:
                mark.top_up(self._module)
            else:
                mark.push(self._module)

    def complete(self) -> None:
        """Change the weights so that every bit of the mark holds."""
        if (mark := self._watermark()) is not None:
            mark.top_up(self._module)

    def found(self) -> tuple[int, int]:
        """Return the bits of the mark, and how many the weights carry; 0 and 0 without one."""
        mark = self._watermark()
        return (0, 0) if mark is None else (BITS, mark.matches(self._module.state_dict()))

    def _watermark(self) -> Watermark | None:
        if self._mark is None and self._key and not self.skipped:
            self._mark = Watermark(bytes.fromhex(self._key), self._module.state_dict())
        return self._mark

"""Where a model can be cut, what each cut costs, and the segments of chosen cuts."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from torch import Tensor, nn

from flwr_clicooper.errors import SplitError
from flwr_clicooper.split.modules import check_unshared
from flwr_clicooper.split.specs import TensorSpec, describe
from flwr_clicooper.split.trace import TracedModel, trace


@dataclass(frozen=True)
class Cut:
    """One possible cut and its cost.

    Attributes
    ----------
    layer : str
        The cut layer: the last layer before the cut.
    place : int
        Number of traced operations before the cut.
    parameters : tuple of int
        Trainable and frozen parameters before and after the cut.
    flops : tuple of int
        Forward FLOPs per record before and after it (matrix products, convolutions).
    crossing : tuple of TensorSpec
        What crosses, per record.
    """

    layer: str
    place: int
    parameters: tuple[int, int]
    flops: tuple[int, int]
    crossing: tuple[TensorSpec, ...]

    @property
    def nbytes(self) -> int:
        """Bytes per record that cross forward; as many return as gradients."""
        return sum(spec.nbytes for spec in self.crossing)


class SplitPlan(Sequence[nn.Module]):
    """The segments of a model, and what every possible cut would cost.

    A plan is a sequence of its segments, so ``SplitTask.segments()`` may return it.
    Without cuts it has one segment, the model, and serves to look and to choose.

    Parameters
    ----------
    model : nn.Module
        A model that ``torch.fx`` can trace. The segments share its submodules.
    example_input : Tensor or tuple of Tensor
        A batch of at least one record; the model runs on it once.
    cuts : sequence of str
        Cut layers in the order of execution. The cut is after the layer: its output
        crosses.

    Raises
    ------
    SplitError
        The model cannot be traced, a cut layer does not exist, cuts are out of order,
        something crosses that is not a batch of records, or a parameter would be on
        both sides of a cut.
    """

    def __init__(
        self,
        model: nn.Module,
        example_input: Tensor | tuple[Tensor, ...],
        cuts: Sequence[str] = (),
    ) -> None:
        self._traced = trace(model, example_input)
        self.cuts = tuple(cuts)
        places = [self._traced.end_of(layer) for layer in cuts]
        for layer, place in zip(cuts, places, strict=True):
            self._check_crossing(layer, place)
        if sorted(set(places)) != places:
            right = sorted(set(cuts), key=self._traced.end_of)
            raise SplitError(
                f"cuts {list(cuts)} do not leave operations between each other in the "
                f"order of execution, which is {right}"
            )
        self.segments = self._traced.cut(places)
        check_unshared(self.segments)

    @overload
    def __getitem__(self, index: int) -> nn.Module: ...
    @overload
    def __getitem__(self, index: slice) -> list[nn.Module]: ...
    def __getitem__(self, index: int | slice) -> nn.Module | list[nn.Module]:
        return self.segments[index]

    def __len__(self) -> int:
        return len(self.segments)

    def possible_cuts(self) -> list[Cut]:
        """Return every layer after which the model can be cut, in order.

        Layers that end at the same place are one cut, named by the outermost. Places
        where a parameter or buffer would be on both sides are left out.
        """
        traced = self._traced
        found: dict[int, Cut] = {}
        for layer in traced.layers():
            place = traced.end_of(layer)
            if place == len(traced.nodes) or _refusal(traced, place):
                continue
            before = traced.tensors(0, place)
            after = traced.tensors(place, len(traced.nodes))
            if before.keys() & after.keys():
                continue
            flops = [traced.flops[n] for n in traced.nodes]
            found[place] = Cut(
                layer,
                place,
                (_count(before.values()), _count(after.values())),
                (sum(flops[:place]), sum(flops[place:])),
                tuple(_specs(traced, place)),
            )
        return [found[place] for place in sorted(found)]

    def propose(self, balance: Sequence[float]) -> list[str]:
        """Return cuts whose segments cost what ``balance`` says.

        Parameters
        ----------
        balance : sequence of float
            One positive number per segment, the head first: its share of the compute.

        Returns
        -------
        list of str
            The cut layers that keep the slowest party fastest: they minimise the
            largest FLOPs per share; among equals, the bytes that cross.

        Raises
        ------
        SplitError
            The model has too few possible cuts, or a share is not positive.
        """
        if len(balance) < 2 or any(not share > 0 for share in balance):
            raise SplitError(
                f"balance {list(balance)}: give one positive number per segment, "
                "at least two, the head's first"
            )
        cuts = self.possible_cuts()
        if len(cuts) < len(balance) - 1:
            raise SplitError(
                f"balance {list(balance)} asks for {len(balance) - 1} cuts; the model has "
                f"{len(cuts)} possible ones"
            )
        return [cut.layer for cut in _best(cuts, list(balance))]

    def describe(self) -> str:
        """Print a table of the possible cuts, and return it."""
        text = str(self)
        print(text)
        return text

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table(title="Possible cuts (after the named layer; chosen ones marked)")
        for name in ("", "cut layer"):
            table.add_column(name)
        for name in ("parameters\nbefore", "after", "FLOPs/record\nbefore", "after"):
            table.add_column(name, justify="right")
        table.add_column("bytes/record\ncrossing", justify="right")
        table.add_column("what crosses")
        chosen = {self._traced.end_of(layer) for layer in self.cuts}
        for cut in self.possible_cuts():
            numbers = (*cut.parameters, *cut.flops, cut.nbytes)
            table.add_row(
                "*" if cut.place in chosen else "",
                cut.layer,
                *(f"{n:,}" for n in numbers),
                describe(cut.crossing).replace("[", r"\["),
            )
        console = Console(file=io.StringIO(), width=130)
        console.print(table)
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    def _check_crossing(self, layer: str, place: int) -> None:
        if place == len(self._traced.nodes):
            raise SplitError(f"cut {layer!r} is at the model's end; nothing would follow it")
        refusal = _refusal(self._traced, place)
        if refusal:
            raise SplitError(f"cut {layer!r}: {refusal}; move the cut")


def split_model(
    model: nn.Module,
    cuts: Sequence[str] | None = None,
    *,
    example_input: Tensor | tuple[Tensor, ...],
    balance: Sequence[float] | None = None,
) -> SplitPlan:
    """Cut a model into segments.

    Parameters
    ----------
    model : nn.Module
        A model that ``torch.fx`` can trace. Skip connections may cross a cut.
    cuts : sequence of str, optional
        Cut layers by name; each cut is after its layer.
    example_input : Tensor or tuple of Tensor
        A batch as the model takes it.
    balance : sequence of float, optional
        In place of cuts: the share of compute per segment, head first.

    Returns
    -------
    SplitPlan
        A sequence of segments; ``describe()`` prints the possible cuts.

    Raises
    ------
    SplitError
        As `SplitPlan`; or both or neither of cuts and balance are given.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> head, tail = split_model(model, cuts=["1"], example_input=torch.zeros(2, 4))
    """
    if (cuts is None) == (balance is None):
        raise SplitError("give either cuts (layer names) or balance (a share per segment)")
    if cuts is None:
        assert balance is not None
        cuts = SplitPlan(model, example_input).propose(balance)
    return SplitPlan(model, example_input, cuts)


def _refusal(traced: TracedModel, place: int) -> str:
    """Return why a cut at a place is impossible, or nothing."""
    for node in traced.crossing(place):
        value = traced.values[node]
        if not isinstance(value, TensorSpec):
            return f"{node.name!r} would cross it, which is {value}, not a batch of records"
    return "" if traced.crossing(place) else "nothing crosses it"


def _specs(traced: TracedModel, place: int) -> Iterator[TensorSpec]:
    for node in traced.crossing(place):
        value = traced.values[node]
        assert isinstance(value, TensorSpec)
        yield value


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() for t in tensors if isinstance(t, nn.Parameter))


def _best(cuts: list[Cut], balance: list[float]) -> list[Cut]:
    """Choose cuts by dynamic programming over (segments so far, last cut)."""
    total = sum(cuts[0].flops)
    best: dict[int, tuple[tuple[float, int], list[Cut]]] = {
        i: ((c.flops[0] / balance[0], c.nbytes), [c]) for i, c in enumerate(cuts)
    }
    for share in balance[1:-1]:
        longer: dict[int, tuple[tuple[float, int], list[Cut]]] = {}
        for i, cut in enumerate(cuts):
            options = [
                (
                    (
                        max(score[0], (cut.flops[0] - chosen[-1].flops[0]) / share),
                        score[1] + cut.nbytes,
                    ),
                    [*chosen, cut],
                )
                for j, (score, chosen) in best.items()
                if j < i
            ]
            if options:
                longer[i] = min(options, key=lambda option: option[0])
        best = longer
    finished = [
        ((max(score[0], (total - chosen[-1].flops[0]) / balance[-1]), score[1]), chosen)
        for score, chosen in best.values()
    ]
    return min(finished, key=lambda option: option[0])[1]

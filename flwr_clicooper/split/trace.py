"""From one ``nn.Module`` to a list of segments, with ``torch.fx``.

The traced graph is a list of operations in execution order. A cut is a place in that
list; whatever is computed before it and used after it crosses. Each segment becomes a
``GraphModule`` that takes what crosses the cut before it, in order, and returns what
crosses the cut after it, so a value that skips over a segment is carried through it.
(``torch.fx.passes.split_module`` wires such a value around the segment, which a chain
of parties cannot do.) Submodules stay submodules: ``train()``, ``eval()``, buffers and
the names in ``state_dict()`` survive.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from flwr_clicooper.errors import SplitError
from flwr_clicooper.split.modules import keeping_modes
from flwr_clicooper.split.specs import TensorSpec

WAY_OUT = "return the segments by hand from SplitTask.segments() instead"


@dataclass(frozen=True)
class TracedModel:
    """A model as a list of operations, with what each of them costs.

    Attributes
    ----------
    module : fx.GraphModule
        The traced model.
    nodes : list of fx.Node
        Its operations in execution order, inputs first, without the output.
    values : dict of fx.Node to object
        What each operation gave for the example input: a `TensorSpec`, or the name of
        the type of a value that is not a batch of records.
    flops : dict of fx.Node to int
        Forward FLOPs per record of matrix products and convolutions.
    """

    module: fx.GraphModule
    nodes: list[fx.Node]
    values: dict[fx.Node, TensorSpec | str]
    flops: dict[fx.Node, int]

    @property
    def results(self) -> list[fx.Node]:
        """The operations whose values the model returns."""
        (output,) = (n for n in self.module.graph.nodes if n.op == "output")
        return list(output.all_input_nodes)

    def crossing(self, place: int) -> list[fx.Node]:
        """Return the operations before ``place`` whose values are used after it."""
        before = self.nodes[:place]
        after = set(self.nodes[place:])
        results = set(self.results)
        return [
            n
            for n in before
            if n.op != "get_attr" and (n in results or any(u in after for u in n.users))
        ]

    def end_of(self, layer: str) -> int:
        """Return the place right after the last operation of a layer.

        Raises
        ------
        SplitError
            No operation belongs to a layer of that name.
        """
        places = [i for i, n in enumerate(self.nodes) if _belongs(n, layer)]
        if not places:
            names = list(self.layers())
            raise SplitError(
                f"the model has no layer {layer!r} that its forward pass calls; "
                f"layers are {', '.join(names[:40])}{', ...' if len(names) > 40 else ''}"
            )
        return places[-1] + 1

    def layers(self) -> list[str]:
        """Return the names of all layers in the order in which they end."""
        ends: dict[str, int] = {}
        for place, node in enumerate(self.nodes):
            for name in _owners(node):
                ends[name] = place
        return sorted(ends, key=lambda name: (ends[name], -name.count(".")))

    def tensors(self, start: int, stop: int) -> dict[int, Tensor]:
        """Return the parameters and buffers that some operations use, by identity."""
        named = [
            *self.module.named_parameters(remove_duplicate=False),
            *self.module.named_buffers(remove_duplicate=False),
        ]
        used: dict[int, Tensor] = {}
        for node in self.nodes[start:stop]:
            sources = [n for n in node.all_input_nodes if n.op == "get_attr"]
            if node.op == "call_module":
                sources.append(node)
            for target in (str(source.target) for source in sources):
                for name, tensor in named:
                    if name == target or name.startswith(f"{target}."):
                        used[id(tensor)] = tensor
        return used

    def cut(self, places: Sequence[int]) -> list[nn.Module]:
        """Return one module per segment for cuts at the given places."""
        bounds = [0, *places, len(self.nodes)]
        return [
            self._segment(start, stop, last=stop == bounds[-1])
            for start, stop in pairwise(bounds)
        ]

    def _segment(self, start: int, stop: int, *, last: bool) -> nn.Module:
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in self.crossing(start):
            copies[node] = graph.placeholder(node.name)
        for node in self.nodes[start:stop]:
            if node.op == "get_attr":
                continue  # fetched where it is used
            copies[node] = graph.node_copy(node, lambda n: self._copy_of(n, copies, graph))
        if last:
            (output,) = (n for n in self.module.graph.nodes if n.op == "output")
            graph.node_copy(output, lambda n: self._copy_of(n, copies, graph))
        else:
            leaving = [copies[n] for n in self.crossing(stop)]
            graph.output(leaving[0] if len(leaving) == 1 else tuple(leaving))
        graph.lint()
        return fx.GraphModule(self.module, graph, class_name="Segment")

    def _copy_of(
        self, node: fx.Node, copies: dict[fx.Node, fx.Node], graph: fx.Graph
    ) -> fx.Node:
        if node not in copies:  # a parameter or constant; `check_unshared` sees doubles
            copies[node] = graph.get_attr(str(node.target))
        return copies[node]


def trace(model: nn.Module, example_input: Tensor | tuple[Tensor, ...]) -> TracedModel:
    """Trace a model and measure each of its operations on an example.

    Parameters
    ----------
    model : nn.Module
        Left as it was, in its train or eval mode.
    example_input : Tensor or tuple of Tensor
        A batch; the model is run once on it in eval mode.

    Raises
    ------
    SplitError
        The model cannot be traced, or traces differently in train and eval mode; the
        text gives the reason and the way out.
    """
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    with keeping_modes(model):
        training = _symbolic_trace(model.train())
        traced = _symbolic_trace(model.eval())
        _check_same(training.graph, traced.graph)
        nodes = [n for n in traced.graph.nodes if n.op != "output"]
        records = inputs[0].shape[0]
        meter = _Meter(traced, records)
        try:
            with torch.no_grad():
                meter.run(*inputs)
        except Exception as error:
            raise SplitError(
                f"the model does not run on the example input: {error}"
            ) from error
        return TracedModel(traced, nodes, meter.values, meter.flops)


def _symbolic_trace(model: nn.Module) -> fx.GraphModule:
    try:
        return fx.symbolic_trace(model)
    except Exception as error:  # fx raises whatever the model's own code raised
        raise SplitError(
            f"{type(model).__name__} cannot be traced by torch.fx: {error} "
            f"(often an 'if' or a loop over a tensor's values); {WAY_OUT}"
        ) from error


def _check_same(training: fx.Graph, evaluation: fx.Graph) -> None:
    def text(graph: fx.Graph) -> list[str]:
        return [n.format_node() or n.op for n in graph.nodes]

    pairs = zip(text(training), text(evaluation), strict=False)
    if text(training) == text(evaluation):
        return
    where = next((f"'{a}' against '{b}'" for a, b in pairs if a != b), "different lengths")
    raise SplitError(
        f"the forward pass differs between train() and eval(): {where}. Tracing would fix "
        "one of the two for good. Use modules (nn.Dropout) instead of functions that read "
        f"self.training, or {WAY_OUT}"
    )


class _Meter(fx.Interpreter):
    """Runs a graph and notes what each operation gives and its FLOPs per record."""

    def __init__(self, module: fx.GraphModule, records: int) -> None:
        super().__init__(module)
        self.records = records
        self.values: dict[fx.Node, TensorSpec | str] = {}
        self.flops: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        with FlopCounterMode(display=False) as counter:
            value = super().run_node(n)
        self.flops[n] = counter.get_total_flops() // self.records
        self.values[n] = _value(value, self.records)
        return value


def _value(value: object, records: int) -> TensorSpec | str:
    if isinstance(value, Tensor):
        if value.dim() and value.shape[0] == records:
            return TensorSpec.of(value)
        return f"a tensor without the batch as first dimension, {list(value.shape)}"
    return type(value).__name__


def _owners(node: fx.Node) -> Iterable[str]:
    """Yield the names of the modules that a node belongs to, outermost first."""
    stack = node.meta.get("nn_module_stack", {})
    yield from (str(name) for name, _ in stack.values() if str(name))


def _belongs(node: fx.Node, layer: str) -> bool:
    return layer in _owners(node)

"""One segment of a split model: forward, backward, step, and its state.

A segment computes exactly what it would compute inside the whole model. Forward
passes are seeded by their position in the run, so that dropout does not depend on
which process runs them. Several micro-batches may be in flight. A flight whose
autograd graph died with its process is computed again from its inputs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flwr_clicooper.errors import MessageError, StateError
from flwr_clicooper.split.batches import Position, derive_seed
from flwr_clicooper.split.modules import seeded
from flwr_clicooper.split.specs import Tensors, as_tensors, is_finite

Loss = Callable[[Tensors, Tensor], Tensor]


@dataclass
class Flight:
    """A micro-batch between its forward and its backward pass.

    Attributes
    ----------
    inputs : tuple of Tensor
        What came in, never modified.
    buffers : dict of str to Tensor
        Buffers before the forward pass; needed only to compute it again.
    stored : bool
        Whether the flight was read from files, after its first forward pass.
    leaves, outputs : tuple of Tensor, or None
        Ends of the autograd graph; None when the graph is gone.
    """

    inputs: Tensors
    buffers: dict[str, Tensor] = field(default_factory=dict)
    stored: bool = False
    leaves: Tensors | None = None
    outputs: Tensors | None = None


class Segment:
    """A trainable segment.

    Parameters
    ----------
    module : nn.Module
        The segment; called with one positional argument per tensor that crosses
        the cut before it.
    optimizer : Optimizer or None
        Over the module's trainable parameters; None when it has none.
    index : int
        Place in the model; 0 is the head.
    seed : int
        The run's public seed.
    device : torch.device
        Where the module computes. Inputs and outputs are on the CPU.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer | None,
        *,
        index: int,
        seed: int,
        device: torch.device | None = None,
    ) -> None:
        self.device = device or torch.device("cpu")
        self.module = module.to(self.device).train()
        self.optimizer = optimizer
        self.index = index
        self.seed = seed
        self.flights: dict[int, Flight] = {}

    # -- computing ---------------------------------------------------------------

    def forward(
        self, at: Position, inputs: Tensors, *, input_grads: bool, keep_buffers: bool
    ) -> Tensors:
        """Run the forward pass of a micro-batch and keep its graph.

        Parameters
        ----------
        at : Position
            Where in the run the micro-batch stands.
        inputs : tuple of Tensor
            Batches as they crossed the cut.
        input_grads : bool
            Whether `backward` must return the gradients of the inputs.
        keep_buffers : bool
            Keep what is needed to compute the flight again in another process.

        Returns
        -------
        tuple of Tensor
            Outputs, detached, on the CPU.
        """
        if at.microbatch in self.flights:
            raise MessageError(f"segment {self.index}: {at} is already in flight")
        flight = Flight(inputs, self.buffers() if keep_buffers else {})
        self._run(at, flight, input_grads)
        self.flights[at.microbatch] = flight
        assert flight.outputs is not None
        return tuple(output.detach().cpu() for output in flight.outputs)

    def backward(
        self, at: Position, gradients: dict[int, Tensor], *, input_grads: bool
    ) -> dict[int, Tensor]:
        """Run the backward pass of a micro-batch; parameter gradients accumulate.

        Parameters
        ----------
        at : Position
            The micro-batch, which must be in flight.
        gradients : dict of int to Tensor
            Gradient per output, by the output's place. An output that nothing
            depends on, or that is not floating point, has none.
        input_grads : bool
            Whether to return the gradients of the inputs.

        Returns
        -------
        dict of int to Tensor
            Gradient per input, by the input's place; empty without ``input_grads``.
        """
        flight = self.flights.pop(at.microbatch, None)
        if flight is None:
            raise MessageError(f"segment {self.index}: no forward pass is open for {at}")
        if flight.outputs is None:
            self._run(at, flight, input_grads)
        assert flight.outputs is not None
        assert flight.leaves is not None
        pairs = [
            (flight.outputs[place], gradient.to(self.device))
            for place, gradient in sorted(gradients.items())
            if flight.outputs[place].requires_grad
        ]
        if pairs:
            torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
        return _gradients(flight.leaves) if input_grads else {}

    def loss_backward(
        self,
        at: Position,
        inputs: Tensors,
        labels: Tensor,
        loss: Loss,
        weight: float,
        *,
        input_grads: bool,
    ) -> tuple[float, dict[int, Tensor]]:
        """Run forward, loss and backward of a micro-batch on the last segment.

        Parameters
        ----------
        labels : Tensor
            One row per record.
        loss : callable
            Mean loss over the records of (outputs, labels).
        weight : float
            Share of the batch that this micro-batch has.

        Returns
        -------
        loss : float
            The mean loss over this micro-batch, not weighted.
        gradients : dict of int to Tensor
            As `backward`.

        Raises
        ------
        MessageError
            The loss is NaN or infinite.
        """
        flight = Flight(inputs)
        self._run(at, flight, input_grads)
        assert flight.outputs is not None
        assert flight.leaves is not None
        value = loss(flight.outputs, labels.to(self.device))
        if not is_finite(value):
            raise MessageError(
                f"segment {self.index}: the loss at {at} is NaN or infinite; "
                "lower the learning rate or check the data"
            )
        if value.requires_grad:
            torch.autograd.backward(value * weight)
        return float(value.detach()), _gradients(flight.leaves) if input_grads else {}

    def step(self, lr_factor: float = 1.0) -> None:
        """Apply the accumulated gradients and clear them.

        Parameters
        ----------
        lr_factor : float
            Multiplies the learning rate that the optimizer was made with.

        Raises
        ------
        MessageError
            A micro-batch is still in flight.
        """
        if self.flights:
            raise MessageError(
                f"segment {self.index}: an optimizer step came while micro-batches "
                f"{sorted(self.flights)} are in flight"
            )
        step_optimizer(self.optimizer, lr_factor)

    def _run(self, at: Position, flight: Flight, input_grads: bool) -> None:
        """Compute a flight; one that was stored runs on the buffers that it had then.

        Other flights may have graphs that hold the module's own buffers, so these are
        left alone.
        """
        run: Callable[..., object] = self.module
        if flight.stored:
            then = {k: v.to(self.device, copy=True) for k, v in flight.buffers.items()}
            run = partial(_run_with, self.module, then)
        leaves = tuple(x.to(self.device) for x in flight.inputs)
        if input_grads:
            leaves = tuple(
                x.detach().requires_grad_() if x.is_floating_point() else x for x in leaves
            )
        # A segment may start with an in-place layer: it gets a copy to modify, the
        # leaf keeps the values that came in.
        copies = [x.clone() for x in leaves]
        seed = derive_seed(self.seed, "forward", self.index, at.round, at.step, at.microbatch)
        with seeded(seed, self.device):
            outputs = run(*copies)
        flight.leaves = leaves
        flight.outputs = as_tensors(outputs, f"segment {self.index}")

    # -- state -------------------------------------------------------------------

    def buffers(self) -> dict[str, Tensor]:
        """Return copies of the module's buffers, persistent or not."""
        return {k: v.detach().cpu().clone() for k, v in self.module.named_buffers()}

    def load_buffers(self, buffers: dict[str, Tensor]) -> None:
        """Set the buffers that are named."""
        _copy_into(dict(self.module.named_buffers()), buffers)

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients accumulated so far, by parameter name."""
        named = self.module.named_parameters()
        return {k: p.grad.detach().cpu() for k, p in named if p.grad is not None}

    def load_gradients(self, gradients: dict[str, Tensor]) -> None:
        """Set the accumulated gradients; parameters that are not named get none."""
        for name, parameter in self.module.named_parameters():
            value = gradients.get(name)
            parameter.grad = None if value is None else value.to(self.device)

    def tensors(self) -> dict[str, Tensor]:
        """Return all parameters and buffers on the CPU, each once, by name."""
        named = [*self.module.named_parameters(), *self.module.named_buffers()]
        return {k: v.detach().cpu().contiguous() for k, v in named}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Set what `tensors` returned."""
        named = [*self.module.named_parameters(), *self.module.named_buffers()]
        _copy_into(dict(named), tensors)

    def optimizer_state(self) -> tuple[dict[str, Tensor], str]:
        """Return the optimizer's tensors and the rest of its state as JSON.

        Raises
        ------
        StateError
            The optimizer keeps a value that is neither a tensor nor JSON.
        """
        if self.optimizer is None:
            return {}, "null"
        state = self.optimizer.state_dict()
        tensors: dict[str, Tensor] = {}
        plain: dict[str, dict[str, object]] = {}
        for slot, values in state["state"].items():
            for name, value in values.items():
                if isinstance(value, Tensor):
                    tensors[f"{slot}/{name}"] = value.detach().cpu().contiguous()
                else:
                    plain.setdefault(str(slot), {})[name] = value
        try:
            rest = json.dumps({"state": plain, "param_groups": state["param_groups"]})
        except TypeError as error:
            kind = type(self.optimizer).__name__
            raise StateError(
                f"segment {self.index}: the state of {kind} cannot be stored; allowed are "
                "tensors and JSON values in its state, and JSON values in its groups"
            ) from error
        return tensors, rest

    def load_optimizer_state(self, tensors: dict[str, Tensor], rest: str) -> None:
        """Set what `optimizer_state` returned."""
        if self.optimizer is None:
            return
        saved = json.loads(rest)
        state = {int(k): dict(v) for k, v in saved["state"].items()}
        for name, tensor in tensors.items():
            slot, key = name.split("/", 1)
            state.setdefault(int(slot), {})[key] = tensor
        self.optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})
        # PyTorch casts what it loads to the parameter's dtype; a float32 copy of a bfloat16
        # parameter must stay what it was.
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for name, tensor in tensors.items():
            slot, key = name.split("/", 1)
            loaded = self.optimizer.state[parameters[int(slot)]]
            if loaded[key].dtype != tensor.dtype:
                loaded[key] = tensor.to(loaded[key].device)


def step_optimizer(optimizer: Optimizer | None, lr_factor: float) -> None:
    """Step with a multiple of the optimizer's first learning rate; clear gradients."""
    if optimizer is None:
        return
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * lr_factor
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _run_with(module: nn.Module, buffers: dict[str, Tensor], *inputs: Tensor) -> object:
    return torch.func.functional_call(module, buffers, inputs)


def _copy_into(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in given.items():
            own[name].copy_(value)


def _gradients(leaves: Tensors) -> dict[int, Tensor]:
    return {i: x.grad.cpu() for i, x in enumerate(leaves) if x.grad is not None}

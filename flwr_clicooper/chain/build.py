"""From a task to checked segments: build, count, and pass an example through."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flwr_clicooper.errors import OptionError, SplitError
from flwr_clicooper.split.batches import BatchPlan, derive_seed
from flwr_clicooper.split.modules import check_unshared, keeping_modes, load_weights, seeded
from flwr_clicooper.split.specs import TensorSpec, as_tensors, describe
from flwr_clicooper.task import Config, SplitTask

EXAMPLE_RECORDS = 2


def build_segments(task: SplitTask, config: Config) -> list[nn.Module]:
    """Return all segments of a task with the weights that the run's seed gives.

    Raises
    ------
    SplitError
        There are too few segments, one is not a module, or two share a tensor.
    """
    with seeded(derive_seed(config["seed"], "weights")):
        segments = list(task.segments(config))
    tails = 1 if config["label-side"] == "owner" else 0
    if len(segments) < 2 + tails:
        raise SplitError(
            f"{type(task).__name__}.segments() gives {len(segments)} segments; "
            f"label-side = {config['label-side']!r} needs at least {2 + tails}: a head, "
            f"one per trainer{', and the tail that the owner keeps' if tails else ''}"
        )
    for index, segment in enumerate(segments):
        if not isinstance(segment, nn.Module):
            raise SplitError(
                f"segment {index} of {type(task).__name__} is a {type(segment).__name__}, "
                "not an nn.Module"
            )
        extra = [k for k, v in segment.state_dict().items() if not isinstance(v, Tensor)]
        if extra:
            raise SplitError(
                f"segment {index} keeps {extra[0]!r} in its state_dict, which is not a tensor "
                "and cannot be stored or delivered"
            )
    check_unshared(segments)
    return segments


def trainers_for(segments: Sequence[nn.Module], config: Config) -> int:
    """Return how many trainers a list of segments needs."""
    return len(segments) - (2 if config["label-side"] == "owner" else 1)


def build_optimizer(task: SplitTask, module: nn.Module, config: Config) -> Optimizer | None:
    """Return the optimizer of a segment; None where nothing can be trained."""
    if not any(p.requires_grad for p in module.parameters()):
        return None
    return task.optimizer(module, config)


def load_initial(module: nn.Module, weights: Mapping[str, Tensor], index: int) -> None:
    """Load the weights that are named ``"<index>.<name>"``, where there are any."""
    prefix = f"{index}."
    own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    if own:
        load_weights(module, own, f"segment {index}")


def propagate(
    segments: Sequence[nn.Module], incoming: Sequence[TensorSpec]
) -> list[list[TensorSpec]]:
    """Pass an example through segments; return the specs at each cut and at the end.

    Raises
    ------
    SplitError
        A segment does not accept what the one before it gives; both are named.
    """
    specs, giver = list(incoming), "the data set"
    found = []
    for index, segment in enumerate(segments):
        specs = outgoing_specs(segment, specs, index, giver)
        giver = f"segment {index}"
        found.append(specs)
    return found


def outgoing_specs(
    module: nn.Module, incoming: Sequence[TensorSpec], index: int, giver: str
) -> list[TensorSpec]:
    """Return what a segment gives for what comes in, by running it on zeros.

    The module is run in eval mode and left as it was.

    Raises
    ------
    SplitError
        The segment does not accept it, or gives something that cannot cross a cut.
    """
    watch = _LayerWatch(module)
    try:
        with torch.no_grad(), keeping_modes(module):
            inputs = _example(module, incoming, EXAMPLE_RECORDS)
            outputs = as_tensors(module.eval()(*inputs), f"segment {index}")
    except SplitError:
        raise
    except Exception as error:  # whatever the segment's own code raises
        raise SplitError(
            f"{giver} gives {describe(incoming)}, which segment {index} does not accept: "
            f"{watch.last or type(error).__name__}"
        ) from error
    finally:
        watch.close()
    if any(len(output) != EXAMPLE_RECORDS for output in outputs):
        shapes = ", ".join(str(list(output.shape)) for output in outputs)
        raise SplitError(
            f"segment {index} turns a batch of {EXAMPLE_RECORDS} records into {shapes}; "
            "the first dimension of everything that crosses a cut must stay the batch"
        )
    return [TensorSpec.of(output) for output in outputs]


def check_trainable(
    module: nn.Module, incoming: Sequence[TensorSpec], index: int, plan: BatchPlan
) -> None:
    """Refuse a segment that cannot train on the smallest micro-batch of a run.

    BatchNorm, for one, cannot train on a single record without spatial extent. The
    module is run in train mode, and left as it was.

    Raises
    ------
    SplitError
        The text names the layer, the size, and the options that make it.
    """
    records = plan.smallest_part
    watch = _LayerWatch(module)
    buffers = {k: v.clone() for k, v in module.named_buffers()}
    try:
        with torch.no_grad(), keeping_modes(module), seeded(0, _device(module)):
            inputs = tuple(_example(module, incoming, records))
            torch.func.functional_call(module.train(), buffers, inputs)
    except Exception as error:  # whatever the segment's own code raises
        raise SplitError(
            f"segment {index} cannot train on {records} records, the smallest micro-batch of "
            f"{plan.records} records with batch-size {plan.batch_size} and microbatches "
            f"{plan.microbatches}: {watch.last or type(error).__name__}. Choose another "
            "batch-size or number of microbatches"
        ) from error
    finally:
        watch.close()


def _example(module: nn.Module, incoming: Sequence[TensorSpec], records: int) -> list[Tensor]:
    return [spec.example(records).to(_device(module)) for spec in incoming]


def _device(module: nn.Module) -> torch.device:
    tensors = itertools.chain(module.parameters(), module.buffers())
    return next((t.device for t in tensors), torch.device("cpu"))


class _LayerWatch:
    """Remembers the last layer that was entered and the shapes that it was given."""

    def __init__(self, module: nn.Module) -> None:
        self.last = ""
        leaves = [(n, m) for n, m in module.named_modules() if not list(m.children())]
        self._hooks = [m.register_forward_pre_hook(self._note(n)) for n, m in leaves]

    def _note(self, name: str) -> Any:
        def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            shapes = [list(x.shape) for x in inputs if isinstance(x, Tensor)]
            given = " and ".join(map(str, shapes))
            self.last = f"its layer {name or '(itself)'!r} is {module} and was given {given}"

        return note

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def device_of(node_config: dict[str, Any]) -> torch.device:
    """Return the device that a node computes on; the CPU unless it says otherwise.

    Raises
    ------
    OptionError
        The node config's ``device`` is not one that this machine has.
    """
    name = node_config.get("device", "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise OptionError(
            f"node-config 'device' is {name!r}, which PyTorch cannot use on this machine; "
            "allowed is for example 'cpu' or 'cuda:0'"
        ) from error
    return device

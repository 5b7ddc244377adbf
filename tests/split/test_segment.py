from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from flwr_clicooper.errors import MessageError, SplitError
from flwr_clicooper.split.batches import Position
from flwr_clicooper.split.modules import load_weights, seeded
from flwr_clicooper.split.segment import Segment

AT = Position(1, 0, 0)


def segment(module: nn.Module, optimizer: Any = None) -> Segment:
    return Segment(module, optimizer, index=1, seed=0)


def test_an_optimizers_tensors_keep_their_dtype() -> None:
    """A float32 copy of a bfloat16 weight stays float32 when its state is loaded."""

    class Master(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p].setdefault("master", p.detach().float() + 1e-5)

    first, second = (
        segment(m, Master(m.parameters(), lr=0.1))
        for m in (nn.Linear(2, 2).bfloat16(), nn.Linear(2, 2).bfloat16())
    )
    first.step()
    tensors, rest = first.optimizer_state()
    second.load_optimizer_state(tensors, rest)
    again, _ = second.optimizer_state()
    assert again.keys() == tensors.keys()
    for name, value in tensors.items():
        assert again[name].dtype == torch.float32
        assert torch.equal(again[name], value)


def test_an_in_place_first_layer_does_not_modify_what_came_in() -> None:
    one = segment(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2)))
    x = torch.tensor([[-1.0, 2.0, -3.0]])
    before = x.clone()
    one.forward(AT, (x,), input_grads=True, keep_buffers=False)
    gradients = one.backward(AT, {0: torch.ones(1, 2)}, input_grads=True)
    assert torch.equal(x, before)
    assert gradients[0][0, 0] == 0
    assert gradients[0][0, 1] != 0


def test_passes_out_of_order_are_refused() -> None:
    one = segment(nn.Linear(3, 2))
    x = (torch.ones(1, 3),)
    with pytest.raises(MessageError, match="no forward pass is open for round 1, step 0"):
        one.backward(AT, {}, input_grads=True)
    one.forward(AT, x, input_grads=True, keep_buffers=False)
    with pytest.raises(MessageError, match="already in flight"):
        one.forward(AT, x, input_grads=True, keep_buffers=False)
    with pytest.raises(MessageError, match=r"micro-batches \[0\] are in flight"):
        one.step()


def test_seeding_leaves_the_generators_of_the_program_alone() -> None:
    import random

    import numpy as np

    def draw() -> tuple[float, float, float]:
        return torch.rand(()).item(), np.random.rand(), random.random()

    with seeded(1):
        first = draw()
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    expected = draw()
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    with seeded(1):
        assert draw() == first
    assert draw() == expected


def test_weights_are_loaded_whole_or_not_at_all() -> None:
    module = nn.Linear(2, 2)
    before = module.weight.detach().clone()
    wrong = {"weight": torch.zeros(2, 2), "bias": torch.zeros(3)}
    with pytest.raises(SplitError, match=r"it: the weights do not fit: bias: \(2,\) in"):
        load_weights(module, wrong, "it")
    with pytest.raises(SplitError, match="extra: absent in the model"):
        load_weights(module, {**module.state_dict(), "extra": torch.zeros(1)}, "it")
    assert torch.equal(module.weight, before)

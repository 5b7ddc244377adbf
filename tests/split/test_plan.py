from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from flwr_clicooper import SplitPlan, split_model
from flwr_clicooper.errors import SplitError
from flwr_clicooper.split.unsplit import Chain


class Residual(nn.Module):
    """Two residual blocks and a long skip from the stem to the end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.layer1 = self.block()
        self.layer2 = self.block()
        self.scale = nn.Parameter(torch.full((4, 1, 1), 0.5))
        self.head = nn.Linear(4, 3)

    def block(self) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        stem = torch.relu(self.stem(x))
        value = torch.relu(self.layer1(stem) + stem)
        value = torch.relu(self.layer2(value) + value) * self.scale + stem
        return self.head(value.mean(dim=(2, 3)))


X = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "cuts", [["stem"], ["layer1"], ["stem", "layer1", "layer2"], ["layer1.1", "layer2.0"]]
)
def test_segments_compute_what_the_model_computes(cuts: list[str]) -> None:
    torch.manual_seed(0)
    model = Residual().eval()
    plan = split_model(model, cuts, example_input=X)
    assert len(plan) == len(cuts) + 1
    assert torch.equal(Chain(*plan)(X), model(X))


def test_values_that_skip_a_segment_are_carried_through_it() -> None:
    plan = split_model(Residual(), ["stem", "layer1", "layer2"], example_input=X)
    (stem,) = [plan[0].eval()(X)]
    assert isinstance(stem, Tensor)  # one tensor: the stem's output before its ReLU
    second = plan[1].eval()(stem)
    assert isinstance(second, tuple)
    assert len(second) == 2  # layer1's output, and the stem that two later places use


def test_every_parameter_and_buffer_keeps_its_name_on_one_side() -> None:
    model = Residual()
    plan = split_model(model, ["layer1", "layer2"], example_input=X)
    names = [name for segment in plan for name in segment.state_dict()]
    assert sorted(names) == sorted(model.state_dict())


def test_train_and_eval_reach_dropout_and_batchnorm() -> None:
    torch.manual_seed(0)
    plan = split_model(Residual(), ["layer1"], example_input=X)
    chain = Chain(*plan).train()
    assert not torch.equal(chain(X), chain(X))
    chain.eval()
    assert torch.equal(chain(X), chain(X))


def test_gradients_through_the_segments_equal_the_model() -> None:
    torch.manual_seed(0)
    model = Residual().eval()
    model(X).sum().backward()
    expected = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    plan = split_model(model, ["stem", "layer2"], example_input=X)
    Chain(*plan)(X).sum().backward()
    found = {k: p.grad for s in plan for k, p in s.named_parameters()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-6), name


def test_the_model_is_left_in_its_mode() -> None:
    model = Residual().train()
    model.layer2.eval()
    modes = {name: m.training for name, m in model.named_modules()}
    SplitPlan(model, X)
    assert {name: m.training for name, m in model.named_modules()} == modes


# -- costs ---------------------------------------------------------------------------


def test_costs_of_a_known_model() -> None:
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
    first, relu = SplitPlan(model, torch.zeros(3, 10)).possible_cuts()
    assert (first.layer, relu.layer) == ("0", "1")
    assert first.parameters == (220, 105)
    assert first.flops == (2 * 10 * 20, 2 * 20 * 5)
    assert first.nbytes == 80


def test_describe_prints_and_returns_the_costs(capsys: pytest.CaptureFixture[str]) -> None:
    text = split_model(Residual(), ["layer1"], example_input=X).describe()
    assert capsys.readouterr().out.strip() == text.strip()
    row = next(line for line in text.splitlines() if " layer1 " in line)
    assert "*" in row
    assert "float32[4, 6, 6]" in row
    assert "1,152" in row  # two tensors of 4*6*6 floats


def test_cuts_where_something_that_is_no_batch_would_cross_are_not_offered() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            count = x.size(1)
            return self.b(self.a(x)) * count

    assert SplitPlan(Sized(), torch.zeros(2, 4)).possible_cuts() == []
    with pytest.raises(SplitError, match=r"'size' would cross it, which is int"):
        split_model(Sized(), ["a"], example_input=torch.zeros(2, 4))


class Scaled(nn.Module):
    """fx fetches ``scale`` before the first layer, though the last uses it."""

    def __init__(self, both: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("shift", torch.ones(4))
        self.scale = nn.Parameter(torch.full((4,), 3.0))
        self.both = both

    def forward(self, x: Tensor) -> Tensor:
        if self.both:
            x = x + self.shift
        return self.scale * self.b(self.a(x)) + self.shift


def test_a_parameter_belongs_to_the_segment_that_uses_it() -> None:
    x = torch.randn(3, 4)
    model = Scaled()
    (after_a, *_) = SplitPlan(model, x).possible_cuts()
    assert (after_a.layer, after_a.parameters) == ("a", (20, 24))
    plan = split_model(model, ["a"], example_input=x)
    assert torch.equal(Chain(*plan)(x), model(x))
    assert sorted(plan[1].state_dict()) == ["b.bias", "b.weight", "scale", "shift"]


def test_cuts_with_a_buffer_on_both_sides_are_not_offered() -> None:
    model = Scaled(both=True)
    assert SplitPlan(model, torch.zeros(2, 4)).possible_cuts() == []
    with pytest.raises(SplitError, match="share a tensor"):
        split_model(model, ["a"], example_input=torch.zeros(2, 4))


def equal_layers(count: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(count)))


@pytest.mark.parametrize(
    ("balance", "cuts"),
    [([1, 1], ["3"]), ([1, 2, 1], ["1", "5"]), ([1, 3], ["1"]), ([2, 1, 1], ["3", "5"])],
)
def test_balance_gives_each_party_its_share(balance: list[float], cuts: list[str]) -> None:
    model, x = equal_layers(8), torch.zeros(2, 8)
    assert SplitPlan(model, x).propose(balance) == cuts
    assert split_model(model, example_input=x, balance=balance).cuts == tuple(cuts)


# -- what is refused -------------------------------------------------------------------


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if x.sum() > 0 else x


class FunctionalDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(functional.dropout(self.a(x), training=self.training))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        return torch.tanh(x) @ self.a.weight


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x.t()).t())


@pytest.mark.parametrize(
    ("make", "cuts", "message"),
    [
        (Branching, ["a"], r"cannot be traced.*return the segments by hand"),
        (FunctionalDropout, ["a"], r"differs between train\(\) and eval\(\)"),
        (Tied, ["a"], r"share a tensor"),
        (Transposed, ["a"], r"without the batch as first dimension"),
        (Residual, ["nowhere"], r"no layer 'nowhere'.*stem, layer1"),
        (
            Residual,
            ["layer2", "layer1"],
            r"order of execution, which is \['layer1', 'layer2'\]",
        ),
        (Residual, ["layer1", "layer1"], r"do not leave operations between"),
        (Residual, ["head"], r"at the model's end"),
    ],
)
def test_refused(make: Callable[[], nn.Module], cuts: list[str], message: str) -> None:
    example = X if make is Residual else torch.zeros(4, 4)
    if make is Transposed:
        example = torch.zeros(3, 4)
        model: nn.Module = make()
        model.a = nn.Linear(3, 3)
    else:
        model = make()
    with pytest.raises(SplitError, match=message):
        split_model(model, cuts, example_input=example)


def test_an_example_that_does_not_fit_is_refused() -> None:
    with pytest.raises(SplitError, match="does not run on the example input"):
        SplitPlan(nn.Linear(4, 2), torch.zeros(2, 5))


@pytest.mark.parametrize("balance", [[1.0], [1.0, 0.0], [1, 1, 1, 1]])
def test_an_impossible_balance_is_refused(balance: list[float]) -> None:
    with pytest.raises(SplitError, match="balance"):
        SplitPlan(equal_layers(3), torch.zeros(2, 8)).propose(balance)


def test_cuts_or_balance_not_both_nor_neither() -> None:
    model, x = equal_layers(3), torch.zeros(2, 8)
    with pytest.raises(SplitError, match="either cuts"):
        split_model(model, example_input=x)
    with pytest.raises(SplitError, match="either cuts"):
        split_model(model, ["0"], example_input=x, balance=[1, 1])

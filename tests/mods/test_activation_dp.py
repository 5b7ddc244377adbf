"""The mod in a ClientApp of somebody else. Statistical tests state their false-alarm rate."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    MetricRecord,
    RecordDict,
)
from scipy.stats import kstest

from flwr_clicooper.errors import DataError, MessageError, OptionError
from flwr_clicooper.errors import PrivacyBudgetExceeded as Exceeded
from flwr_clicooper.grids.tensors import decode_tensor, encode_tensor
from flwr_clicooper.mods import ActivationDPMod
from flwr_clicooper.privacy.accounting import composed, epsilon_of, mu_for, noise_for
from tests.mods.node import Node, arrays, random, received

FALSE_ALARM = 1e-6
NO_NOISE = 1e6
"""An epsilon at which the noise's standard deviation is below 0.002."""


# -- what leaves -----------------------------------------------------------------------------


def test_what_leaves_has_the_noise_of_all_releases_together() -> None:
    sigma = noise_for(2.0, 1e-5, 2 * 0.5, releases=4)
    node = Node(
        arrays(x=np.zeros((300, 100), np.float32)), ActivationDPMod(clip=0.5, releases=4)
    )
    first, second = (received(node.ask(), "x").ravel() / sigma for _ in range(2))
    assert kstest(first, "norm").pvalue > FALSE_ALARM
    assert kstest((first - second) / math.sqrt(2), "norm").pvalue > FALSE_ALARM


def test_the_norm_of_a_record_is_that_of_its_row_in_all_arrays() -> None:
    mod = ActivationDPMod(epsilon=NO_NOISE)
    node = Node(arrays(x=random(40, 3, 4, scale=9), y=random(40, scale=9)), mod)
    content = node.ask()
    x, y = received(content, "x"), received(content, "y")
    norms = np.sqrt((x.reshape(40, -1) ** 2).sum(1) + y**2)
    assert np.allclose(norms, 1, atol=0.02)


def test_replacing_a_record_moves_all_arrays_together_by_at_most_twice_the_clip() -> None:
    seen = []
    for sign in (1, -1):
        far = np.zeros((5, 7), np.float32)
        far[2] = sign * 1e30
        content = arrays(x=far, y=far.astype(np.float64))
        seen.append(Node(content, ActivationDPMod(epsilon=NO_NOISE, clip=0.7)).ask())
    apart = [received(seen[0], name) - received(seen[1], name) for name in "xy"]
    distance = math.sqrt(sum(float((each.astype(float) ** 2).sum()) for each in apart))
    assert distance == pytest.approx(1.4, abs=0.02)


def test_elements_are_cut_one_by_one() -> None:
    mod = ActivationDPMod(epsilon=NO_NOISE, clip=0.5, unit="element")
    found = received(Node(arrays(x=np.float32([[-9, 0.1], [0.4, 9]])), mod).ask(), "x")
    assert np.allclose(found, [[-0.5, 0.1], [0.4, 0.5]], atol=0.02)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8", "int64", "uint16"])
def test_dtypes_stay_and_integers_become_float32(dtype: str) -> None:
    values = np.array([[0, 0], [1, 0], [30, 40]], dtype)
    content = Node(arrays(x=values), ActivationDPMod(epsilon=NO_NOISE)).ask()
    found = received(content, "x")
    expected = dtype if dtype.startswith("float") else "float32"
    assert found.dtype == expected == content.array_records["embeddings"]["x"].dtype
    assert np.allclose(found.astype(float), [[0, 0], [1, 0], [0.6, 0.8]], atol=0.02)


def test_bfloat16_stays() -> None:
    values = torch.tensor([[3.0, 4.0]], dtype=torch.bfloat16)
    sent = RecordDict({"embeddings": ArrayRecord({"x": encode_tensor(values)})})
    array = (
        Node(sent, ActivationDPMod(epsilon=NO_NOISE)).ask().array_records["embeddings"]["x"]
    )
    found = decode_tensor(array, "x")
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), torch.tensor([[0.6, 0.8]]), atol=0.02)


@pytest.mark.parametrize(
    "values",
    [np.asfortranarray(random(3, 4, 2)), random(8, 3).T, random(3, 8).astype(">f4")],
    ids=["fortran", "transposed", "big-endian"],
)
def test_layouts_that_numpy_may_have_keep_their_values(values: np.ndarray) -> None:
    found = received(
        Node(arrays(x=values), ActivationDPMod(epsilon=NO_NOISE, clip=99)).ask(), "x"
    )
    assert np.allclose(found, values, atol=99 * 0.02)


def test_an_empty_batch_is_a_release_like_any_other() -> None:
    content = Node(arrays(x=np.zeros((0, 3), np.float32)), ActivationDPMod()).ask()
    assert received(content, "x").shape == (0, 3)


def test_everything_else_passes_and_the_handler_s_own_content_is_not_changed() -> None:
    own = arrays(x=random(4, 3))
    own["weights"] = ArrayRecord([random(3)])
    own["metrics"] = MetricRecord({"loss": 0.5})
    original = received(own, "x").copy()
    content = Node(own, ActivationDPMod()).ask()
    assert list(content) == ["embeddings", "weights", "metrics"]
    assert content["weights"] == own["weights"]
    assert content["metrics"] == own["metrics"]
    assert not np.array_equal(received(content, "x"), original)
    assert np.array_equal(received(own, "x"), original)


def test_replies_without_the_record_and_errors_pass_and_are_not_counted() -> None:
    node = Node(RecordDict({"weights": ArrayRecord([random(3)])}), ActivationDPMod())
    for _ in range(3):
        assert node.ask() == node.content
    node.content = Error(code=7, reason="busy")
    assert node.message().error.reason == "busy"
    assert not node.context.state
    node.content = arrays(x=random(2, 2))
    node.ask()
    with pytest.raises(Exceeded):
        node.ask()


# -- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (arrays(x=np.ones((2, 2), bool)), "bool; allowed are floats and integers"),
        (arrays(x=np.ones((2, 2), np.complex64)), "complex64; allowed are floats"),
        (arrays(x=np.array(["secret"])), "<U6; allowed are floats"),
        pytest.param(
            arrays(x=np.ones(2, np.longdouble)),
            "; allowed are floats",
            marks=pytest.mark.skipif(np.longdouble == np.float64, reason="no wider float"),
        ),
        (arrays(x=np.array(77.5)), "of records; this one is float"),
        (arrays(x=random(2, 3), y=random(3, 3)), "of the same records"),
        (arrays(x=np.float32([[77.5, math.nan]])), "holds NaN or infinity"),
        (arrays(x=random(1, 2), y=np.array([math.inf])), "holds NaN or infinity"),
        (arrays(), "at least one batch"),
    ],
)
def test_what_is_not_a_batch_of_real_records_is_refused_without_its_values(
    content: RecordDict, error: str
) -> None:
    with pytest.raises(DataError, match=error) as caught:
        Node(content, ActivationDPMod()).ask()
    assert "77" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_an_unknown_serialisation_is_refused() -> None:
    content = RecordDict({"embeddings": ArrayRecord({"x": Array("float32", (1,), "?", b"")})})
    with pytest.raises(MessageError, match="serialisation '\\?' is not known"):
        Node(content, ActivationDPMod()).ask()


@pytest.mark.parametrize("record", [MetricRecord({"x": 1.0}), ConfigRecord({"x": 1.0})])
def test_the_record_as_another_kind_of_record_is_refused(record: Any) -> None:
    with pytest.raises(MessageError, match="allowed is an ArrayRecord"):
        Node(RecordDict({"embeddings": record}), ActivationDPMod()).ask()


@pytest.mark.parametrize(
    "options",
    [
        {"epsilon": 0.0},
        {"epsilon": math.nan},
        {"delta": 1.0},
        {"clip": 0.0},
        {"clip": -1.0},
        {"unit": "person"},
        {"releases": 0},
        {"releases": 1.5},
    ],
)
def test_bad_options_are_refused_when_the_mod_is_made(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        ActivationDPMod(**options)


# -- the statement ---------------------------------------------------------------------------


def test_the_statement_names_unit_budget_and_what_is_not_covered() -> None:
    text = ActivationDPMod(epsilon=3.0, delta=1e-6, releases=5).statement()
    assert "(epsilon, delta) = (3, 1e-06) per record, for at most 5 release(s)" in text
    assert "one record is replaced by any other" in text
    assert f"{noise_for(3.0, 1e-6, 2.0, 5):.4g}" in text
    for word in ("labels", "metrics", "loss", "gradients", "other records", "BatchNorm"):
        assert word in text


def test_an_epsilon_per_element_stands_beside_that_of_the_record() -> None:
    mod = ActivationDPMod(epsilon=1.0, unit="element", releases=2)
    assert "after the first release" in mod.statement()
    together = composed([2 * math.sqrt(15) / mod.sigma] * 2)
    assert together == pytest.approx(mu_for(1.0, 1e-5) * math.sqrt(15))
    expected = (
        f"Per record of 15 numbers that is only ({epsilon_of(1e-5, together):.4g}, 1e-05)"
    )
    assert expected in mod.statement(elements=15)
    Node(arrays(x=random(4, 2, 5), y=random(4, 5)), mod).ask()
    assert expected in mod.statement()


def test_the_statement_says_how_releases_are_counted() -> None:
    assert "Every reply" in ActivationDPMod().statement()
    assert "in one run" in ActivationDPMod().statement()
    assert "in all runs that share its ledger" in ActivationDPMod(ledger="x").statement()
    assert (
        "no record may be in two groups" in ActivationDPMod(count_by=lambda _: 0).statement()
    )


# -- imports ---------------------------------------------------------------------------------


def test_no_pytorch_before_the_first_reply() -> None:
    code = (
        "import sys, flwr_clicooper.mods\n"
        "from flwr_clicooper.mods import ActivationDPMod, SecretLabelMod\n"
        "ActivationDPMod(releases=3).statement()\n"
        "SecretLabelMod(key_file='none').statement()\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_exists() -> None:
    from flwr_clicooper import mods

    for name in mods.__all__:
        assert getattr(mods, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mods.nothing

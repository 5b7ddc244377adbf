"""`clicooper claim` on a model whose neurons changed places, from a real run's files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flwr_clicooper.provenance.realign import NULLS
from flwr_clicooper.provenance.watermark import ACCEPT, BITS
from tests.chain.audited import WIDTH, wide_run
from tests.commands import calls
from tests.tasks import LinearTask

Weights = dict[str, Tensor]


class FollowedTask(LinearTask):
    """Two marked segments of layers through which units can be followed."""

    def head(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, WIDTH), nn.ReLU())

    def segments(self, config: Any) -> list[nn.Module]:
        def wide() -> list[nn.Module]:
            return [nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU()]

        last = nn.Sequential(*wide(), nn.Linear(WIDTH, self.classes))
        return [self.head(), nn.Sequential(*wide()), last]


class CurvedTask(FollowedTask):
    """Its head has a layer of another kind."""

    def head(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, WIDTH), nn.Tanh())


TASK, CURVED = FollowedTask(2), CurvedTask(2)


def moved(weights: Mapping[str, Tensor], *cuts: int) -> Weights:
    """Return weights of a model that computes the same, with units in other places."""
    found = dict(weights)
    torch.manual_seed(1)
    for segment in cuts:
        order, scale = torch.randperm(WIDTH), torch.rand(WIDTH) + 0.5
        for name in found:
            if name.startswith(f"{segment}.") and found[name].shape[:1] == (WIDTH,):
                found[name] = found[name][order]
        after = "2.3.weight" if segment == 2 else f"{segment + 1}.0.weight"
        found[after] = (found[after][:, order] / scale).contiguous()
        for name in (f"{segment}.1.weight", f"{segment}.1.bias"):  # behind the batch norm
            if name in found:
                found[name] = found[name] * scale
        if segment == 0:
            for name in ("0.0.weight", "0.0.bias"):
                shape = (-1, *[1] * (found[name].ndim - 1))
                found[name] = found[name] * scale.reshape(shape)
    return found


class Case:
    """The files of a claim, in a folder."""

    def __init__(self, folder: Path, task: FollowedTask, name: str) -> None:
        self.folder = folder
        self.run_dir = wide_run(folder / "runs", task, audit_every=0, seal=False)
        self.model = load_file(self.run_dir / "model.safetensors")
        self.task = f"{__name__}:{name}"
        torch.manual_seed(5)
        save_file({"inputs": torch.randn(300, 4)}, folder / "probes.safetensors")
        for number in range(NULLS):
            torch.manual_seed(100 + number)
            null = nn.Sequential(*task.segments({"label-side": "trainer"}))
            save_file(null.state_dict(), folder / f"null-{number:02}.safetensors")

    def argv(self, suspect: Weights) -> list[object]:
        save_file(suspect, self.folder / "suspect.safetensors")
        argv: list[object] = ["claim", "--model", self.folder / "suspect.safetensors"]
        argv += ["--run", self.run_dir, "--task", self.task]
        argv += ["--probes", self.folder / "probes.safetensors", "--nulls"]
        return [*argv, *sorted(self.folder.glob("null-*"))]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("claim"), TASK, "TASK")


def test_a_permuted_and_rescaled_model_is_claimed(case: Case, capsys: Any) -> None:
    suspect = moved(case.model, 0, 1, 2)
    model = nn.Sequential(*TASK.segments({})).eval()
    x = torch.randn(50, 4)
    model.load_state_dict(case.model)
    before = model(x)
    model.load_state_dict(suspect)
    assert torch.allclose(model(x), before, atol=1e-4)

    argv = case.argv(suspect)
    assert calls(*argv, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accepted"] is True
    assert found["tests"] == 16  # 4 keys, as two layouts, as it is and re-aligned
    assert {(it["segment"], it["round"]) for it in found["findings"]} == {
        (s, r) for s in (1, 2) for r in (1, 2)
    }
    for it in found["findings"]:
        assert not it["accepted"]
        assert it["matches"] < ACCEPT
        assert it["aligned"]["accepted"]
        assert it["aligned"]["matches"] == BITS
        assert it["aligned"]["nulls"] == NULLS
        assert it["aligned"]["nulls-max"] < ACCEPT
        assert it["aligned"]["log2-false-positive"] == -252.0
    assert calls(*argv) == 0
    out = capsys.readouterr().out
    assert out.startswith("This model carries watermarks by")
    assert "more than that of every null model" in out.replace("\n", " ")
    assert "--nulls" not in out
    # Without re-alignment there is nothing to find.
    assert calls(*argv[:5]) == 1
    assert "give --task, --nulls and --probes" in capsys.readouterr().out.replace("\n", " ")


def test_an_independent_model_is_not_claimed(case: Case, capsys: Any) -> None:
    torch.manual_seed(999)
    other = nn.Sequential(*TASK.segments({})).state_dict()
    assert calls(*case.argv(other), "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["accepted"]
    assert not any(it["aligned"]["accepted"] for it in found["findings"])


def test_a_head_of_other_layers_is_taken_as_it_is(tmp_path: Path, capsys: Any) -> None:
    case = Case(tmp_path, CURVED, "CURVED")
    assert calls(*case.argv(moved(case.model, 1, 2)), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert all(it["aligned"]["accepted"] for it in found["findings"])


# -- wrong input ---------------------------------------------------------------------------


def refused(capsys: Any, argv: list[object]) -> str:
    assert calls(*argv) == 1
    return str(capsys.readouterr().err)


def test_what_it_needs_is_asked_for_together(case: Case, capsys: Any) -> None:
    argv = case.argv(case.model)
    assert "give --nulls, too" in refused(capsys, argv[: argv.index("--nulls")])
    text = refused(capsys, [*argv[:5], "--reference", "model.safetensors"])
    assert "give --task and --nulls and --probes, too" in text


def test_too_few_null_models_are_refused(case: Case, capsys: Any) -> None:
    text = refused(capsys, case.argv(case.model)[:-1])
    assert "29 null models; allowed are at least 30, independently trained" in text


def test_the_delivered_model_is_no_null_model(case: Case, capsys: Any) -> None:
    argv = case.argv(case.model)
    text = refused(capsys, [*argv[:-1], case.run_dir / "model.safetensors"])
    assert "model.safetensors is the delivered model, not an independent one" in text


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ({"a": torch.ones(3, 4), "b": torch.ones(3, 4)}, "has not what is needed: one"),
        ({"a": torch.ones(3, 4, dtype=torch.int64)}, "has not what is needed: one"),
        ({"a": torch.ones(3)}, "has not what is needed: one"),
        ({"a": torch.ones(3, 5)}, "the head does not take probes of shape [3, 5]"),
    ],
)
def test_probes_are_one_tensor_of_inputs(
    inputs: Weights, text: str, case: Case, tmp_path: Path, capsys: Any
) -> None:
    argv = case.argv(case.model)
    save_file(inputs, tmp_path / "probes.safetensors")
    argv[argv.index("--probes") + 1] = tmp_path / "probes.safetensors"
    assert text in refused(capsys, argv)


def test_models_of_another_task_are_refused(case: Case, tmp_path: Path, capsys: Any) -> None:
    suspect = {**case.model, "2.3.weight": torch.ones(5, WIDTH)}
    assert "the suspect: the weights do not fit: 2.3.weight" in refused(
        capsys, case.argv(suspect)
    )
    argv = case.argv(case.model)
    save_file({"x": torch.ones(2)}, tmp_path / "null.safetensors")
    text = refused(capsys, [*argv[:-1], tmp_path / "null.safetensors"])
    assert "null.safetensors: the weights do not fit" in text
    (tmp_path / "text").write_text("text")
    assert "text is not a safetensors file" in refused(capsys, [*argv[:-1], tmp_path / "text"])


def test_a_run_without_a_model_needs_a_reference(
    case: Case, tmp_path: Path, capsys: Any
) -> None:
    argv = [*case.argv(case.model), "--reference", tmp_path / "model.safetensors"]
    assert "model.safetensors does not exist" in refused(capsys, argv)

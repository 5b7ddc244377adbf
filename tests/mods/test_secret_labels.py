"""Labels behind secret names. Statistical tests state their false-alarm rate."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from scipy.stats import binomtest, chisquare

from flwr_clicooper import LocalGrid
from flwr_clicooper.errors import DataError, MessageError, OptionError, StateError
from flwr_clicooper.mods import SecretLabelMod
from flwr_clicooper.privacy.labels import SecretLabelMap, keep_probability, new_key, save_key

FALSE_ALARM = 1e-6
KEY = bytes(range(32))


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    save_key(tmp_path / "label.key", KEY)
    return tmp_path / "label.key"


def reply(content: RecordDict | Error, *mods: Any) -> Message:
    app = ClientApp(mods=list(mods))
    app.query("labels")(lambda message, _: Message(content, reply_to=message))
    (context,) = LocalGrid(app, [{}], {}).contexts.values()
    request = Message(RecordDict(), context.node_id, "query.labels")
    return app(message=request, context=context)


def record(**values: Any) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(value)) for name, value in values.items()})


def content(labels: Any, ids: Any) -> RecordDict:
    return RecordDict({"labels": record(y=labels), "ids": record(y=ids)})


def told(labels: Any, ids: Any, mod: SecretLabelMod) -> np.ndarray:
    return reply(content(labels, ids), mod).content.array_records["labels"]["y"].numpy()


# -- pseudo-classes --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
def test_labels_leave_as_the_pseudo_classes_of_their_ids(key_file: Path, dtype: Any) -> None:
    labels, ids = np.arange(200).astype(dtype) % 10, np.arange(1000, 1200)
    found = told(labels, ids, SecretLabelMod(key_file=key_file, expansion=30))
    expected = SecretLabelMap(10, 30, KEY).encode(torch.from_numpy(labels).long(), ids)
    assert found.dtype == np.int64
    assert np.array_equal(found, expected.numpy())


def test_the_key_s_owner_decodes(key_file: Path) -> None:
    mod = SecretLabelMod(key_file=key_file, num_classes=5, expansion=3)
    labels = np.arange(100) % 5
    logits = torch.nn.functional.one_hot(
        torch.from_numpy(told(labels, range(100), mod)), 15
    ).float()
    assert np.array_equal(mod.decode(9 * logits).argmax(1).numpy(), labels)


def test_another_key_gives_other_pseudo_classes(key_file: Path, tmp_path: Path) -> None:
    save_key(tmp_path / "other.key", new_key())
    labels, ids = np.arange(500) % 10, np.arange(500)
    one = told(labels, ids, SecretLabelMod(key_file=key_file))
    other = told(labels, ids, SecretLabelMod(key_file=tmp_path / "other.key"))
    assert not np.array_equal(one, other)


def test_ids_stay_out_unless_asked_and_the_rest_passes(key_file: Path) -> None:
    sent = content([1, 2], [7, 8])
    sent["metrics"] = MetricRecord({"loss": 0.5})
    without = reply(sent, SecretLabelMod(key_file=key_file)).content
    assert set(without) == {"labels", "metrics"}
    kept = reply(sent, SecretLabelMod(key_file=key_file, keep_ids=True)).content
    assert kept["ids"] == sent["ids"]
    assert kept["labels"] == without["labels"]
    assert set(sent) == {"labels", "ids", "metrics"}  # the handler's own is not changed
    assert sent.array_records["labels"]["y"].numpy().tolist() == [1, 2]


def test_each_array_of_labels_has_its_ids(key_file: Path) -> None:
    mod = SecretLabelMod(key_file=key_file, expansion=9)
    sent = RecordDict(
        {"labels": record(a=[1, 1], b=[1, 1]), "ids": record(b=[3, 4], a=[5, 6])}
    )
    found = reply(sent, mod).content.array_records["labels"]
    assert np.array_equal(found["a"].numpy(), told([1, 1], [5, 6], mod))
    assert np.array_equal(found["b"].numpy(), told([1, 1], [3, 4], mod))


def test_replies_without_labels_need_no_key(tmp_path: Path) -> None:
    mod = SecretLabelMod(key_file=tmp_path / "none.key")
    sent = RecordDict({"ids": record(y=[1])})
    assert reply(sent, mod).content == sent
    assert reply(Error(code=7, reason="busy"), mod).error.reason == "busy"


# -- randomised response ---------------------------------------------------------------------


def test_each_label_is_true_with_the_probability_of_its_epsilon(key_file: Path) -> None:
    mod = SecretLabelMod(key_file=key_file, expansion=1, label_epsilon=1.5)
    classes = SecretLabelMap(10, 1, KEY)
    shown = torch.from_numpy(told(np.full(40_000, 3), range(40_000), mod))
    found = classes.decode(torch.nn.functional.one_hot(shown, 10).float()).argmax(1).numpy()
    kept = int((found == 3).sum())
    assert binomtest(kept, 40_000, keep_probability(1.5, 10)).pvalue > FALSE_ALARM
    others = np.bincount(found[found != 3], minlength=10)
    assert others[3] == 0
    assert chisquare(np.delete(others, 3)).pvalue > FALSE_ALARM


def test_a_record_is_never_flipped_anew(key_file: Path) -> None:
    """An average over replies would show the label."""
    ids = np.arange(2000)
    labels = ids % 10
    first = told(labels, ids, SecretLabelMod(key_file=key_file, label_epsilon=0.5))
    again = SecretLabelMod(key_file=key_file, label_epsilon=0.5)
    assert np.array_equal(told(labels[::-1], ids[::-1], again), first[::-1])
    assert told(labels[7:8], ids[7:8], again) == first[7]


def test_what_happens_to_a_record_does_not_follow_from_its_label(key_file: Path) -> None:
    mod = SecretLabelMod(key_file=key_file, expansion=1, num_classes=4, label_epsilon=0.5)
    table = SecretLabelMap(4, 1, KEY)

    def shifts(label: int) -> np.ndarray:
        shown = torch.from_numpy(told(np.full(500, label), range(500), mod))
        classes = table.decode(torch.nn.functional.one_hot(shown, 4).float()).argmax(1)
        return ((classes - label) % 4).numpy()

    assert set(shifts(0)) == {0, 1, 2, 3}
    assert np.array_equal(shifts(0), shifts(3))


def test_another_epsilon_draws_anew(key_file: Path) -> None:
    """With the same draw, two epsilons would show which of two answers is true."""
    ids, options = np.arange(4000), {"key_file": key_file, "expansion": 1, "num_classes": 2}
    truth = told(ids % 2, ids, SecretLabelMod(**options))
    kept = [
        told(ids % 2, ids, SecretLabelMod(label_epsilon=epsilon, **options)) == truth
        for epsilon in (0.4, 0.8)
    ]
    expected = keep_probability(0.4, 2) * keep_probability(0.8, 2)
    both = int((kept[0] & kept[1]).sum())
    assert binomtest(both, 4000, expected).pvalue > FALSE_ALARM


def test_the_pseudo_class_among_those_of_the_told_class_follows_from_the_id(
    key_file: Path,
) -> None:
    mod = SecretLabelMod(key_file=key_file, expansion=4, label_epsilon=0.5)
    table, ids = SecretLabelMap(10, 4, KEY), range(300)
    of_id = torch.stack([table.encode(torch.full((300,), c), ids) for c in range(10)])
    found = torch.from_numpy(told(np.arange(300) % 10, ids, mod))
    assert bool((of_id == found).any(0).all())


# -- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.0, 1.0])
@pytest.mark.parametrize(
    ("labels", "ids", "error"),
    [
        ([1, 77], [1, 2], "a label is out of range"),
        ([1, -77], [1, 2], "a label is out of range"),
        ([1, 2], [77], "one label and one id per record"),
        ([[1, 2]], [1, 2], r"int64\[1, 2\]; allowed are integers"),
        ([1, 2], [[77], [2]], r"int64\[2, 1\]; allowed are integers"),
        ([1.0, 77.0], [1, 2], r"float64\[2\]; allowed are integers"),
        ([True, False], [1, 2], r"bool\[2\]; allowed are integers"),
        ([1, 2], [1.0, 77.0], r"float64\[2\]; allowed are integers"),
    ],
)
def test_bad_labels_and_ids_are_refused_without_their_values(
    key_file: Path, epsilon: float, labels: Any, ids: Any, error: str
) -> None:
    with pytest.raises(DataError, match=error) as caught:
        told(labels, ids, SecretLabelMod(key_file=key_file, label_epsilon=epsilon))
    assert "77" not in str(caught.value)


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        ({"labels": record(y=[1])}, "'ids' in the reply is missing"),
        ({"labels": record(y=[1]), "ids": ConfigRecord({"y": [1]})}, "'ids'.*a ConfigRecord"),
        ({"labels": MetricRecord({"y": 1}), "ids": record(y=[1])}, "'labels'.*a MetricRecord"),
        ({"labels": record(y=[1]), "ids": record(z=[1])}, "one array of ids per array"),
    ],
)
def test_labels_without_their_ids_do_not_leave(
    key_file: Path, sent: dict[str, Any], error: str
) -> None:
    with pytest.raises(MessageError, match=error):
        reply(RecordDict(sent), SecretLabelMod(key_file=key_file))


def test_a_missing_key_lets_no_label_out(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="cannot be read"):
        told([1], [1], SecretLabelMod(key_file=tmp_path / "none.key"))


def test_a_key_that_others_may_read_is_refused(key_file: Path) -> None:
    key_file.chmod(0o644)
    with pytest.raises(StateError, match="chmod 600"):
        told([1], [1], SecretLabelMod(key_file=key_file))


@pytest.mark.parametrize("options", [{"num_classes": 1}, {"expansion": 0}])
def test_a_bad_map_is_refused(key_file: Path, options: dict[str, int]) -> None:
    with pytest.raises(OptionError):
        told([0], [1], SecretLabelMod(key_file=key_file, **options))


@pytest.mark.parametrize("epsilon", [-1.0, math.nan, math.inf])
def test_a_bad_label_epsilon_is_refused_when_the_mod_is_made(epsilon: float) -> None:
    with pytest.raises(OptionError, match="label_epsilon"):
        SecretLabelMod(key_file="none", label_epsilon=epsilon)


# -- the statement ---------------------------------------------------------------------------


def test_the_statement_says_what_the_mapping_hides_and_what_not() -> None:
    text = SecretLabelMod(key_file="none", num_classes=5, expansion=3).statement()
    assert "15 pseudo-classes" in text
    assert "does not hide which records belong together" in text
    assert "There is no differential privacy for labels." in text
    text = SecretLabelMod(key_file="none", label_epsilon=1.5).statement()
    assert "epsilon = 1.5 per label" in text
    assert "who does not have the key" in text
    assert "record ids" in SecretLabelMod(key_file="none", keep_ids=True).statement()

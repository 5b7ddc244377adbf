from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flwr_clicooper.chain.state import MANIFEST, StateStore, WorkerCache
from flwr_clicooper.errors import StateError
from flwr_clicooper.files import write_atomically

A, B = {"x": torch.arange(3.0)}, {"y": torch.ones(2, dtype=torch.bfloat16)}


def stored(folder: Path) -> StateStore:
    store = StateStore(folder)
    store.create()
    store.commit(1, {"a": A, "b": B}, {"n": 5}, durable=True)
    return store


def test_another_process_reads_what_was_committed(tmp_path: Path) -> None:
    stored(tmp_path / "s")
    other = StateStore(tmp_path / "s")
    other.open(1)
    assert other.manifest.facts == {"n": 5}
    assert torch.equal(other.read("a")["x"], A["x"])
    assert other.read("b")["y"].dtype == torch.bfloat16


def test_changes_replace_keep_and_remove_parts_and_their_files(tmp_path: Path) -> None:
    store = stored(tmp_path / "s")
    store.commit(2, {"a": {"x": torch.zeros(1)}, "b": None}, durable=False)
    other = StateStore(tmp_path / "s")
    other.open(2)
    assert torch.equal(other.read("a")["x"], torch.zeros(1))
    assert other.manifest.facts == {"n": 5}
    with pytest.raises(StateError, match="no part 'b'"):
        other.read("b")
    assert len(list((tmp_path / "s").iterdir())) == 2


def test_tensors_that_are_still_read_survive_their_replacement(tmp_path: Path) -> None:
    store = stored(tmp_path / "s")
    mapped = store.read("a")["x"]
    store.commit(2, {"a": {"x": torch.zeros(3)}}, durable=False)
    assert torch.equal(mapped, A["x"])


@given(version=st.integers(-3, 9).filter(lambda v: v != 1))
def test_another_version_is_refused(
    version: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("s") / "s"
    stored(folder)
    with pytest.raises(StateError, match=f"version 1, the message is for version {version}:"):
        StateStore(folder).open(version)


def test_missing_and_damaged_states_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="not set up"):
        StateStore(tmp_path / "none").open(1)
    store = stored(tmp_path / "s")
    (path,) = (tmp_path / "s").glob("a-*")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StateError, match="missing or damaged"):
        store.read("a")
    path.unlink()
    with pytest.raises(StateError, match="missing or damaged"):
        store.read("a")
    (tmp_path / "s" / MANIFEST).write_text(json.dumps({"version": 1})[:-3])
    with pytest.raises(StateError, match="is damaged"):
        StateStore(tmp_path / "s").open(1)


def test_only_the_owner_of_the_process_can_read_it(tmp_path: Path) -> None:
    stored(tmp_path / "s")
    assert (tmp_path / "s").stat().st_mode & 0o077 == 0
    assert all(p.stat().st_mode & 0o077 == 0 for p in (tmp_path / "s").iterdir())


def test_a_commit_that_fails_leaves_the_state_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stored(tmp_path / "s")
    before = {p.name: p.read_bytes() for p in (tmp_path / "s").iterdir()}

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        store.commit(2, {"a": B}, durable=False)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in (tmp_path / "s").iterdir()} == before
    StateStore(tmp_path / "s").open(1)


def test_writing_replaces_a_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_atomically(path, b"old")
    with path.open("rb") as reader:
        write_atomically(path, b"new")
        assert reader.read() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_the_cache_goes_on_only_at_the_version_of_the_message() -> None:
    cache: WorkerCache[str] = WorkerCache()
    key = (1, 2)
    cache.put(key, 3, "live")
    with pytest.raises(StateError, match="late or doubled"):
        cache.take(key, 2, lambda: "loaded")
    assert cache.take(key, 3, lambda: "loaded") == "live"
    assert cache.take(key, 3, lambda: "loaded") == "loaded"  # taken: nobody else has it
    cache.put(key, 3, "live")
    assert cache.take(key, 4, lambda: "loaded") == "loaded"  # another process went on
    cache.put(key, 4, "live")
    cache.drop(key)
    assert cache.take(key, 4, lambda: "loaded") == "loaded"

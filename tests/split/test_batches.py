from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from flwr_clicooper.split.batches import BatchPlan, Position, derive_seed

PLANS = st.builds(
    BatchPlan,
    records=st.integers(1, 50),
    batch_size=st.integers(1, 20),
    microbatches=st.integers(1, 6),
    seed=st.integers(0, 9),
    shuffle=st.booleans(),
)


@given(plan=PLANS, round_=st.integers(1, 3))
def test_a_round_is_every_record_once(plan: BatchPlan, round_: int) -> None:
    rows = [plan.indices(at) for at in plan.positions(round_)]
    assert all(len(r) > 0 for r in rows)
    assert sorted(np.concatenate(rows)) == list(range(plan.records))


@given(plan=PLANS)
def test_batches_are_full_but_the_last_and_shares_add_up(plan: BatchPlan) -> None:
    for step in range(plan.steps):
        parts = [Position(1, step, m) for m in range(plan.parts(step))]
        records = sum(len(plan.indices(at)) for at in parts)
        assert records == plan.batch_records(step)
        assert records == plan.batch_size or step == plan.steps - 1
        assert np.isclose(sum(plan.weight(at) for at in parts), 1.0)


@given(plan=PLANS)
def test_micro_batches_do_not_change_which_records_a_step_sees(plan: BatchPlan) -> None:
    whole = BatchPlan(plan.records, plan.batch_size, 1, plan.seed, plan.shuffle)
    for step in range(plan.steps):
        parts = [plan.indices(Position(1, step, m)) for m in range(plan.parts(step))]
        assert np.array_equal(np.concatenate(parts), whole.indices(Position(1, step, 0)))


def test_only_positions_of_the_run_exist() -> None:
    plan = BatchPlan(records=10, batch_size=4, microbatches=3, seed=0, shuffle=True)
    assert plan.has(Position(1, 2, 1))
    for wrong in [(0, 0, 0), (1, 3, 0), (1, -1, 0), (1, 0, 3), (1, 2, 2), (1, 0, -1)]:
        assert not plan.has(Position(*wrong))


def test_progress_goes_from_zero_to_just_below_one() -> None:
    plan = BatchPlan(records=10, batch_size=5, microbatches=1, seed=0, shuffle=True)
    steps = [Position(r, s, 0) for r in (1, 2) for s in (0, 1)]
    assert [plan.progress(at, 2) for at in steps] == [0.0, 0.25, 0.5, 0.75]


def test_seeds_are_the_same_on_every_machine_and_differ_by_purpose() -> None:
    assert derive_seed(0, "weights") == 7831180306208225803
    assert derive_seed(0, "order", 1) != derive_seed(0, "order", 11)
    assert derive_seed(0, "a", 1, 11) != derive_seed(0, "a", 11, 1)
    assert 0 <= derive_seed(2**63 - 1, "x") < 2**63

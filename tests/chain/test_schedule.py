from __future__ import annotations

from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from flwr_clicooper.chain.schedule import Pass, stage_order

PIPELINES = st.sampled_from(["gpipe", "1f1b"])


@given(pipeline=PIPELINES, stages=st.integers(1, 6), microbatches=st.integers(1, 9))
def test_every_stage_does_everything_once_and_in_order(
    pipeline: str, stages: int, microbatches: int
) -> None:
    for stage in range(stages):
        order = stage_order(pipeline, stage, stages, microbatches)
        for kind in Pass:
            done = [o.microbatch for o in order if o.kind is kind]
            last = stage == stages - 1
            expected = (kind is Pass.LOSS) == last
            assert done == (list(range(microbatches)) if expected else [])


@given(pipeline=PIPELINES, stages=st.integers(1, 6), microbatches=st.integers(1, 9))
def test_the_orders_never_wait_for_each_other_in_a_circle(
    pipeline: str, stages: int, microbatches: int
) -> None:
    queues = [deque(stage_order(pipeline, s, stages, microbatches)) for s in range(stages)]
    forward = {(0, m) for m in range(microbatches)}
    backward: set[tuple[int, int]] = set()
    while any(queues):
        moved = False
        for stage, queue in enumerate(queues):
            if not queue:
                continue
            key = (stage, queue[0].microbatch)
            if key in (backward if queue[0].kind is Pass.BACKWARD else forward):
                moved = True
                done = queue.popleft()
                if done.kind is Pass.FORWARD:
                    forward.add((stage + 1, done.microbatch))
                else:
                    backward.add((stage - 1, done.microbatch))
        assert moved


def in_flight(pipeline: str, stage: int, stages: int, microbatches: int) -> int:
    count = most = 0
    for operation in stage_order(pipeline, stage, stages, microbatches):
        count += 1 if operation.kind is Pass.FORWARD else -1
        most = max(most, count)
    return most


def test_1f1b_keeps_fewer_microbatches_in_memory_than_gpipe() -> None:
    assert [in_flight("gpipe", s, 4, 8) for s in range(3)] == [8, 8, 8]
    assert [in_flight("1f1b", s, 4, 8) for s in range(3)] == [4, 3, 2]

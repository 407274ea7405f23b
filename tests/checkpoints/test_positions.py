"""Positions in the data, for another batch size."""

import contextlib

import numpy as np
import pytest

from instella_jax.checkpoints.positions import rows_of, share_state
from instella_jax.data.samples import BadSample
from tests.toy_stage import Points, ToyStage

SAMPLES = 96


class WithBroken(Points):
    """Points of which some cannot be read."""

    def __getitem__(self, index):
        if index % 5 == 0:
            raise BadSample(f"point {index}")
        return super().__getitem__(index)


def take(count, batch, state=None, index=0, processes=1, workers=0, points=Points):
    """Batches of some rows of one process, and the position after them."""
    stage = ToyStage(source=points(SAMPLES))
    loader = stage.loader(
        "train", batch_size=batch, process_index=index, process_count=processes, workers=workers
    )
    with contextlib.closing(loader):
        if state is not None:
            loader.set_state(state)
        seen = [float(y) for _ in range(count) for y in next(loader)["y"]]
        return seen, loader.get_state()


@pytest.mark.parametrize("after", [4, 12, 16])
def test_another_batch_size_goes_on_with_the_samples_that_were_not_seen(after):
    before, state = take(6, 8)
    assert rows_of(state) == 8
    rest, end = take((SAMPLES - 48) // after, after, share_state([state], 0, 1, after))
    assert rows_of(end) == after
    wanted = Points(SAMPLES).y.astype(float)
    np.testing.assert_array_equal(np.sort(before + rest), np.sort(wanted))


def test_two_processes_go_on_with_another_batch_size():
    parts = [take(3, 8, index=index, processes=2) for index in range(2)]
    states = [state for _, state in parts]
    rest, _ = take(4, 12, share_state(states, 0, 1, 12))
    seen = parts[0][0] + parts[1][0] + rest
    np.testing.assert_array_equal(np.sort(seen), np.sort(Points(SAMPLES).y.astype(float)))


def test_no_sample_comes_twice_where_the_sizes_do_not_divide():
    before, state = take(5, 8)
    rest, _ = take(7, 7, share_state([state], 0, 1, 7))
    assert len(set(before + rest)) == 40 + 49


def test_no_sample_comes_twice_where_some_rows_have_skipped_more_than_others():
    before, state = take(4, 8, points=WithBroken)
    (read,) = (entry["rows"] for entry in _positions(state))
    assert max(read) > min(read)
    rest, _ = take(5, 4, share_state([state], 0, 1, 4), points=WithBroken)
    assert len(set(before + rest)) == 32 + 20


def _positions(state):
    """All parts of a loader's position that have rows."""
    if isinstance(state, dict):
        if "rows" in state:
            yield state
        state = list(state.values())
    if isinstance(state, list):
        for part in state:
            yield from _positions(part)

import threading
import time

import numpy as np
import pytest

from instella_jax.app.batching import Batcher, Busy, Job, Made, Row, Settings, Stopping
from instella_jax.errors import UserError

SETTINGS = Settings(
    model="m", height=2, width=3, steps=4, guidance_scale=2.0, temperature=1.0
)  # fmt: skip
# A seed that is refused.
BAD = 77
OTHERS = Settings(model="m", height=2, width=3, steps=5, guidance_scale=2.0, temperature=1.0)


def job(*seeds, settings=SETTINGS, on_preview=None):
    return Job(settings, [Row("a cat", "", seed) for seed in seeds], on_preview)


def seeds_of(made):
    seeds = shown_seeds(made.pictures)
    assert [record["seed"] for record in made.records] == seeds
    return seeds


def shown_seeds(pictures):
    return pictures[:, 0, 0, 0].tolist()


class Computer:
    """Pictures that are full of their seed, computed when the gate is open."""

    def __init__(self):
        self.batches, self.gate, self.begun = [], threading.Event(), threading.Event()
        self.gate.set()

    def __call__(self, settings, rows, on_preview):
        self.batches.append((settings.steps, [row.seed for row in rows]))
        self.begun.set()
        assert self.gate.wait(10)
        if any(row.seed == BAD for row in rows):
            raise UserError("this seed is refused")
        shape = (len(rows), settings.height, settings.width, 3)
        pictures = np.broadcast_to(
            np.array([row.seed for row in rows], np.uint8)[:, None, None, None], shape
        )
        for step in range(settings.steps if on_preview else 0):
            on_preview(step + 1, settings.steps, pictures)
        return Made(pictures, [{"seed": row.seed} for row in rows])

    def hold(self):
        """Keep what is computed from now on from ending."""
        self.gate.clear()
        self.begun.clear()


@pytest.fixture
def computer():
    return Computer()


@pytest.fixture
def batcher(computer):
    batcher = Batcher(computer, max_batch=4, max_waiting=10)
    yield batcher
    computer.gate.set()
    assert batcher.drain(10)


@pytest.fixture
def held(batcher, computer):
    """A batcher that computes a first picture, with which all others have to wait."""
    computer.hold()
    first = batcher.submit(job(200))
    assert computer.begun.wait(10)
    yield batcher
    computer.gate.set()
    assert seeds_of(first.result(10)) == [200]


def test_what_waits_together_is_one_batch_and_each_gets_its_own(held, computer):
    jobs = [held.submit(job(1)), held.submit(job(2, 3)), held.submit(job(4))]
    computer.gate.set()
    assert [seeds_of(one.result(10)) for one in jobs] == [[1], [2, 3], [4]]
    assert computer.batches == [(4, [200]), (4, [1, 2, 3, 4])]


def test_other_settings_are_another_batch_and_nobody_is_overtaken_for_good(held, computer):
    jobs = [held.submit(job(1)), held.submit(job(2, settings=OTHERS)), held.submit(job(3))]
    computer.gate.set()
    assert [seeds_of(one.result(10)) for one in jobs] == [[1], [2], [3]]
    assert computer.batches[1:] == [(4, [1, 3]), (5, [2])]


def test_what_is_more_than_a_batch_is_computed_in_parts(held, computer):
    jobs = [held.submit(job(*range(6))), held.submit(job(6, 7))]
    computer.gate.set()
    assert [seeds_of(one.result(10)) for one in jobs] == [[*range(6)], [6, 7]]
    assert computer.batches[1:] == [(4, [0, 1, 2, 3]), (4, [4, 5, 6, 7])]


def test_more_than_may_wait_is_refused_and_the_rest_is_done(held, computer):
    kept = held.submit(job(*range(9)))
    with pytest.raises(Busy, match="9 pictures are waiting, and at most 10 may"):
        held.submit(job(9, 10))
    one = held.submit(job(11))
    computer.gate.set()
    assert seeds_of(kept.result(10)) == [*range(9)] and seeds_of(one.result(10)) == [11]


def test_those_ahead_are_counted(held):
    first, second = held.submit(job(1, 2)), held.submit(job(3))
    assert (held.ahead_of(first), held.ahead_of(second), held.waiting) == (0, 2, 3)


def test_what_nobody_wants_any_more_is_not_computed(held, computer):
    gone, kept = held.submit(job(1)), held.submit(job(2))
    gone.cancel()
    computer.gate.set()
    assert seeds_of(kept.result(10)) == [2]
    assert computer.batches[1:] == [(4, [2])]


def test_a_computation_stops_once_nobody_wants_it(batcher, computer):
    seen = []

    def watch(done, steps, pictures):
        seen.append(done)
        gone.cancel()

    gone = job(1, on_preview=watch)
    batcher.submit(gone)
    assert seeds_of(batcher.submit(job(2, settings=OTHERS)).result(10)) == [2]
    assert seen == [1]


def test_one_who_goes_takes_nothing_from_the_others_of_the_batch(held, computer):
    gone = job(1, on_preview=lambda done, steps, pictures: gone.cancel())
    held.submit(gone)
    kept = held.submit(job(2))
    computer.gate.set()
    assert seeds_of(kept.result(10)) == [2]
    assert computer.batches[1:] == [(4, [1, 2])] and gone.future.cancelled()


def test_an_error_goes_to_those_of_its_batch_alone(held, computer):
    bad, with_it, other = (
        held.submit(job(BAD)), held.submit(job(1)), held.submit(job(2, settings=OTHERS)),
    )  # fmt: skip
    computer.gate.set()
    for one in (bad, with_it):
        with pytest.raises(UserError, match="this seed is refused"):
            one.result(10)
    assert seeds_of(other.result(10)) == [2]


def test_previews_show_all_pictures_of_a_job_with_grey_for_those_not_begun(held, computer):
    seen = []
    watched = job(*range(6), on_preview=lambda *preview: seen.append(preview))
    held.submit(watched)
    held.submit(job(7, 8))
    computer.gate.set()
    watched.result(10)
    shares = [done / steps for done, steps, _ in seen]
    assert len(seen) == 8 and shares == sorted(shares) and shares[-1] == 1.0
    assert shown_seeds(seen[0][2]) == [0, 1, 2, 3, 128, 128]
    assert shown_seeds(seen[-1][2]) == [0, 1, 2, 3, 4, 5]


def test_draining_finishes_what_waits_and_takes_no_more(held, computer):
    waits = held.submit(job(1))
    assert not held.drain(0.01)
    with pytest.raises(Stopping):
        held.submit(job(2))
    computer.gate.set()
    assert seeds_of(waits.result(10)) == [1]
    assert held.drain(10)


def test_those_who_come_at_the_same_moment_share_a_batch(batcher, computer):
    barrier, jobs = threading.Barrier(3), [job(n) for n in range(3)]

    def ask(one):
        barrier.wait()
        batcher.submit(one)

    threads = [threading.Thread(target=ask, args=(one,)) for one in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in jobs:
        one.result(10)
    assert sorted(computer.batches[0][1]) == [0, 1, 2]


def test_many_at_once_all_get_their_own(batcher):
    results = {}

    def ask(number):
        while number not in results:
            try:
                settings = (SETTINGS, OTHERS)[number % 2]
                mine = batcher.submit(job(number, number + 100, settings=settings))
            except Busy:
                time.sleep(0.001)
                continue
            results[number] = seeds_of(mine.result(10))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: [number, number + 100] for number in range(40)}

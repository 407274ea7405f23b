"""The loader: order, exact resume, process slices, bad samples, grouping."""

import json
import logging

import numpy as np
import pytest

from instella_jax.data.loader import make_loader
from instella_jax.data.samples import BadSample
from instella_jax.errors import UserError


class Numbers:
    """Sample i is a 2x2 image of value i and the text "i"; some indices are bad."""

    def __init__(self, length, bad=()):
        self.length, self.bad = length, frozenset(bad)

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if index in self.bad:
            raise BadSample(f"picture {index} is broken")
        image = np.full((2, 2, 3), index % 256, np.uint8)
        return {"image": image, "text": str(index), "facts": (index,)}


class Letters:
    """Encodes each character as its code, left padded with 0."""

    def encode(self, texts, *, max_length, pad_to):
        ids = [[0] * (pad_to - len(t)) + [ord(c) for c in t[:max_length]] for t in texts]
        return np.asarray(ids), np.asarray(ids) > 0


def add_noise(sample, rng):
    return {**sample, "noise": rng.integers(1 << 30)}


def numbers(batch):
    return [int(text) for text in batch["text"]]


def take(loader, count):
    return [next(loader) for _ in range(count)]


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_batch_contents():
    loader = make_loader(Numbers(10), batch_size=4, seed=0, text_tokenizer=Letters(), max_length=5)
    batch = next(loader)
    assert batch["image"].shape == (4, 2, 2, 3) and batch["image"].dtype == np.uint8
    assert batch["ids"].shape == (4, 5) and batch["ids"].dtype == np.int32
    assert batch["mask"].dtype == bool and batch["mask"][:, -1].all()
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], numbers(batch))
    assert [chr(i) for i in batch["ids"][:, -1]] == [text[-1] for text in batch["text"]]
    assert batch["facts"] == [(i,) for i in numbers(batch)]


def test_captions_are_cut_at_the_length_of_the_batch():
    loader = make_loader(Numbers(20_000), batch_size=64, seed=0, shuffle=False,
                         text_tokenizer=Letters(), max_length=2)  # fmt: skip
    batch = next(loader)
    loader.close()
    assert batch["ids"].shape == (64, 2) and batch["mask"][10:].all()
    assert "".join(map(chr, batch["ids"][37])) == "37"


def test_every_epoch_is_another_permutation():
    loader = make_loader(Numbers(37), batch_size=37, seed=3)
    first, second = map(numbers, take(loader, 2))
    assert sorted(first) == sorted(second) == list(range(37))
    assert first != second and first != list(range(37))


def test_neighbouring_seeds_share_no_epoch():
    epochs = [
        tuple(numbers(batch))
        for seed in range(4)
        for batch in take(make_loader(Numbers(50), batch_size=50, seed=seed), 4)
    ]
    assert len(set(epochs)) == 16


def test_one_epoch_in_order_keeps_the_short_batch():
    batches = list(make_loader(Numbers(10), batch_size=4, seed=0, shuffle=False, repeat=False))
    assert [numbers(batch) for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_a_very_long_source_starts_at_once():
    class Long(Numbers):
        reads = 0

        def __getitem__(self, index):
            Long.reads += 1
            return super().__getitem__(index)

    assert len(next(make_loader(Long(10**10), batch_size=4, seed=0))["text"]) == 4
    assert Long.reads < 100


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("threads", [0, 3])
def test_resume_equals_uninterrupted(threads, prefetch):
    def build():
        return make_loader(
            Numbers(23, bad=[4, 9]),
            batch_size=4,
            seed=5,
            transform=add_noise,
            text_tokenizer=Letters(),
            max_length=3,
            threads=threads,
            prefetch=prefetch,
        )

    whole = take(build(), 15)
    for stop in (0, 1, 6):
        first = build()
        take(first, stop)
        resumed = build()
        next(resumed)
        resumed.set_state(json.loads(json.dumps(first.get_state())))
        assert_same(take(resumed, 15 - stop), whole[stop:])


@pytest.mark.slow
def test_worker_processes_give_complete_epochs_and_resume():
    def build():
        return make_loader(
            Numbers(24), batch_size=4, seed=5, transform=add_noise, workers=2, threads=0
        )

    first = build()
    whole = take(first, 8)
    assert sorted(sum(map(numbers, whole[:6]), [])) == list(range(24))
    state = first.get_state()
    after = take(first, 2)
    first.close()
    resumed = build()
    resumed.set_state(state)
    assert_same(take(resumed, 2), after)
    resumed.close()


def test_processes_get_disjoint_slices_and_all_of_the_source():
    def read(index, epochs):
        loader = make_loader(
            Numbers(24),
            batch_size=4,
            seed=1,
            transform=add_noise,
            process_index=index,
            process_count=2,
        )
        batches = take(loader, 3 * epochs)
        return [(i, int(n)) for b in batches for i, n in zip(numbers(b), b["noise"], strict=True)]

    parts = [read(index, 2) for index in range(2)]
    for epoch in range(2):
        seen = [set(part[12 * epoch : 12 * epoch + 12]) for part in parts]
        assert not seen[0] & seen[1]
        assert {i for i, _ in seen[0] | seen[1]} == set(range(24))
        alone = make_loader(Numbers(24), batch_size=24, seed=1, transform=add_noise)
        batch = take(alone, epoch + 1)[-1]
        # The transform's random numbers do not depend on the number of processes.
        assert seen[0] | seen[1] == set(zip(numbers(batch), batch["noise"].tolist(), strict=True))


def test_random_numbers_differ_between_epochs():
    loader = make_loader(Numbers(8), batch_size=8, seed=0, shuffle=False, transform=add_noise)
    first, second = take(loader, 2)
    assert not np.any(first["noise"] == second["noise"])


def without(whole, bad, count):
    """Numbers [steps, B] of a stream less the bad ones, row for row, and how many came before."""
    rows = []
    for row in zip(*whole, strict=True):
        good = [step for step, number in enumerate(row) if number not in bad][:count]
        gaps = np.diff(good, prepend=-1) - 1
        rows.append([(row[step], gap) for step, gap in zip(good, gaps, strict=True)])
    return np.moveaxis(np.array(rows), (0, 1, 2), (2, 1, 0))


@pytest.mark.parametrize("threads", [0, 3])
def test_bad_samples_are_left_out_counted_and_named_once(caplog, threads):
    caplog.set_level(logging.WARNING)
    whole = [numbers(batch) for batch in take(make_loader(Numbers(12), batch_size=5, seed=0), 20)]
    loader = make_loader(Numbers(12, bad=[3, 7]), batch_size=5, seed=0, threads=threads)
    batches = take(loader, 12)
    expected, skipped = without(whole, {3, 7}, 12)
    assert skipped.sum() > 8
    np.testing.assert_array_equal([numbers(batch) for batch in batches], expected)
    np.testing.assert_array_equal([batch["skipped_before"] for batch in batches], skipped)
    messages = [record.getMessage() for record in caplog.records]
    assert sum("picture 3 is broken" in message for message in messages) == 1
    assert any("skipped (2 so far)" in message for message in messages)


def test_nothing_is_repeated_for_bad_samples():
    loader = make_loader(Numbers(12, bad=[3, 7]), batch_size=4, seed=0, transform=add_noise)
    batches = take(loader, 30)
    # The noise of a sample is another one in each epoch.
    shown = [pair for b in batches for pair in zip(numbers(b), b["noise"].tolist(), strict=True)]
    assert len(set(shown)) == len(shown) == 120
    times = np.bincount([number for number, _ in shown], minlength=12)
    assert times[[3, 7]].tolist() == [0, 0]
    assert np.delete(times, [3, 7]).min() >= 11 and times.max() <= 13


def test_a_transform_may_refuse_a_sample():
    def refuse_even(sample, rng):
        if int(sample["text"]) % 2 == 0:
            raise BadSample("even")
        return sample

    batches = list(
        make_loader(Numbers(10), batch_size=2, seed=0, repeat=False, transform=refuse_even)
    )
    assert sorted(sum(map(numbers, batches), [])) == [1, 3, 5, 7, 9]


def test_nothing_but_bad_samples_is_an_error():
    with pytest.raises(UserError, match=r"in a row could not be used.*is broken"):
        next(make_loader(Numbers(5, bad=range(5)), batch_size=2, seed=0))


def test_steps_per_call_groups_the_same_batches():
    plain = make_loader(Numbers(40), batch_size=4, seed=2, text_tokenizer=Letters(), max_length=3)
    grouped = make_loader(
        Numbers(40),
        batch_size=4,
        seed=2,
        text_tokenizer=Letters(),
        max_length=3,
        steps_per_call=5,
    )
    item = next(grouped)
    assert item["image"].shape == (5, 4, 2, 2, 3) and item["ids"].shape == (5, 4, 3)
    for step, batch in enumerate(take(plain, 5)):
        assert_same([{key: value[step] for key, value in item.items()}], [batch])


@pytest.mark.parametrize(
    "arguments",
    [
        {"batch_size": 0},
        {"batch_size": 20, "repeat": False, "drop_remainder": True},
        {"process_index": 2, "process_count": 2},
        {"process_index": 10, "process_count": 11},
        {"seed": -1},
    ],
)
def test_impossible_arguments_are_user_errors(arguments):
    with pytest.raises(UserError):
        make_loader(Numbers(10), **{"batch_size": 2, "seed": 0, **arguments})


def test_pictures_of_different_sizes_are_a_user_error():
    def grow(sample, rng):
        return {**sample, "image": np.zeros((int(sample["text"]) + 1, 2, 3), np.uint8)}

    with pytest.raises(UserError, match="differ in the shape of 'image'"):
        next(make_loader(Numbers(4), batch_size=4, seed=0, transform=grow))

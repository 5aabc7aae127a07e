"""Which rows a step sees, and how they are cut into micro-batches.

rows_of_step(step, rows, batch_size, seed) -> row numbers
micro_batches(lengths, budget) -> positions, longest rows first
collate(rows, pad_id) -> token ids and mask, padded on the left.
"""

import numpy as np
import pytest

from minarena.batching import collate, micro_batches, rows_of_step, steps_per_epoch


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 100])
def test_each_epoch_shows_every_row_once_in_another_order(rows):
    steps = steps_per_epoch(rows, 16)
    epochs = [
        np.concatenate([rows_of_step(e * steps + k, rows, 16, seed=3) for k in range(steps)]) for e in (0, 1)
    ]
    assert [sorted(epoch) for epoch in epochs] == [list(range(rows))] * 2
    assert rows < 15 or list(epochs[0]) != list(epochs[1])


def test_a_step_can_be_asked_for_directly_and_depends_on_the_seed():
    assert list(rows_of_step(123, 1000, 16, seed=1)) == list(rows_of_step(123, 1000, 16, seed=1))
    assert list(rows_of_step(123, 1000, 16, seed=1)) != list(rows_of_step(123, 1000, 16, seed=2))


@pytest.mark.parametrize("budget", [1, 7, 50, 64, 10_000])
def test_micro_batches_hold_every_row_once_within_the_budget(budget):
    lengths = np.random.default_rng(0).integers(1, 60, size=40)
    batches = micro_batches(lengths, budget)
    assert sorted(np.concatenate(batches)) == list(range(40))
    for batch in batches:
        padded = len(batch) * max(lengths[batch])
        assert padded <= budget or len(batch) == 1  # a row longer than the budget is alone
    longest = [max(lengths[batch]) for batch in batches]
    assert longest == sorted(longest, reverse=True)


def test_micro_batches_are_as_few_as_a_greedy_fill_allows():
    assert [list(batch) for batch in micro_batches([3, 9, 3, 4, 9], token_budget=18)] == [[1, 4], [3, 0, 2]]
    assert micro_batches([], token_budget=18) == []


def test_padding_is_on_the_left_and_masked():
    ids, mask = collate([np.array([5, 6, 7]), np.array([8])], pad_id=0)
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]

"""Which rows a step sees, and how they are cut into micro-batches.

rows_of_step(step, rows, batch_size, seed) -> row numbers
micro_batches(lengths, budget) -> positions, longest rows first
collate(rows, pad_id) -> token ids and mask, padded on the left
packed_micro_batches(lengths, budget), collate_packed(rows): the same for packed rows, without padding
"""

import numpy as np
import pytest

from minarena.batching import collate, micro_batches, rows_of_step, steps_per_epoch
from minarena.fast.packing import collate_packed, packed_micro_batches
from minarena.fast.softcap_tiles import TILE, tiles_of


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


@pytest.mark.parametrize("budget", [1, 59, 100, 400, 10_000])
def test_packed_micro_batches_hold_every_row_once_within_the_budget(budget):
    lengths = np.random.default_rng(0).integers(1, 60, size=40)
    batches = packed_micro_batches(lengths, budget)
    assert sorted(np.concatenate(batches)) == list(range(40))
    tokens = [int(sum(-(-lengths[batch] // 8) * 8)) for batch in batches]  # as the rows are filled
    assert all(t <= budget or len(batch) == 1 for t, batch in zip(tokens, batches, strict=True))
    assert len(batches) <= max(-(-sum(tokens) // budget) * 4 / 3 + 1, len(lengths) * (budget < 59))


def test_packed_micro_batches_are_alike_in_tokens():
    lengths = np.random.default_rng(1).integers(100, 2200, size=16)
    tokens = [int(sum(lengths[batch])) for batch in packed_micro_batches(lengths, 8192)]
    assert len(tokens) == -(-sum(lengths) // 8192)
    assert max(tokens) - min(tokens) < 0.1 * max(tokens)
    assert [sorted(batch) for batch in packed_micro_batches([40, 32, 24, 24], 64)] == [
        [0, 3],
        [1, 2],
    ]  # by hand
    assert len(packed_micro_batches([30, 30], 60)) == 2  # each is padded to 32
    assert packed_micro_batches([], 8) == []


def test_packed_rows_lie_one_after_the_other_each_from_a_multiple_of_8():
    rows = [np.arange(5, 15), np.array([3]), np.arange(20, 28)]
    packed = collate_packed(rows)
    assert packed.lengths == [16, 8, 8] and packed.last.tolist() == [9, 16, 31]
    assert packed.ends.tolist() == [0, 16, 24, 32, 32]
    for row, start in zip(rows, packed.ends, strict=False):
        assert packed.ids[start : start + len(row)].tolist() == row.tolist()
        assert packed.positions[start : start + len(row)].tolist() == list(range(len(row)))
    assert collate_packed(rows[:1]).last.tolist() == [9, 9]  # a row by itself stands there twice


def test_packed_shapes_depend_on_the_numbers_asked_for_alone():
    shapes = set()
    for rows in ([np.arange(300), np.arange(9)], [np.arange(90)] * 5, [np.arange(504)]):
        packed = collate_packed(rows, tokens=512, count=6)
        assert sum(packed.lengths) == packed.ends[-1] == 512
        assert packed.last[: len(rows)].tolist() == [
            int(packed.ends[i]) + len(r) - 1 for i, r in enumerate(rows)
        ]
        shapes.add(tuple(tuple(getattr(packed, name).shape) for name in ("ids", "positions", "last", "ends")))
    assert len(shapes) == 1


def test_tiles_cover_each_row_once_and_nothing_else():
    packed = collate_packed([np.arange(n) for n in (300, 128, 5, 129)], tokens=1024, count=8)
    tiles = tiles_of(packed.lengths)
    covered = np.zeros(1024, dtype=int)
    before = {(0, 304): 0, (304, 432): 6, (432, 440): 7, (440, 576): 8, (576, 1024): 11}
    for start, end, first, pairs in tiles.table.tolist():
        covered[first : min(first + TILE, end)] += 1
        assert pairs == before[start, end]  # 3 tiles of queries have 1 + 2 + 3 pairs with tiles of keys
    assert (covered == 1).all()
    assert tiles.pairs == 11 + 10

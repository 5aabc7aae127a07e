"""Rows -> optimiser steps -> micro-batches -> tensors. Knows lengths, not text.

Three counts that are easy to mix up: a STEP updates the weights once and always sees `batch_size` rows (the
last of an epoch may see fewer); a MICRO-BATCH is what the device holds at a time, as many rows as fit into a
token budget; the TOKENS of a micro-batch include its padding. Only the first decides what is learnt.

Everything is a function of its arguments: step 1,234 can be asked for without the 1,233 before it, which is
why a run can be resumed with no state of a data loader.
"""

import heapq
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def steps_per_epoch(rows: int, batch_size: int) -> int:
    return -(-rows // batch_size)


def rows_of_step(step: int, rows: int, batch_size: int, seed: int) -> np.ndarray:
    """Row numbers of optimiser step `step` (from 0).

    Each epoch is a fresh permutation, drawn from (seed, epoch); its last step has the rows that are left.
    """
    epoch, k = divmod(step, steps_per_epoch(rows, batch_size))
    return np.random.default_rng([seed, epoch]).permutation(rows)[k * batch_size : (k + 1) * batch_size]


def balance_by_tokens(lengths: Sequence[int], piles: int) -> list[np.ndarray]:
    """Positions in `lengths` (tokens a row), dealt to `piles` of about equally many tokens.

    The longest row goes first, each to the pile that has fewest tokens (Graham 1969's LPT rule). With fewer
    rows than piles some are empty.
    """
    dealt: list[list[int]] = [[] for _ in range(piles)]
    loads = [(0, pile) for pile in range(piles)]  # (tokens, pile): a heap
    for i in np.argsort(-np.asarray(lengths), kind="stable"):
        tokens, pile = loads[0]
        dealt[pile].append(i)
        heapq.heapreplace(loads, (tokens + int(lengths[i]), pile))
    return [np.array(pile, dtype=int) for pile in dealt]


def micro_batches(lengths: Sequence[int], token_budget: int) -> list[np.ndarray]:
    """Positions in `lengths` (tokens a row), sorted by length and cut so that rows x longest <= token_budget.

    Sorting puts rows of like length together, so little of a micro-batch is padding; the longest come first,
    so that a budget which does not fit the device fails at once. A row longer than the budget is alone in its
    micro-batch.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    batches: list[list[int]] = []
    for i in order:
        # lengths[batches[-1][0]] is the longest of the open micro-batch
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > token_budget:
            batches.append([])
        batches[-1].append(i)
    return [np.array(batch) for batch in batches]


def collate(
    rows: Sequence[np.ndarray], pad_id: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Token ids and mask, (B, T) int64, T the longest row; padding (mask 0) on the left, the seed's side."""
    T = max(map(len, rows))
    ids = np.full((len(rows), T), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), T), dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, T - len(row) :] = row
        mask[i, T - len(row) :] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)

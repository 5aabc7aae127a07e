"""Rows -> optimiser steps -> micro-batches -> tensors. Knows lengths, not text.

    rows_of_step(step, rows, batch_size, seed)     which rows of the table a step sees
    balance_by_tokens(lengths, groups)             how ranks divide them
    micro_batches(lengths, token_budget)           how the device takes them
    collate(rows, pad_id)                          ids and mask of one micro-batch

Three units are easy to mix up. A STEP updates the weights once and sees `batch_size` rows of the table (the
last step of an epoch may see fewer; with --order both each row is shown twice). A MICRO-BATCH is what the
device holds at a time: as many rows as fit into a token budget. The TOKENS of a micro-batch include its
padding. Only the first decides the loss; the others change rounding and the dropout masks.

Everything is a function of its arguments: step 1,234 can be asked for without the 1,233 before it. So a run
can be resumed without the state of a data loader.
"""

import heapq
import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor


def steps_per_epoch(rows: int, batch_size: int) -> int:
    return math.ceil(rows / batch_size)


def rows_of_step(step: int, rows: int, batch_size: int, seed: int) -> np.ndarray:
    """Row numbers of optimiser step `step` (from 0).

    Each epoch is a fresh permutation, drawn from (seed, epoch); its last step has the rows that are left.
    """
    epoch, k = divmod(step, steps_per_epoch(rows, batch_size))
    return np.random.default_rng([seed, epoch]).permutation(rows)[k * batch_size : (k + 1) * batch_size]


def balance_by_tokens(lengths: Sequence[int], groups: int) -> list[np.ndarray]:
    """Divide rows into `groups` of about equally many tokens.

    lengths: tokens a row. Returns the positions in `lengths` of each group's rows. Longest processing time
    first (LPT, Graham 1969): the longest row goes to the group that has the fewest tokens, then the next.
    With fewer rows than groups some groups are empty.
    """
    members: list[list[int]] = [[] for _ in range(groups)]
    loads = [(0, group) for group in range(groups)]  # (tokens, group): a heap
    for i in np.argsort(-np.asarray(lengths), kind="stable"):
        tokens, group = loads[0]
        members[group].append(i)
        heapq.heapreplace(loads, (tokens + int(lengths[i]), group))
    return [np.array(group, dtype=int) for group in members]


def micro_batches(lengths: Sequence[int], token_budget: int) -> list[np.ndarray]:
    """Cut rows into micro-batches in which rows x longest row <= token_budget.

    lengths: tokens a row. Returns the positions in `lengths` of each micro-batch's rows. Sorted by length,
    rows of like length come together, so little of a micro-batch is padding. The longest come first: a budget
    that does not fit the device tends to fail early. A row longer than the budget is alone in its
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
    """Token ids and mask, (B, T) int64, T the longest row; padding (mask 0) on the left, as the recipe's."""
    T = max(map(len, rows))
    ids = np.full((len(rows), T), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), T), dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, T - len(row) :] = row
        mask[i, T - len(row) :] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def real_tokens(rows: Iterable[np.ndarray]) -> int:
    """Tokens without padding: what every tokens-a-second figure of this project counts."""
    return sum(map(len, rows))

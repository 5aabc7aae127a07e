"""Packed micro-batches: rows one after the other, without padding, for the fast path.

    for chosen in packed_micro_batches([len(row) for row in rows], token_budget):
        packed = collate_packed([rows[i] for i in chosen], device)

The counterpart of batching.py's micro_batches and collate, which pad. Which rows a step sees is decided
there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minarena.batching import balance_by_tokens


def packed_micro_batches(lengths: Sequence[int], token_budget: int) -> list[np.ndarray]:
    """Divide rows into micro-batches of about equally many tokens, as few as keep within the budget.

    lengths: tokens a row, counted with padded_length. Returns the positions in `lengths` of each
    micro-batch's rows, which may have any lengths, because nothing is padded. A row longer than the budget is
    alone in its micro-batch.
    """
    lengths = [padded_length(length) for length in lengths]
    fewest = min(len(lengths), math.ceil(sum(lengths) / token_budget))
    for count in range(fewest, len(lengths) + 1):
        groups = balance_by_tokens(lengths, count)
        if all(len(group) == 1 or sum(lengths[i] for i in group) <= token_budget for group in groups):
            break
    return [group for group in groups if len(group)]


def padded_length(tokens: int) -> int:
    """Length of a row after padding to a multiple of 8 (why: collate_packed)."""
    return round_up(tokens, 8)


def round_up(n: int, multiple: int) -> int:
    return math.ceil(n / multiple) * multiple


@dataclass
class Packed:
    """A micro-batch of B rows, one after the other, N tokens in all."""

    ids: Tensor  # (N,) token ids
    positions: Tensor  # (N,) of a token in its row, from 0
    last: Tensor  # (B,) where each row's last real token is
    ends: Tensor  # (B + 2,) int32: 0 and the running sum of the rows' tokens; then N again
    lengths: list[int]  # tokens of each row; they sum to N


def collate_packed(
    rows: Sequence[np.ndarray], device: torch.device | str = "cpu", tokens: int = 0, count: int = 2
) -> Packed:
    """Rows of token ids as one micro-batch on the device.

    Each row is padded to a multiple of 8 tokens, so that every matrix of a row begins at a multiple of 16
    bytes: without that a GPU's products are slow. Padding goes after a row's last token: attention is causal,
    so no real token sees it.

    tokens, count: N and B are at least these, so that micro-batches of other sizes have the same shapes. One
    more row, which nobody reads, fills N up; `last` repeats itself. B is at least 2, because a batch of one
    would be a graph of its own.
    """
    lengths = [padded_length(len(row)) for row in rows]
    if sum(lengths) < tokens:
        lengths.append(tokens - sum(lengths))
    starts, count = np.cumsum([0, *lengths]), max(count, len(rows))
    ids = np.zeros(starts[-1], dtype=np.int64)
    positions = np.zeros(starts[-1], dtype=np.int64)
    for start, length in zip(starts, lengths, strict=False):
        positions[start : start + length] = np.arange(length)
    for row, start in zip(rows, starts, strict=False):
        ids[start : start + len(row)] = row
    last = np.resize(starts[: len(rows)] + [len(row) - 1 for row in rows], count)
    ends = np.pad(starts, (0, count + 2 - len(starts)), mode="edge").astype(np.int32)
    return Packed(*(to_device(array, device) for array in (ids, positions, last, ends)), lengths)


def to_device(array: np.ndarray, device: torch.device | str) -> Tensor:
    """A copy that does not wait for the GPU: from pinned memory."""
    tensor = torch.from_numpy(array)
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)

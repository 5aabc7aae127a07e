"""Packed micro-batches: rows one after the other, without padding, for the fast path.

    for chosen in balanced([len(row) for row in rows], token_budget):
        packed = collate_packed([rows[i] for i in chosen], device)

What batching.py is to padded rows. Which rows a step sees is batching.py's alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minarena.batching import balance_by_tokens

TILE = 128  # tokens of a tile, the unit in which kernels.py deals with rows


def packed_micro_batches(lengths: Sequence[int], token_budget: int) -> list[np.ndarray]:
    """Positions in `lengths` (tokens a row), dealt to micro-batches of about equally many tokens.

    For packed rows: nothing is padded, so a micro-batch may hold rows of any lengths. As few micro-batches as
    keep within the budget, counted as they are filled (a longer row is alone).
    """
    lengths = [padded_length(length) for length in lengths]
    least = min(len(lengths), -(-int(sum(lengths)) // token_budget))
    for count in range(least, len(lengths) + 1):
        piles = balance_by_tokens(lengths, count)
        if all(len(pile) == 1 or sum(lengths[i] for i in pile) <= token_budget for pile in piles):
            break
    return [pile for pile in piles if len(pile)]


def padded_length(tokens: int) -> int:
    """What a packed row of so many tokens takes: collate_packed says why."""
    return round_up(tokens, 8)


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@dataclass
class Packed:
    """A micro-batch of B rows, one after the other, N tokens in all."""

    ids: Tensor  # (N,) token ids
    positions: Tensor  # (N,) of a token in its row, from 0
    last: Tensor  # (B,) where each row's last real token is
    ends: Tensor  # (B + 2,) int32: 0 and the running sum of the rows' tokens; then N again
    tiles: Tensor  # (tiles, 4) int32: a row's start and end; where a tile of it begins; pairs of rows before
    pairs: int  # of a tile of queries and one of keys, at it or before it in its row: room for P, dS
    lengths: list[int]  # tokens of each row; they sum to N


def collate_packed(
    rows: Sequence[np.ndarray], device: torch.device | str = "cpu", tokens: int = 0, count: int = 2
) -> Packed:
    """Rows of token ids as one micro-batch on the device.

    Rows are filled up to a multiple of 8 tokens, after their end, where nothing that is used looks: so all
    matrices of a row begin at a multiple of 16 bytes, without which a GPU's products are slow. tokens, count:
    N and B are at least that (a row more than was given is a tail that nobody looks at; `last` repeats
    itself), so that micro-batches of other sizes have the same shapes. B is at least 2, for a batch of one
    would be a graph of its own.
    """
    lengths = [padded_length(len(row)) for row in rows]
    lengths += [tokens - sum(lengths)] * (sum(lengths) < tokens)
    starts, count = np.cumsum([0, *lengths]), max(count, len(rows))
    ids, positions = np.zeros((2, starts[-1]), dtype=np.int64)
    tiles = np.zeros((starts[-1] // TILE + count + 1, 4), dtype=np.int32)
    of_rows, pairs = [], 0
    for start, length in zip(starts, lengths, strict=False):
        positions[start : start + length] = np.arange(length)
        firsts = range(start, start + length, TILE)
        of_rows += [(start, start + length, first, pairs) for first in firsts]
        pairs += len(firsts) * (len(firsts) + 1) // 2
    tiles[: len(of_rows)] = of_rows
    for row, start in zip(rows, starts, strict=False):
        ids[start : start + len(row)] = row
    last = np.resize(starts[: len(rows)] + [len(row) - 1 for row in rows], count)
    ends = np.pad(starts, (0, count + 2 - len(starts)), mode="edge").astype(np.int32)
    tensors = [torch.from_numpy(x) for x in (ids, positions, last, ends, tiles)]
    if torch.device(device).type == "cuda":  # from pinned memory the copy does not wait for the GPU
        tensors = [tensor.pin_memory() for tensor in tensors]
    return Packed(*(tensor.to(device, non_blocking=True) for tensor in tensors), pairs, lengths)

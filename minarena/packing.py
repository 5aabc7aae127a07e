"""Packed micro-batches: rows one after the other, without padding, for the fast path.

    for chosen in balanced([len(row) for row in rows], token_budget):
        ids, positions, last, ends, lengths = collate_packed([rows[i] for i in chosen], device)

What batching.py is to padded rows. Which rows a step sees is batching.py's alone.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from minarena.batching import deal


def balanced(lengths: Sequence[int], token_budget: int) -> list[np.ndarray]:
    """Positions in `lengths` (tokens a row), dealt to micro-batches of about equally many tokens.

    For packed rows: nothing is padded, so a micro-batch may hold rows of any lengths. As few micro-batches as
    keep within the budget (a longer row is alone).
    """
    least = min(len(lengths), -(-int(sum(lengths)) // token_budget))
    for count in range(least, len(lengths) + 1):
        piles = deal(lengths, count)
        if all(len(pile) == 1 or sum(lengths[i] for i in pile) <= token_budget for pile in piles):
            break
    return [pile for pile in piles if len(pile)]


def collate_packed(
    rows: Sequence[np.ndarray], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int]]:
    """Rows one after the other: ids (N,), positions (N,), last (B,), ends (B + 1,), and tokens of each row.

    last: where each row's last real token is (B at least 2: a single row stands there twice, for a batch of
    one would be a graph of its own). ends: 0 and the running sum of the rows' tokens, int32. Rows are filled
    up to a multiple of 8 tokens, after their end, where nothing that is used looks: so all matrices of a row
    begin at a multiple of 16 bytes, without which a GPU's products are slow.
    """
    lengths = [-(-len(row) // 8) * 8 for row in rows]
    ends = np.cumsum([0, *lengths])
    ids, positions = np.zeros((2, ends[-1]), dtype=np.int64)
    for row, start, length in zip(rows, ends, lengths, strict=False):
        ids[start : start + len(row)] = row
        positions[start : start + length] = np.arange(length)
    last = np.resize(ends[:-1] + [len(row) - 1 for row in rows], max(2, len(rows)))
    tensors = [torch.from_numpy(x) for x in (ids, positions, last, ends.astype(np.int32))]
    if torch.device(device).type == "cuda":  # from pinned memory the copy does not wait for the GPU
        tensors = [tensor.pin_memory() for tensor in tensors]
    ids, positions, last, ends = (tensor.to(device, non_blocking=True) for tensor in tensors)
    return ids, positions, last, ends, lengths

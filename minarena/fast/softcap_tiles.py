"""The tiles of packed rows: the unit of work of softcap_kernels.py.

A tile is 128 tokens of one row (its last tile may have fewer). The kernels' backward keeps 128 x 128 numbers
for each pair of a tile of queries and a tile of keys at or before it in the same row. Here, and not beside
the kernels, so that it can be tested where there is no Triton.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minarena.fast.packing import to_device

TILE = 128  # tokens


@dataclass
class Tiles:
    """table (tiles, 4) int32, a line a tile: (row start, row end, tile start, tile pairs in earlier rows).

    pairs: how many (query tile, key tile) pairs lie on or below the diagonal, over all rows: the size of the
    buffers of P and dS.
    """

    table: Tensor
    pairs: int


def tiles_of(lengths: Sequence[int], device: torch.device | str = "cpu") -> Tiles:
    """lengths: tokens of each row of a Packed, in order."""
    table, pairs, start = [], 0, 0
    for length in lengths:
        firsts = range(start, start + length, TILE)
        table += [(start, start + length, first, pairs) for first in firsts]
        pairs += len(firsts) * (len(firsts) + 1) // 2
        start += length
    return Tiles(to_device(np.array(table, dtype=np.int32), device), pairs)

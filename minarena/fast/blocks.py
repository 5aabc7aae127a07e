"""Blocks of the Triton kernels by a GPU's shared memory: one table, and the only place that asks the GPU.

A program (CUDA's thread block) holds what it multiplies in shared memory, which limits its blocks: 227 KiB on
an H100, H200 or B200, 163 on an A100, 99 on RTX 30 to 50, A10, L4 and L40. A kernel with larger blocks does
not start. The row for 227 KiB was chosen by its speed on an H100. The row for 99 was chosen by what the
compiler says of each card, no spilled registers; its speed was measured on an H100 alone. Two cards that have
more memory take it, too: on an A100 the large blocks of attention spill registers, and on a B200 the kernel
of dQ would need 232 KiB, because its tensor cores read more operands from shared memory.

What it does not do: GPUs with less than 99 KiB. Turing (T4, RTX 20) has 64, and Triton has no code for its
tensor cores.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Blocks:
    """forward, queries, keys: attention's three kernels, (queries or keys that a program owns, of the other
    kind at a time, warps, stages). int8: (rows of a tile of Y, its columns, depth of a step, warps, stages,
    programs on a multiprocessor)."""

    forward: tuple[int, int, int, int]
    queries: tuple[int, int, int, int]
    keys: tuple[int, int, int, int]
    int8: tuple[int, int, int, int, int, int]


# Least shared memory of a program, KiB -> blocks that fit, for attention with heads of 256.
# keys[1] <= keys[0] <= queries[0] <= softcap_tiles.TILE, or the kernel of dK and dV reads unwritten memory
BLOCKS = {
    227: Blocks((128, 32, 8, 3), (64, 64, 4, 2), (64, 32, 8, 4), (128, 128, 128, 4, 3, 2)),
    99: Blocks((64, 32, 8, 2), (64, 32, 8, 1), (64, 32, 8, 3), (64, 64, 64, 4, 3, 2)),
}


def shared_memory(device: torch.device) -> int:
    """KiB that a program may have on this GPU."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin // 1024


def blocks_of(device: torch.device) -> Blocks | None:
    """The blocks for this GPU; None: none fit."""
    memory = shared_memory(device)
    if torch.cuda.get_device_properties(device).major != 9:
        memory = min(memory, 226)  # the large blocks do not fit a B200
    return BLOCKS.get(max((least for least in BLOCKS if least <= memory), default=0))

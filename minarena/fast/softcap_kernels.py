"""Soft-capped causal attention over packed rows as three GPU kernels, in Triton.

    Z = softcap * tanh(scale * Q K^T / softcap)
    P = exp(Z) / sum of exp(Z) over the keys at or before a query
    O = P V

The scheme is FlashAttention's (Dao 2023, https://arxiv.org/abs/2307.08691, algorithms 1 and 2): a program
owns a block of queries and walks over the blocks of keys that they see, whose scores stay on the chip; the
backward computes P again from the normaliser. Two things are simpler than there. First, |Z| <= softcap, so
exp(Z) cannot overflow, and no running maximum is kept, subtracted and corrected. Second, the kernel of dQ
writes P and dS (the gradient of scale Q K^T), and dK and dV are plain products of them: P is not computed a
third time. So the backward has five products, where two independent kernels have seven. And no program
accumulates two outputs: with head size 256 the registers cannot hold both. The price is memory for one layer
at a time, 4 bytes for each head, query and key: .6 GB for 8,000 tokens of Gemma-2-9B in rows of 2,200, 2.2 GB
for one row of 8,192.

Blocks depend on the GPU's shared memory (blocks.py). Not here: a cap above 80 (exp(80) times some thousand
keys is still a number in fp32 and bf16), head sizes that are no power of two or above 256, dropout, attention
in both directions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minarena.fast.blocks import blocks_of
from minarena.fast.softcap_tiles import TILE

LOG2E = tl.constexpr(1.4426950408889634)  # the hardware computes 2^x


class CappedAttention(torch.autograd.Function):
    """CappedAttention.apply(q, k, v, tiles, pairs, scale, softcap, window) -> (N, H, G, D)

    q (N, H, G, D), k and v (N, H, D), bf16: N tokens of all rows one after the other, H heads of keys, G
    heads of queries to each. tiles (tiles, 4) int32, on the GPU, and pairs: see softcap_tiles.Tiles. window:
    a query sees that many keys, itself included; None: all before it. Kept for the backward: Q, K, V, O and
    one number for each query and head.
    """

    @staticmethod
    def forward(ctx, q, k, v, tiles, pairs, scale, softcap, window) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse, tiles)
        ctx.pairs, ctx.settings = pairs, (scale, softcap, window or 0, q.size(1), q.size(2), q.size(3))
        blocks, heads = blocks_of(q.device).forward, q.size(1) * q.size(2)
        launch_kernel(forward_kernel, blocks, heads, ctx.settings, q, k, v, out, lse, tiles)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, out, lse, tiles = ctx.saved_tensors
        grad = grad.contiguous()
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        blocks, heads = blocks_of(q.device), q.size(1) * q.size(2)
        P, dS = q.new_empty(2, ctx.pairs, heads, TILE, TILE)
        tensors = q, k, v, out, grad, lse, dq, P, dS, tiles
        launch_kernel(backward_dq_kernel, blocks.queries, heads, ctx.settings, *tensors)
        launch_kernel(transpose_product_kernel, blocks.keys, k.size(1), ctx.settings, P, grad, dv, tiles)
        launch_kernel(transpose_product_kernel, blocks.keys, k.size(1), ctx.settings, dS, q, dk, tiles)
        return dq, dk, dv, None, None, None, None, None


def launch_kernel(
    kernel, blocks: tuple[int, int, int, int], heads: int, settings: tuple, *tensors: Tensor
) -> None:
    """One program for each block of a tile and each head. Every kernel takes all settings, used or not."""
    own, other, warps, stages = blocks
    grid = (tensors[-1].size(0) * (TILE // own), heads)
    kernel[grid](*tensors, *settings, TILE, own, other, num_warps=warps, num_stages=stages)


@triton.jit
def block_of_tile(tiles, TILE: tl.constexpr, OWN: tl.constexpr):
    """This program's: row start, row end, the row's first tile pair, tile start, block start in the tile"""
    number = tl.program_id(0)
    tile = tiles + number // (TILE // OWN) * 4  # one line of tiles_of's table
    return (tl.load(tile), tl.load(tile + 1), tl.load(tile + 3), tl.load(tile + 2),
            number % (TILE // OWN) * OWN)  # fmt: skip


@triton.jit
def rows_at(x, tokens, end, head, HEADS: tl.constexpr, D: tl.constexpr):
    """(tokens, D) of x (N, HEADS, D); zeros at or after `end`"""
    at = (tokens * HEADS + head)[:, None] * D + tl.arange(0, D)
    return tl.load(x + at, mask=(tokens < end)[:, None], other=0.0)


@triton.jit
def put_rows(x, value, tokens, end, head, HEADS: tl.constexpr, D: tl.constexpr):
    at = (tokens * HEADS + head)[:, None] * D + tl.arange(0, D)
    tl.store(x + at, value.to(x.dtype.element_ty), mask=(tokens < end)[:, None])


@triton.jit
def tanh_of(scores, SCALE: tl.constexpr, CAP: tl.constexpr):
    return 1 - 2 / (1 + tl.exp2(scores * (2 * LOG2E * SCALE / CAP)))


@triton.jit
def seen(query, key, end, WINDOW: tl.constexpr):
    """Whether a query may look at a key; shapes that broadcast"""
    inside = (key <= query) & (query < end)
    return inside & (key > query - WINDOW) if WINDOW else inside


@triton.jit
def tile_of(weights, before, query, key, head, HEADS: tl.constexpr, TILE: tl.constexpr):
    """Pointer to a head's TILE x TILE numbers for a row's tile `query` and its tile `key`, both from 0."""
    return weights + ((before + query * (query + 1) // 2 + key).to(tl.int64) * HEADS + head) * (TILE * TILE)


@triton.jit
def forward_kernel(q, k, v, out, lse, tiles, SCALE: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr,
                   H: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
                   TILE: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr):  # fmt: skip
    start, end, _, tile, block = block_of_tile(tiles, TILE, OWN)
    head, first = tl.program_id(1), tile + block
    query = first + tl.arange(0, OWN)
    Q = rows_at(q, query, end, head, H * G, D)
    total, weighted = tl.zeros([OWN], tl.float32), tl.zeros([OWN, D], tl.float32)
    begin = tl.maximum(start, first - WINDOW + 1) if WINDOW else start
    for i in range(begin, tl.where(first < end, tl.minimum(first + OWN, end), 0), OTHER):
        key = i + tl.arange(0, OTHER)
        keys, values = rows_at(k, key, end, head // G, H, D), rows_at(v, key, end, head // G, H, D)
        tanh = tanh_of(tl.dot(Q, tl.trans(keys)), SCALE, CAP)
        P = tl.where(seen(query[:, None], key[None], end, WINDOW), tl.exp2(tanh * (CAP * LOG2E)), 0.0)
        total += tl.sum(P, 1)
        weighted = tl.dot(P.to(values.dtype), values, weighted)
    put_rows(out, weighted / total[:, None], query, end, head, H * G, D)
    tl.store(lse + query * H * G + head, tl.log2(total), mask=query < end)  # to the base 2


@triton.jit
def backward_dq_kernel(q, k, v, out, grad, lse, dq, P_out, dS_out, tiles,
                       SCALE: tl.constexpr, CAP: tl.constexpr,
                   WINDOW: tl.constexpr, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
                   TILE: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr):  # fmt: skip
    """dQ; P and dS for transpose_product_kernel, TILE x TILE for a pair of tiles, 0 where nothing is seen."""
    start, end, before, tile, block = block_of_tile(tiles, TILE, OWN)
    head, first = tl.program_id(1), tile + block
    query = first + tl.arange(0, OWN)
    Q, dO = rows_at(q, query, end, head, H * G, D), rows_at(grad, query, end, head, H * G, D)
    output = rows_at(out, query, end, head, H * G, D)
    sums = tl.sum(output.to(tl.float32) * dO.to(tl.float32), 1)  # over the keys, of P dP
    normaliser = tl.load(lse + query * H * G + head, mask=query < end, other=0.0)
    dQ = tl.zeros([OWN, D], tl.float32)
    begin = start + tl.maximum(0, tile - WINDOW + 1 - start) // TILE * TILE if WINDOW else start
    at = (block + tl.arange(0, OWN))[:, None] * TILE + tl.arange(0, OTHER)  # (OWN, OTHER) in a tile
    for n in range(0, tl.where(first < end, tl.minimum(first + OWN, end) - begin, 0), OTHER):
        key = begin + n + tl.arange(0, OTHER)
        keys, values = rows_at(k, key, end, head // G, H, D), rows_at(v, key, end, head // G, H, D)
        tanh = tanh_of(tl.dot(Q, tl.trans(keys)), SCALE, CAP)
        P = tl.exp2(tanh * (CAP * LOG2E) - normaliser[:, None])
        P = tl.where(seen(query[:, None], key[None], end, WINDOW), P, 0.0)
        dZ = P * (tl.dot(dO, tl.trans(values)) - sums[:, None])
        dS = (dZ * (1 - tanh * tanh) * SCALE).to(keys.dtype)
        dQ = tl.dot(dS, keys, dQ)
        numbers = (tile - start) // TILE, (begin - start + n) // TILE
        tl.store(tile_of(P_out, before, *numbers, head, H * G, TILE) + n % TILE + at, P.to(keys.dtype))
        tl.store(tile_of(dS_out, before, *numbers, head, H * G, TILE) + n % TILE + at, dS)
    put_rows(dq, dQ, query, end, head, H * G, D)


@triton.jit
def transpose_product_kernel(weights, x, out, tiles,
                SCALE: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr,
                H: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
                TILE: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr):  # fmt: skip
    """out (N, H, D) = weights^T x, summed over queries and their G heads: dV = P^T dO, dK = dS^T Q."""
    start, end, before, tile, block = block_of_tile(tiles, TILE, OWN)
    key = tile + block + tl.arange(0, OWN)
    total = tl.zeros([OWN, D], tl.float32)
    last = tl.minimum(end, tile + TILE + WINDOW - 1) if WINDOW else end
    at = tl.arange(0, OTHER)[:, None] * TILE + block + tl.arange(0, OWN)  # (OTHER, OWN) in a tile
    for head in range(tl.program_id(1) * G, (tl.program_id(1) + 1) * G):
        for n in range(block, last - tile, OTHER):  # queries before its own block see none of it
            query = tile + n + tl.arange(0, OTHER)
            numbers = (tile - start + n) // TILE, (tile - start) // TILE
            part = tile_of(weights, before, *numbers, head, H * G, TILE) + n % TILE * TILE
            total = tl.dot(tl.trans(tl.load(part + at)), rows_at(x, query, end, head, H * G, D), total)
    put_rows(out, total, key, end, tl.program_id(1), H, D)

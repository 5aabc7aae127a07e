"""Soft-capped causal attention over packed rows as three GPU kernels, in Triton: scores never leave the chip.

    Z = softcap * tanh(scale * Q K^T / softcap)
    P = exp(Z) / sum of exp(Z) over the keys at or before a query
    O = P V

The scheme is FlashAttention's (Dao 2023, https://arxiv.org/abs/2307.08691, algorithms 1 and 2): a program
owns a block of queries (or, for the gradients of K and V, of keys), walks over the blocks that it meets, and
the backward computes P again from the normaliser. One thing is simpler than there: |Z| <= softcap, so exp(Z)
cannot overflow and no running maximum is kept, subtracted and corrected for.

All launches have a size that depends on the shape alone, and read where rows begin and end from the GPU, so
that a CUDA graph can replay them. Blocks were chosen on an H100, whose shared memory they fill with heads of
256. Not here: a cap above 80 (exp(80) times some thousand keys is still a number in fp32 and bf16), head
sizes that are no power of two, dropout, attention in both directions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minarena.packing import TILE

LOG2E = tl.constexpr(1.4426950408889634)  # the hardware's exponential is that of 2
# (queries or keys a program owns, of the other kind at a time, warps, stages): measured, benchmarks/README.md
FORWARD, QUERIES, KEYS = (128, 32, 8, 3), (128, 64, 8, 1), (32, 64, 4, 2)


class CappedAttention(torch.autograd.Function):
    """CappedAttention.apply(q, k, v, tiles, scale, softcap, window) -> (N, K, G, D)

    q (N, K, G, D), k and v (N, K, D), bf16: N tokens of all rows one after the other, K heads of keys, G
    heads of queries to each. tiles (tiles, 3) int32: packing.py's, on the GPU. window: a query sees that many
    keys, itself included; None: all before it. Kept for the backward: Q, K, V, O and a number a query and
    head.
    """

    @staticmethod
    def forward(ctx, q, k, v, tiles, scale, softcap, window) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse, tiles)
        ctx.settings = scale, softcap, window or 0, q.size(1), q.size(2), q.size(3)
        launch(forward_kernel, FORWARD, q.size(1) * q.size(2), ctx.settings, q, k, v, out, lse, tiles)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, out, lse, tiles = ctx.saved_tensors
        grad, delta = grad.contiguous(), torch.empty_like(lse)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        inputs = q, k, v, out, grad, lse, delta
        launch(queries_kernel, QUERIES, q.size(1) * q.size(2), ctx.settings, *inputs, dq, tiles)
        launch(keys_kernel, KEYS, k.size(1), ctx.settings, *inputs, dk, dv, tiles)
        return dq, dk, dv, None, None, None, None


def launch(kernel, blocks: tuple[int, int, int, int], heads: int, settings: tuple, *tensors: Tensor) -> None:
    """One program for each block of a tile and each head."""
    own, other, warps, stages = blocks
    grid = (tensors[-1].size(0) * (TILE // own), heads)
    kernel[grid](*tensors, *settings, TILE, own, other, num_warps=warps, num_stages=stages)


@triton.jit
def block_of_tile(tiles, TILE: tl.constexpr, OWN: tl.constexpr):
    """(first token of the row, its end, first token of this program's block); an empty block begins there."""
    number = tl.program_id(0)
    tile = tiles + number // (TILE // OWN) * 3
    first = tl.load(tile + 2) + number % (TILE // OWN) * OWN
    return tl.load(tile), tl.load(tile + 1), first


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
def forward_kernel(q, k, v, out, lse, tiles, SCALE: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr,
                   K: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
                   TILE: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr):  # fmt: skip
    start, end, first = block_of_tile(tiles, TILE, OWN)
    head = tl.program_id(1)
    query = first + tl.arange(0, OWN)
    Q = rows_at(q, query, end, head, K * G, D)
    total, weighted = tl.zeros([OWN], tl.float32), tl.zeros([OWN, D], tl.float32)
    begin = tl.maximum(start, first - WINDOW + 1) if WINDOW else start
    for i in range(begin, tl.where(first < end, tl.minimum(first + OWN, end), 0), OTHER):
        key = i + tl.arange(0, OTHER)
        keys, values = rows_at(k, key, end, head // G, K, D), rows_at(v, key, end, head // G, K, D)
        tanh = tanh_of(tl.dot(Q, tl.trans(keys)), SCALE, CAP)
        P = tl.where(seen(query[:, None], key[None], end, WINDOW), tl.exp2(tanh * (CAP * LOG2E)), 0.0)
        total += tl.sum(P, 1)
        weighted = tl.dot(P.to(values.dtype), values, weighted)
    put_rows(out, weighted / total[:, None], query, end, head, K * G, D)
    tl.store(lse + query * K * G + head, tl.log2(total), mask=query < end)  # to the base 2


@triton.jit
def queries_kernel(q, k, v, out, grad, lse, delta, dq, tiles, SCALE: tl.constexpr, CAP: tl.constexpr,
                   WINDOW: tl.constexpr, K: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
                   TILE: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr):  # fmt: skip
    """dQ, and for the next kernel delta = the sum over the keys of P dP, by way of O."""
    start, end, first = block_of_tile(tiles, TILE, OWN)
    head = tl.program_id(1)
    query = first + tl.arange(0, OWN)
    Q, dO = rows_at(q, query, end, head, K * G, D), rows_at(grad, query, end, head, K * G, D)
    output = rows_at(out, query, end, head, K * G, D)
    sums = tl.sum(output.to(tl.float32) * dO.to(tl.float32), 1)
    tl.store(delta + query * K * G + head, sums, mask=query < end)
    normaliser = tl.load(lse + query * K * G + head, mask=query < end, other=0.0)
    dQ = tl.zeros([OWN, D], tl.float32)
    begin = tl.maximum(start, first - WINDOW + 1) if WINDOW else start
    for i in range(begin, tl.where(first < end, tl.minimum(first + OWN, end), 0), OTHER):
        key = i + tl.arange(0, OTHER)
        keys, values = rows_at(k, key, end, head // G, K, D), rows_at(v, key, end, head // G, K, D)
        tanh = tanh_of(tl.dot(Q, tl.trans(keys)), SCALE, CAP)
        P = tl.exp2(tanh * (CAP * LOG2E) - normaliser[:, None])
        P = tl.where(seen(query[:, None], key[None], end, WINDOW), P, 0.0)
        dZ = P * (tl.dot(dO, tl.trans(values)) - sums[:, None])
        dQ = tl.dot((dZ * (1 - tanh * tanh)).to(keys.dtype), keys, dQ)
    put_rows(dq, dQ * SCALE, query, end, head, K * G, D)


@triton.jit
def keys_kernel(q, k, v, out, grad, lse, delta, dk, dv, tiles, SCALE: tl.constexpr, CAP: tl.constexpr,
                WINDOW: tl.constexpr, K: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
                TILE: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr):  # fmt: skip
    """dK and dV, summed over the G heads of queries; scores stand transposed, (keys, queries)."""
    _start, end, first = block_of_tile(tiles, TILE, OWN)
    key = first + tl.arange(0, OWN)
    keys, values = rows_at(k, key, end, tl.program_id(1), K, D), rows_at(v, key, end, tl.program_id(1), K, D)
    dK, dV = tl.zeros([OWN, D], tl.float32), tl.zeros([OWN, D], tl.float32)
    for head in range(tl.program_id(1) * G, (tl.program_id(1) + 1) * G):
        for i in range(first, tl.minimum(end, first + OWN + WINDOW - 1) if WINDOW else end, OTHER):
            query = i + tl.arange(0, OTHER)
            Q, dO = rows_at(q, query, end, head, K * G, D), rows_at(grad, query, end, head, K * G, D)
            normaliser = tl.load(lse + query * K * G + head, mask=query < end, other=0.0)
            sums = tl.load(delta + query * K * G + head, mask=query < end, other=0.0)
            tanh = tanh_of(tl.dot(keys, tl.trans(Q)), SCALE, CAP)
            P = tl.exp2(tanh * (CAP * LOG2E) - normaliser[None])
            P = tl.where(seen(query[None], key[:, None], end, WINDOW), P, 0.0)
            dV = tl.dot(P.to(dO.dtype), dO, dV)
            dZ = P * (tl.dot(values, tl.trans(dO)) - sums[None])
            dK = tl.dot((dZ * (1 - tanh * tanh)).to(Q.dtype), Q, dK)
    put_rows(dk, dK * SCALE, key, end, tl.program_id(1), K, D)
    put_rows(dv, dV, key, end, tl.program_id(1), K, D)

"""Soft-capped causal attention over packed rows: no padding, no kernel language, probabilities never kept.

    Z = softcap * tanh(scale * Q K^T / softcap)
    P = softmax(Z) over the keys at or before a query
    O = P V

Gemma-2 caps its attention logits (https://arxiv.org/abs/2408.00118, section 2.2), and the fused kernels of
PyTorch have no cap. What they do for memory is done here with library products: BLOCK queries of a row at a
time, against the keys that they may see and no others; the backward computes the scores again from Q and K
and the softmax's normaliser (Dao et al. 2022, https://arxiv.org/abs/2205.14135, appendix B; Rabe & Staats
2021, https://arxiv.org/abs/2112.05682). The two element-wise passes in between are plain PyTorch that
torch.compile fuses on a GPU.

Without a cap, PyTorch's own flash attention over packed rows is used on a GPU. What it does not do: dropout
on the probabilities (no model here has it), attention in both directions, a cache for generating text.
"""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# Queries at a time. Smaller blocks waste less of the square, and launch more: with 256, 512 and 1,024 a 9B
# trained at 5,204, 7,140 and 8,711 tokens/s on an H100 (benchmarks/README.md).
BLOCK = 1024


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[int],
    ends: Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """Each row attends to itself alone.

    q (N, K, G, D), k and v (N, K, D): N tokens of all rows one after the other, K heads of keys, G heads of
    queries to each. lengths: tokens of each row, which sum to N; ends (B + 1,) int32: 0 and their running
    sum, on the device. window: a query sees that many keys, itself included; None: all before it. Returns
    (N, K, G, D).
    """
    if softcap is None and q.is_cuda:
        return flash(q, k, v, max(lengths), ends, scale, window)
    return PackedAttention.apply(q, k, v, lengths, scale, softcap, window)


def flash(
    q: Tensor, k: Tensor, v: Tensor, longest: int, ends: Tensor, scale: float, window: int | None
) -> Tensor:
    """The same without a cap, by PyTorch's packed flash attention (bf16 or fp16 on a GPU)."""
    from torch.nn.attention.varlen import varlen_attn

    N, K, G, D = q.shape
    k, v = (x.unsqueeze(2).expand(N, K, G, D).reshape(N, K * G, D) for x in (k, v))
    rows = (ends, ends, longest, longest)
    left = -1 if window is None else window - 1  # keys before a query's own
    out = varlen_attn(q.reshape(N, K * G, D), k, v, *rows, scale=scale, window_size=(left, 0))
    return out.view(N, K, G, D)


class PackedAttention(torch.autograd.Function):
    """packed_attention with a backward that keeps Q, K, V, O and one number a query and head."""

    @staticmethod
    def forward(ctx, q, k, v, lengths, scale, softcap, window) -> Tensor:
        probabilities = fused(softmax_of_scores)
        q = q.transpose(0, 1).contiguous()  # (K, N, G, D): a block's queries of all G heads are one matrix
        out, lse = torch.empty_like(q), []
        for queries, keys in blocks(lengths, window):
            K_T, V = k[keys].permute(1, 2, 0), v[keys].transpose(0, 1)  # (K, D, T), (K, T, D)
            scores = flat(q[:, queries]) @ K_T  # (K, Q * G, T)
            P, normaliser = probabilities(scores, q.size(2), scale, softcap, window)
            lse.append(normaliser)
            torch.bmm(P, V, out=flat(out[:, queries]))
        ctx.save_for_backward(q, k, v, out, *lse)
        ctx.settings = lengths, scale, softcap, window
        return out.transpose(0, 1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, out, *lse = ctx.saved_tensors
        lengths, scale, softcap, window = ctx.settings
        derivative = fused(softmax_backward)
        grad = grad.transpose(0, 1).contiguous()  # (K, N, G, D)
        # (K, N, G, 1): the sum over the keys of P dP, by way of O
        delta = (grad * out).sum(-1, keepdim=True, dtype=torch.float32)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (queries, keys), normaliser in zip(blocks(lengths, window), lse, strict=True):
            Q, dO = flat(q[:, queries]), flat(grad[:, queries])  # (K, Q * G, D)
            K, V = k[keys].transpose(0, 1), v[keys].transpose(0, 1)  # (K, T, D)
            sums = normaliser, flat(delta[:, queries])  # (K, Q * G, 1)
            P, dS = derivative(Q @ K.mT, dO @ V.mT, *sums, q.size(2), scale, softcap, window)
            torch.bmm(dS, K, out=flat(dq[:, queries]))
            dk[keys].transpose(0, 1).baddbmm_(dS.mT, Q)  # summed over the G heads of the queries, too
            dv[keys].transpose(0, 1).baddbmm_(P.mT, dO)
        return dq.transpose(0, 1), dk, dv, None, None, None, None


def blocks(lengths: list[int], window: int | None) -> Iterator[tuple[slice, slice]]:
    """(queries, keys that any of them may see) of each block of each row, as slices of the N tokens.

    The last key of a block is its last query's own: softmax_of_scores counts from there.
    """
    start = 0
    for T in lengths:
        for first in range(0, T, BLOCK):
            last = min(first + BLOCK, T)
            oldest = 0 if window is None else max(0, first - window + 1) // 8 * 8  # 8: 16 bytes of bf16
            yield slice(start + first, start + last), slice(start + oldest, start + last)
        start += T


def flat(x: Tensor) -> Tensor:
    """(K, Q, G, D) -> (K, Q * G, D), the same memory"""
    return x.view(x.size(0), -1, x.size(-1))


def capped(
    scores: Tensor, G: int, scale: float, softcap: float | None, window: int | None
) -> tuple[Tensor, Tensor]:
    """(Z in fp32 with -inf where a query may not look, tanh of the cap): scores (K, Q * G, T)."""
    rows, T = scores.shape[1:]
    query = torch.arange(rows, device=scores.device)[:, None] // G + T - rows // G  # its place among the keys
    key = torch.arange(T, device=scores.device)
    seen = key <= query if window is None else (key <= query) & (key > query - window)
    Z = scores.float() * scale
    tanh = torch.tanh(Z / softcap) if softcap else torch.zeros_like(Z)
    return torch.where(seen, tanh * softcap if softcap else Z, -torch.inf), tanh


def softmax_of_scores(scores: Tensor, *how) -> tuple[Tensor, Tensor]:
    """(P in the scores' dtype, log of its normaliser (K, Q * G, 1) in fp32)"""
    Z, _ = capped(scores, *how)
    lse = Z.logsumexp(-1, keepdim=True)
    return (Z - lse).exp().to(scores.dtype), lse


def softmax_backward(
    scores: Tensor, dP: Tensor, lse: Tensor, delta: Tensor, G, scale, *how
) -> tuple[Tensor, Tensor]:
    """(P, gradient of Q K^T), both (K, Q * G, T) in the scores' dtype"""
    Z, tanh = capped(scores, G, scale, *how)
    P = (Z - lse).exp()
    dS = P * (dP.float() - delta) * (1 - tanh * tanh) * scale
    return P.to(scores.dtype), dS.to(scores.dtype)


def fused(function: Callable) -> Callable:
    """`function` of scores and the like, compiled for any number of queries and keys; on a CPU, as it is."""

    def run(scores: Tensor, *arguments):
        if not scores.is_cuda:
            return function(scores, *arguments)
        tensors = [x for x in (scores, *arguments) if isinstance(x, Tensor)]
        return compiled(function, *arguments[len(tensors) - 1 :])(tensors)

    return run


@functools.cache
def compiled(function: Callable, *settings) -> Callable:
    """function(*tensors, *settings), with one graph for all sizes of the tensors' dimensions 1 and 2."""
    region, marked = torch.compile(function), []

    def run(tensors: list[Tensor]):
        if not marked:  # the marks count when it is compiled, and cost time at each later call
            marked.append(True)
            for tensor in tensors:
                torch._dynamo.mark_dynamic(tensor, [dim for dim in (1, 2) if tensor.size(dim) > 1])
        return region(*tensors, *settings)

    return run

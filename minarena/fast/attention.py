"""Causal attention over packed rows: no padding, each row attends to itself alone.

    Z = softcap * tanh(scale * Q K^T / softcap)      without a cap: scale * Q K^T
    O = softmax(Z over the keys at or before a query) V

Gemma-2 caps its attention logits (https://arxiv.org/abs/2408.00118, section 2.2), and PyTorch's fused kernels
have no cap. So there are three implementations: `plain`, a row at a time, is the definition and runs
anywhere; `flash` is PyTorch's own and has no cap; softcap_kernels.py has one. What none of them does: dropout
on the probabilities (no model here has it), attention in both directions, a cache for generating text.
"""

import torch
from torch import Tensor


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[int],
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """q (N, H, G, D), k and v (N, H, D) -> (N, H, G, D)

    N tokens of all rows one after the other, H heads of keys, G heads of queries to each. lengths: tokens of
    each row, which sum to N. window: a query sees that many keys, itself included; None: all before it.
    """
    return torch.cat(
        [
            one_row(*row, scale, softcap, window)
            for row in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
        ]
    )


def one_row(
    q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, window: int | None
) -> Tensor:
    """`plain` for a row of T tokens: q (T, H, G, D), k and v (T, H, D); (H, G, T, T) scores are kept."""
    scores = torch.einsum("qhgd,thd->hgqt", q, k).float() * scale
    Z = softcap * torch.tanh(scores / softcap) if softcap else scores
    place = torch.arange(len(q), device=q.device)
    distance = place[:, None] - place  # from a query back to a key
    hidden = (distance < 0) | (distance >= window) if window else distance < 0
    P = Z.masked_fill(hidden, -torch.inf).softmax(-1).to(v.dtype)
    return torch.einsum("hgqt,thd->qhgd", P, v)


def flash(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int, scale: float, window: int | None
) -> Tensor:
    """`plain` without a cap, by PyTorch's packed flash attention (bf16 or fp16 on a GPU).

    ends (B + 1,) int32 or longer, on the device: 0 and the running sum of the rows' tokens. longest: an upper
    bound of the tokens of a row.
    """
    from torch.nn.attention.varlen import varlen_attn

    N, H, G, D = q.shape
    k, v = (x.unsqueeze(2).expand(N, H, G, D).reshape(N, H * G, D) for x in (k, v))
    rows = (ends, ends, longest, longest)
    left = -1 if window is None else window - 1  # keys before a query's own
    out = varlen_attn(q.reshape(N, H * G, D), k, v, *rows, scale=scale, window_size=(left, 0))
    return out.view(N, H, G, D)

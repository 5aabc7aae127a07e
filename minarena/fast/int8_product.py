"""Int8 activations times int8 weights, with LoRA and the outlier columns beside them, for the fast path.

    Y = (q W^T) * scale of q's rows * scale of W's rows  +  [x_outliers | u] [W_outliers | B]^T

The first product is of int8 and sums integers; the second one is of bf16 and rides in the first one's
epilogue, so Y is written once. Both are one operator, `minarena::int8_product`: a kernel on a GPU
(int8_kernels.py), plain PyTorch elsewhere. Rounding is plain PyTorch to be compiled: the compiler writes it
into the kernels that produce the activations. The numbers are those of int8.RoundedProduct.
"""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional as F

from minarena.fast.packing import round_up
from minarena.int8 import dequantized, round_rows

SIDE_MULTIPLE = 32  # columns of the second product's tiles


# torch.library.custom_op would be shorter, and costs the host 30 microseconds a call, 462 times a micro-batch
FACTORS = "Tensor q, Tensor scale, Tensor W"
torch.library.define(
    "minarena::int8_product",
    f"({FACTORS}, Tensor W_scale, Tensor side_x, Tensor side_W, int[] widths) -> Tensor",
)
torch.library.define("minarena::int8_gradient", f"({FACTORS}, Tensor like) -> Tensor")
int8_product, int8_gradient = torch.ops.minarena.int8_product, torch.ops.minarena.int8_gradient


@torch.library.impl("minarena::int8_product", "cpu")
def plain_product(
    q: Tensor, scale: Tensor, W: Tensor, W_scale: Tensor, side_x: Tensor, side_W: Tensor, widths: list[int]
) -> Tensor:
    """(N, out) in side_x's dtype: q (N, in) int8, scale (N,), W (out, in) int8, W_scale (out,).

    side_W (out, S); side_x (N, S), or one such block for each of `widths`, side by side: the columns of Y
    that the first width counts are multiplied with the first block, and so on. The widths sum to out.
    """
    y = F.linear(q.float(), W.float()) * scale.unsqueeze(1) * W_scale
    S = side_W.size(1)
    blocks = side_x.split(S, dim=1) if S and side_x.size(1) > S else [side_x] * len(widths)
    parts = zip(blocks, side_W.split(widths), strict=True)
    return (y + torch.cat([F.linear(x.float(), part.float()) for x, part in parts], dim=1)).to(side_x.dtype)


@torch.library.impl("minarena::int8_product", "cuda")
def product_on_gpu(q, scale, W, W_scale, side_x, side_W, widths):
    from minarena.fast.int8_kernels import launch_  # Triton comes with PyTorch for GPUs only

    y = side_x.new_empty(q.size(0), W.size(0))
    launch_(y, q, scale, W, W_scale, side_x, side_W, widths)
    return y


@torch.library.register_fake("minarena::int8_product")
def _(q, scale, W, W_scale, side_x, side_W, widths):
    return side_x.new_empty(q.size(0), W.size(0))


@torch.library.impl("minarena::int8_gradient", "cpu")
def plain_gradient(q: Tensor, scale: Tensor, W: Tensor, like: Tensor) -> Tensor:
    """(q W) * scale of q's rows, (N, in) in the dtype of `like`: q (N, out) int8, scale (N,), W (out, in).

    The tensor cores multiply int8 only where both factors run along the sum, so a GPU makes a copy W^T for
    each product: 1 % of a step at 9B, where copies that are kept would take 8.3 GB. The operator makes it,
    not its caller: the compiler would do so in the forward, and keep it.
    """
    return ((q.float() @ W.float()) * scale.unsqueeze(1)).to(like.dtype)


@torch.library.impl("minarena::int8_gradient", "cuda")
def gradient_on_gpu(q, scale, W, like):
    from minarena.fast.int8_kernels import launch_, transpose

    y = like.new_empty(q.size(0), W.size(1))
    launch_(y, q, scale, transpose(W), None, None, None, [W.size(1)])
    return y


@torch.library.register_fake("minarena::int8_gradient")
def _(q, scale, W, like):
    return like.new_empty(q.size(0), W.size(1))


class RoundedLoraProduct(torch.autograd.Function):
    """`rounded_product` and its gradients: of x through int8, of u and B in their own dtype."""

    @staticmethod
    def forward(ctx, x, u, B, CB, SCB, columns, rounded, outliers, widths):
        ctx.save_for_backward(u, B, CB, SCB)
        ctx.widths = widths
        return rounded_product(x, u, B, CB, SCB, columns, rounded, outliers, widths)

    @staticmethod
    def backward(ctx, *grads):
        u, B, CB, SCB = ctx.saved_tensors
        widths = ctx.widths
        parts = CB.split(widths), SCB.split(widths), B.split(widths), u.split(B.size(1), dim=1)
        dx, du, dB = [], [], []
        for grad, W, scales, B_part, u_part in zip(grads, *parts, strict=True):
            q, scale = round_rows(grad.float() * (scales / 127))
            dx.append(int8_gradient(q, scale, W, grad))
            du.append(grad @ B_part)
            dB.append(grad.T @ u_part)
        # reduce, not sum(): fused_linear.py
        return reduce(torch.add, dx), torch.cat(du, dim=1), torch.cat(dB), *[None] * 6


def rounded_product(
    x: Tensor,
    u: Tensor,
    B: Tensor,
    CB: Tensor,
    SCB: Tensor,
    columns: Tensor,
    rounded: Tensor,
    outliers: Tensor,
    widths: list[int],
) -> Sequence[Tensor]:
    """x (N, in), u (N, n R) of n projections, B (out, R) -> (N, width) for each width; int8.RoundedProduct.

    R = 0: no LoRA, and u has no columns either.
    """
    q, scale = round_rows(x, rounded)
    R, spared = B.size(1), x[:, columns]
    W_spared, used = dequantized(outliers, SCB, x.dtype), len(columns) + R
    fill = round_up(used, SIDE_MULTIPLE) - used
    blocks = u.split(R, dim=1) if R else [u]
    side_x = torch.cat([t for block in blocks for t in (spared, block, x.new_zeros(len(x), fill))], dim=1)
    side_W = torch.cat([W_spared, B, B.new_zeros(len(B), fill)], dim=1)
    return int8_product(q, scale, CB, SCB / 127, side_x, side_W, widths).split(widths, dim=1)

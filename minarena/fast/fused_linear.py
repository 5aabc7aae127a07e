"""An int8 weight and LoRA as one product, for the fast path: [x | u] [W | B]^T with u = dropout(x) A^T.

Written in plain PyTorch to be compiled. The compiler dequantizes, drops and concatenates in the kernels that
write the product's two matrices; the product itself is a library's. Kept for the backward: the int8 weights,
x and u.
"""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minarena.fast.int8_product import RoundedLoraProduct, rounded_product
from minarena.int8 import Int8Linear, dequantized
from minarena.lora import LoRALinear


def project(
    linears: Sequence[nn.Module], base: Int8Linear, x: Tensor, seed: Tensor | None
) -> Sequence[Tensor]:
    """x (N, in) -> one (N, out) for each projection in `linears`, which share the input x.

    base: the weights of all of them as one matrix (fuse_weights_). seed: () int32 on the device, for
    dropout's mask; None where nothing is dropped. One dropout mask serves all projections of an input, as in
    the LoRA authors' own code (https://github.com/microsoft/LoRA, MergedLinear): x is read once, and all A
    are one product.
    """
    first, widths = linears[0], [base_of(linear).out_features for linear in linears]
    if base.columns is not None:
        outputs = project_rounded(linears, base, x, seed, widths)
    elif not isinstance(first, LoRALinear):  # a layer below --freeze-layers
        outputs = F.linear(x, dequantized(base.weight, base.SCB, x.dtype)).split(widths, dim=1)
    else:
        B = torch.block_diag(*(linear.lora_B.weight for linear in linears)).to(x.dtype)  # (out, n R)
        if torch.is_grad_enabled():
            u = lora_input(linears, x, seed)
            outputs = FusedLoraProduct.apply(x, u, base.weight, base.SCB, B, widths)
        else:  # no gradient needed: merge LoRA into W; that costs as much as a few dozen tokens
            W = dequantized(base.weight, base.SCB, torch.float32) + B @ scaled_A(linears, x.dtype)
            outputs = F.linear(x, W.to(x.dtype)).split(widths, dim=1)
    if base.bias is None:
        return outputs
    return [y + bias.to(y.dtype) for y, bias in zip(outputs, base.bias.split(widths), strict=True)]


def project_rounded(
    linears: Sequence[nn.Module], base: Int8Linear, x: Tensor, seed: Tensor | None, widths: list[int]
) -> Sequence[Tensor]:
    """`project` where the base rounds its inputs to int8, too; the bias is the caller's."""
    weights = base.weight, base.SCB, base.columns, base.rounded, base.outliers
    if not isinstance(linears[0], LoRALinear):
        return rounded_product(x, x[:, :0], x.new_empty(sum(widths), 0), *weights, widths)
    B = torch.cat([linear.lora_B.weight for linear in linears]).to(x.dtype)  # (out, R)
    u = lora_input(linears, x, seed)
    if torch.is_grad_enabled():
        return RoundedLoraProduct.apply(x, u, B, *weights, widths)
    return rounded_product(x, u, B, *weights, widths)


def lora_input(linears: Sequence[LoRALinear], x: Tensor, seed: Tensor | None) -> Tensor:
    """u = dropout(x) A^T of n projections, (N, n R), in x's dtype; x (N, in). seed: of `project`."""
    dropped = x if seed is None else hash_dropout(x, linears[0].dropout.p, seed)
    return F.linear(dropped, scaled_A(linears, x.dtype))


def scaled_A(linears: Sequence[LoRALinear], dtype: torch.dtype) -> Tensor:
    """All A times LoRA's scaling, (n R, in)."""
    return (torch.cat([linear.lora_A.weight for linear in linears]) * linears[0].scaling).to(dtype)


def hash_dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Dropout: each element of x is 0 with probability p, else divided by 1 - p; seed () int32.

    The mask is a hash of (seed, the element's number). It needs no memory, and costs a few operations in the
    kernel that reads x, forward and backward; the compiler's own dropout draws each number with ten rounds of
    Philox. The hash is lowbias32 of https://github.com/skeeto/hash-prospector.
    """
    h = torch.arange(x.numel(), dtype=torch.int32, device=x.device).view(x.shape)
    h = h * (2 * seed + 1) ^ seed  # so that no two seeds have masks that are shifted copies
    h = (h ^ (h >> 16 & 0xFFFF)) * 0x7FEB352D
    h = (h ^ (h >> 15 & 0x1FFFF)) * (0x846CA68B - 2**32)
    h = h ^ (h >> 16 & 0xFFFF)
    return torch.where((h & 0x7FFFFFFF) >= int(p * 2**31), x / (1 - p), 0.0)


class FusedLoraProduct(torch.autograd.Function):
    """x W^T + u B^T as one product, [x | u] [W | B]^T; the gradients of x and u are one product, too.

    x (N, in), u (N, R), CB (out, in) int8 and SCB (out,) of W, B (out, R); returns (N, width) for each of the
    widths, which sum to out. LoRA as a product of its own would be another pass over the largest tensors of a
    layer. The backward does not concatenate the outputs' gradients, which would be one more pass: each has
    its own product, and these are rounded before they are added. Kept for the backward: int8, never W.
    """

    @staticmethod
    def forward(ctx, x, u, CB, SCB, B, widths):
        ctx.save_for_backward(u, CB, SCB, B)
        ctx.widths = widths
        return F.linear(torch.cat([x, u], dim=1), concat_wb(CB, SCB, B)).split(widths, dim=1)

    @staticmethod
    def backward(ctx, *grads):
        u, CB, SCB, B = ctx.saved_tensors
        parts = zip(CB.split(ctx.widths), SCB.split(ctx.widths), B.split(ctx.widths), strict=True)
        # not sum(): its start value 0 is one more addition for the compiler to write
        both = reduce(torch.add, (grad @ concat_wb(*part) for grad, part in zip(grads, parts, strict=True)))
        dx, du = both.split([CB.size(1), B.size(1)], dim=1)
        return dx, du, None, None, torch.cat([grad.T @ u for grad in grads]), None


def concat_wb(CB: Tensor, SCB: Tensor, B: Tensor) -> Tensor:
    """[W | B] (out, in + R) in B's dtype; the compiler writes it in one pass."""
    return torch.cat([dequantized(CB, SCB, B.dtype), B], dim=1)


def base_of(linear: nn.Module) -> nn.Module:
    return linear.base_layer if isinstance(linear, LoRALinear) else linear


def fuse_weights_(linears: Sequence[nn.Module]) -> Int8Linear:
    """One matrix of the int8 weights of projections that share an input.

    Their own weights become views of it.
    """
    bases = [base_of(linear) for linear in linears]
    bias = None if bases[0].bias is None else torch.cat([base.bias for base in bases])
    CB, SCB = (torch.cat([getattr(base, name) for base in bases]) for name in ("weight", "SCB"))
    both, start = Int8Linear(CB, SCB, bias), 0
    both.round_inputs_(bases[0].columns)  # one input, so the same columns
    for base in bases:
        part = slice(start, start + base.out_features)
        base.weight, base.SCB = both.weight[part], both.SCB[part]
        start += base.out_features
    return both

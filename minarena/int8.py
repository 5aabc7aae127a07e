"""bitsandbytes' int8 weights, multiplied by their dequantized values, or as the int8 that they are.

    W = CB * (SCB / 127)        CB (out, in) int8, SCB (out,) fp32: the largest |w| of each row

The format is LLM.int8's (Dettmers et al. 2022, https://arxiv.org/abs/2208.07339), which bitsandbytes reads
and writes. The product is another one: LLM.int8 also rounds the activations to int8 in each linear, looks for
outliers and waits for the GPU to tell how many there are. Dequantizing is simpler and closer to the float
model (relative error of SmolLM2's last hidden state: 5.2 % against 12-13 %).

The second product here (--matmul int8) rounds the activations as well, but its outlier columns are fixed
(files/outliers.py): nothing is looked for, nothing waits. RoundedProduct defines that product in PyTorch;
fast/int8_product.py has the kernels that make it fast.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) floats -> CB (out, in) int8, SCB (out,) fp32, by bitsandbytes' kernel.

    From fp16, as in bitsandbytes (bitsandbytes/nn/modules.py, Int8Params._quantize): values above fp16's
    65,504 give infinite scales.
    """
    import bitsandbytes as bnb

    return bnb.functional.int8_vectorwise_quant(weight.contiguous().to(torch.float16))[:2]


def dequantize(CB: Tensor, SCB: Tensor, dtype: torch.dtype) -> Tensor:
    """(out, in) weights in `dtype`, multiplied in fp32 and rounded once.

    With a scale rounded to bf16 first, each whole row would be off by up to 0.4 %.
    """
    return torch.mul(CB, (SCB / 127).unsqueeze(1), out=torch.empty(CB.shape, dtype=dtype, device=CB.device))


def dequantized(CB: Tensor, SCB: Tensor, dtype: torch.dtype) -> Tensor:
    """`dequantize` in a form that torch.compile fuses: nothing in fp32 is written to memory."""
    return (CB * (SCB / 127).unsqueeze(1)).to(dtype)


class DequantizedProduct(torch.autograd.Function):
    """x W^T, which keeps only the int8 weights for the backward.

    x (..., in), CB (out, in) int8 and SCB (out,) fp32 of W; returns (..., out) in x's dtype. Autograd on its
    own would keep every layer's dequantized copy: 16.6 GB at 9B. W is frozen, so only x gets a gradient.
    """

    @staticmethod
    def forward(ctx, x: Tensor, CB: Tensor, SCB: Tensor) -> Tensor:
        ctx.save_for_backward(CB, SCB)
        return F.linear(x, dequantize(CB, SCB, x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        CB, SCB = ctx.saved_tensors
        return grad @ dequantize(CB, SCB, grad.dtype), None, None


def round_rows(x: Tensor, rounded: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x (N, in) -> int8 (N, in) and a scale for each row, (N,) fp32: x is nearly int8 * scale.

    rounded (in,) bool: the columns where it is False are 0 in the result, and do not count in
    the row's scale. A row with a number that is not finite gets a scale that is not.
    """
    x = x.float() if rounded is None else torch.where(rounded, x.float(), 0.0)
    largest = x.abs().amax(dim=1).clamp(min=1e-30)  # not 0: a row of zeros is rounded to zeros
    return (x * (127 / largest).unsqueeze(1)).round().to(torch.int8), largest / 127


class RoundedProduct(torch.autograd.Function):
    """x W^T with x (N, in) rounded to int8 row by row, except its outlier columns, which keep x's dtype.

    The gradient of x is (dY * scale of W's rows) W, the first factor rounded to int8 row by row; it has no
    outlier columns. Rounding itself counts as the identity. Products of int8 are sums of integers: fp32 has
    them exactly up to 2^24, and to seven digits beyond.

    columns (k,): numbers of the outlier columns; rounded (in,) bool: all others; outliers (out, k) int8: CB's
    columns of them.
    """

    @staticmethod
    def forward(ctx, x, CB, SCB, columns, rounded, outliers):
        ctx.save_for_backward(CB, SCB)
        q, scale = round_rows(x, rounded)
        with torch.autocast(x.device.type, enabled=False):
            y = F.linear(q.float(), CB.float()) * scale.unsqueeze(1) * (SCB / 127)
            y += F.linear(x[:, columns].float(), dequantize(outliers, SCB, x.dtype).float())
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        CB, SCB = ctx.saved_tensors
        q, scale = round_rows(grad.float() * (SCB / 127))
        with torch.autocast(grad.device.type, enabled=False):
            dx = (q.float() @ CB.float()) * scale.unsqueeze(1)
        return dx.to(grad.dtype), None, None, None, None, None


class Int8Linear(nn.Module):
    """A frozen linear over bitsandbytes' int8 weights: x (..., in) -> (..., out).

    Computes in autocast's dtype where autocast is on, else in x's own. columns: None multiplies by
    dequantized weights; after `round_inputs_` they are the columns that RoundedProduct does not round.
    """

    def __init__(self, CB: Tensor, SCB: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = CB.shape
        self.register_buffer("weight", CB)
        self.register_buffer("SCB", SCB)
        self.register_buffer("bias", bias)
        self.round_inputs_(None)

    def round_inputs_(self, columns: Tensor | None) -> None:
        """Multiply by RoundedProduct from now on, with these outlier columns; None: dequantized again."""
        rounded = outliers = None
        if columns is not None:
            rounded = torch.ones(self.in_features, dtype=torch.bool, device=columns.device)
            rounded[columns] = False
            outliers = self.weight[:, columns].contiguous()
        for name, value in {"columns": columns, "rounded": rounded, "outliers": outliers}.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        if self.columns is None:
            y = DequantizedProduct.apply(x.to(dtype), self.weight, self.SCB)
        else:
            flat = x.to(dtype).reshape(-1, self.in_features)
            y = RoundedProduct.apply(
                flat, self.weight, self.SCB, self.columns, self.rounded, self.outliers
            ).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(dtype)


def stored_int8(linear: nn.Module) -> tuple[Tensor, Tensor]:
    """(CB, SCB) of a bitsandbytes Linear8bitLt: in `weight` before its first forward, in `state` after."""
    if linear.state.CB is not None:
        return linear.state.CB, linear.state.SCB
    return linear.weight.data, linear.weight.SCB


def use_dequantized_(model: nn.Module) -> int:
    """Replace each Linear8bitLt by an Int8Linear over the same memory; returns their number."""
    import bitsandbytes as bnb

    found = [(name, m) for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear8bitLt)]
    for name, module in found:
        parent, _, leaf = name.rpartition(".")
        bias = None if module.bias is None else module.bias.data
        setattr(model.get_submodule(parent), leaf, Int8Linear(*stored_int8(module), bias))
    return len(found)

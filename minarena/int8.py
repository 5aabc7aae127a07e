"""bitsandbytes' int8 weights, multiplied by their dequantized values.

    W = CB * (SCB / 127)        CB (out, in) int8, SCB (out,) fp32: the largest |w| of each row

The format is LLM.int8's (Dettmers et al. 2022, https://arxiv.org/abs/2208.07339), which bitsandbytes reads
and writes. The product is another one: LLM.int8 also rounds the activations to int8 in each linear, looks for
outliers and waits for the GPU to tell how many there are. Dequantizing is simpler, faster in training and
closer to the float model (relative error of SmolLM2's last hidden state: 5.2 % against 12-13 %). What it does
not use: int8 tensor cores.
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


class DequantizedProduct(torch.autograd.Function):
    """x W^T, which keeps only the int8 weights for the backward.

    Autograd on its own would keep every layer's dequantized copy: 16.6 GB at 9B. W is frozen, so only x gets
    a gradient.
    """

    @staticmethod
    def forward(ctx, x: Tensor, CB: Tensor, SCB: Tensor) -> Tensor:
        ctx.save_for_backward(CB, SCB)
        return F.linear(x, dequantize(CB, SCB, x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        CB, SCB = ctx.saved_tensors
        return grad @ dequantize(CB, SCB, grad.dtype), None, None


class Int8Linear(nn.Module):
    """A frozen linear over bitsandbytes' int8 weights: x (..., in) -> (..., out).

    Computes in autocast's dtype where autocast is on, else in x's own.
    """

    def __init__(self, CB: Tensor, SCB: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = CB.shape
        self.register_buffer("weight", CB)
        self.register_buffer("SCB", SCB)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        y = DequantizedProduct.apply(x.to(dtype), self.weight, self.SCB)
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

"""AdamW over everything that is trained, as one or two flat vectors, and its learning rate at each step.

What it does not do: decide when a step is taken, or clip gradients (step.py).
"""

import math

import torch
from torch import nn


def lr_at(step: int, steps: int, peak: float, warmup_ratio: float) -> float:
    """Learning rate of optimiser step `step` (from 0) of `steps`: linear from 0 to `peak`, then linear to 0.

    The same numbers as transformers' get_linear_schedule_with_warmup, which the recipe used: with a warm-up,
    the very first step has lr 0.
    """
    warmup = math.ceil(steps * warmup_ratio)
    if step < warmup:
        return peak * step / warmup
    return peak * (steps - step) / max(1, steps - warmup)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def make_optimizer(model: nn.Module, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters, betas 0.9 / 0.999, eps 1e-8; vectors (biases) are not decayed.

    The lr is set at each step. On a GPU its state is 8-bit (Dettmers et al. 2021,
    https://arxiv.org/abs/2110.02861): 2 bytes a parameter, not 8. On a CPU it is torch's fused AdamW with
    fp32 state, which was 28 times faster there than bitsandbytes'.
    """
    parameters = trainable(model)
    matrices, vectors = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
    groups = [{"params": [flatten_parameters_(matrices)], "weight_decay": weight_decay}]
    if vectors:
        groups.append({"params": [flatten_parameters_(vectors)], "weight_decay": 0.0})
    if parameters[0].is_cuda:
        import bitsandbytes as bnb

        return bnb.optim.AdamW8bit(groups, lr=0.0)
    return torch.optim.AdamW(groups, lr=0.0, fused=True)


def flatten_parameters_(parameters: list[nn.Parameter]) -> nn.Parameter:
    """Copy the parameters into one flat vector and make each parameter, and its gradient, a view of it.

    optimizer.step, the gradient norm and zero_grad then launch one kernel each, not one per matrix (588 at
    9B). The views live because autograd adds in place to a gradient that is there:
    optimizer.zero_grad(set_to_none=False) keeps them; model.zero_grad() and model.to() would cut them.
    """
    flat = nn.Parameter(torch.cat([p.data.flatten() for p in parameters]))
    flat.grad = torch.zeros_like(flat)
    start = 0
    for p in parameters:
        part = slice(start, start + p.numel())
        p.data, p.grad = flat.data[part].view_as(p), flat.grad[part].view_as(p)
        start += p.numel()
    return flat

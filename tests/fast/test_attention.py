"""Attention over packed rows: the plain one. (The kernels of a GPU are compared with it in test_gpu.py.)

out = plain(q, k, v, lengths, scale, softcap, window)    q (N, H, G, D), k and v (N, H, D)

Compared with: transformers' eager Gemma-2 attention, a row at a time, forward and gradients.
"""

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from minarena.fast.attention import plain

H, G, D = 2, 3, 8  # heads of keys, heads of queries to each, head size
LENGTHS = [40, 8, 24, 56]


def drawn() -> list[torch.Tensor]:
    """q, k, v large enough for the cap to bite."""
    N = sum(LENGTHS)
    shapes = (N, H, G, D), (N, H, D), (N, H, D)
    return [(3 * torch.randn(shape)).requires_grad_() for shape in shapes]


def eager(q, k, v, scale, softcap, window) -> torch.Tensor:
    """(N, H, G, D), each row by itself."""
    module = torch.nn.Module()
    module.num_key_value_groups = G
    outs, start = [], 0
    for T in LENGTHS:
        row = slice(start, start + T)
        heads = [x[row].flatten(1, -2).transpose(0, 1)[None] for x in (q, k, v)]  # (1, heads, T, D)
        distance = torch.arange(T)[:, None] - torch.arange(T)
        hidden = (distance < 0) | (distance >= (window or T))
        mask = torch.zeros(T, T).masked_fill(hidden, -torch.inf)
        out, _ = eager_attention_forward(module, *heads, mask, scaling=scale, softcap=softcap)
        outs.append(out[0].view(T, H, G, D))
        start += T
    return torch.cat(outs)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 5, 16])
def test_output_and_gradients_are_those_of_eager_attention_row_by_row(softcap, window):
    inputs = drawn()
    ours = plain(*inputs, LENGTHS, 0.3, softcap, window)
    theirs = eager(*inputs, 0.3, softcap, window)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    weights = torch.randn_like(ours)
    wanted = torch.autograd.grad((theirs * weights).sum(), inputs)
    for mine, other in zip(torch.autograd.grad((ours * weights).sum(), inputs), wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_cap_and_window_change_the_output():
    inputs, settings = drawn(), ((None, None), (2.0, None), (None, 5))
    free, capped, near = (plain(*inputs, LENGTHS, 0.3, *how) for how in settings)
    assert (free - capped).abs().max() > 0.5 and (free - near).abs().max() > 0.5

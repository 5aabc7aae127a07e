"""Attention over packed rows, one block of queries at a time.

out = packed_attention(q, k, v, lengths, ends, scale, softcap, window)    q (N, K, G, D), k and v (N, K, D)

Compared with: transformers' eager Gemma-2 attention, a row at a time, forward and gradients.
"""

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from minarena import attention
from minarena.attention import packed_attention

K, G, D = 2, 3, 8  # heads of keys, heads of queries to each, head size
LENGTHS = [40, 8, 24, 56]


@pytest.fixture(params=[8, 16, 1024], ids=lambda block: f"block {block}")
def block(request, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", request.param)


def drawn() -> list[torch.Tensor]:
    """q, k, v large enough for the cap to bite."""
    N = sum(LENGTHS)
    shapes = (N, K, G, D), (N, K, D), (N, K, D)
    return [(3 * torch.randn(shape)).requires_grad_() for shape in shapes]


def eager(q, k, v, scale, softcap, window) -> torch.Tensor:
    """(N, K, G, D), each row by itself."""
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
        outs.append(out[0].view(T, K, G, D))
        start += T
    return torch.cat(outs)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 5, 16])
def test_output_and_gradients_are_those_of_eager_attention_row_by_row(block, softcap, window):
    inputs = drawn()
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    ours = packed_attention(*inputs, LENGTHS, ends, 0.3, softcap, window)
    theirs = eager(*inputs, 0.3, softcap, window)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    weights = torch.randn_like(ours)
    wanted = torch.autograd.grad((theirs * weights).sum(), inputs)
    for mine, other in zip(torch.autograd.grad((ours * weights).sum(), inputs), wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_cap_and_window_change_the_output():
    inputs, ends = drawn(), torch.tensor([0, *LENGTHS]).cumsum(0).int()
    plain, capped, near = (
        packed_attention(*inputs, LENGTHS, ends, 0.3, *how) for how in ((None, None), (2.0, None), (None, 5))
    )
    assert (plain - capped).abs().max() > 0.5 and (plain - near).abs().max() > 0.5


def test_blocks_cover_every_pair_that_a_query_may_see_and_nothing_after_it(block):
    for window in (None, 5, 16):
        seen = torch.zeros(sum(LENGTHS), sum(LENGTHS), dtype=torch.bool)
        for queries, keys in attention.blocks(LENGTHS, window):
            assert keys.stop == queries.stop and (queries.stop - queries.start) <= attention.BLOCK
            seen[queries, keys] = True
        start = 0
        for T in LENGTHS:
            row = slice(start, start + T)
            assert not seen[row, : row.start].any() and not seen[row, row.stop :].any()
            distance = torch.arange(T)[:, None] - torch.arange(T)
            assert seen[row, row][(distance >= 0) & (distance < (window or T))].all()
            start += T

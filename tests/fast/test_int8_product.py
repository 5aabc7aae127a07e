"""--matmul int8 on the fast path, on a CPU: the operator's plain form, and the layers around it.

int8_product(q, scale, W, W_scale, side_x, side_W, widths)     q W^T with its scales, and a second product
project([q_proj, k_proj, v_proj], base, x, seed)               one (N, out) each; int8 where base has columns

Compared with: products in float64, and the reference path in the same int8 numbers (int8.RoundedProduct).
What only a GPU can show is in test_int8_gpu.py.
"""

import functools

import numpy as np
import pytest
import torch
from bases import FAMILIES, write_base
from helpers import adapted
from test_path import LABELS, ROWS, assert_same, results, uncompiled  # noqa: F401 (a fixture)

from minarena.fast import path
from minarena.fast.fused_linear import base_of
from minarena.fast.int8_product import int8_gradient, int8_product
from minarena.fast.path import use_fast_path_, why_not
from minarena.files.outliers import outlier_columns, use_columns_


def integers(*shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


@pytest.mark.parametrize("S, several", [(0, False), (32, False), (32, True)])
def test_the_product_and_its_gradient_are_float64s(S, several):
    widths, N, in_features = [24, 8, 16], 11, 40
    q, W, scale, W_scale = integers(N, in_features), integers(48, in_features), torch.rand(N), torch.rand(48)
    side_x, side_W = torch.randn(N, (3 if several else 1) * S), torch.randn(48, S)
    wanted = (q.double() @ W.double().T) * scale.double()[:, None] * W_scale.double()
    start = 0
    for i, width in enumerate(widths):
        block = side_x[:, i * S : (i + 1) * S] if several else side_x
        part = slice(start, start + width)
        wanted[:, part] += block.double() @ side_W[part].double().T
        start += width
    got = int8_product(q, scale, W, W_scale, side_x, side_W, widths)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-3)
    g = integers(N, 48)
    wanted = (g.double() @ W.double()) * scale.double()[:, None]
    got = int8_gradient(g, scale, W, side_x)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-3)


@pytest.fixture(params=FAMILIES)
def model(request, tmp_path):
    changes = dict(initializer_range=1.0) if request.param == "gemma2" else {}
    model, _ = adapted(write_base(request.param, tmp_path, **changes))
    use_columns_(model.model, outlier_columns(model.model, ROWS[:2], 4))
    return model


def test_the_fast_path_has_the_references_int8_numbers(model):
    """Logits, loss and gradients, to seven digits: nothing may be rounded otherwise, or twice."""
    wanted = results(model, 10_000)
    use_columns_(model.model, None)
    exact = results(model, 10_000)
    assert not np.allclose(exact[0], wanted[0], atol=1e-5)  # else nothing was rounded
    use_columns_(model.model, outlier_columns(model.model, ROWS[:2], 4))
    use_fast_path_(model)
    assert all(layer.mlp.fused.columns is not None for layer in model.model.layers)
    for budget in (100, 10_000):
        assert_same(results(model, budget), wanted)


def test_layers_without_lora_and_layers_that_are_recomputed_have_them_too(model, request):
    wanted = results(model, 10_000)
    use_fast_path_(model)
    assert_same(results(model, 100, recomputed=2), wanted)


def test_frozen_layers_have_the_references_int8_numbers(tmp_path):
    model, _ = adapted(write_base("qwen2", tmp_path), freeze_layers=1)
    use_columns_(model.model, outlier_columns(model.model, ROWS[:2], 4))
    wanted = results(model, 10_000)
    use_fast_path_(model)
    assert_same(results(model, 100), wanted)


def test_the_compiler_traces_a_whole_layer_and_gets_the_same_numbers(tmp_path, monkeypatch):
    traced = functools.cache(lambda region: torch.compile(region, backend="aot_eager", fullgraph=True))
    model, _ = adapted(write_base("qwen2", tmp_path))
    use_columns_(model.model, outlier_columns(model.model, ROWS[:2], 4))
    wanted = results(model, 10_000)
    monkeypatch.setattr(path, "fused_region", traced)
    use_fast_path_(model)
    assert_same(results(model, 100), wanted)


def test_the_path_is_refused_where_a_gpu_could_not_multiply(tmp_path, monkeypatch):
    """Sides of 56 and 100: a descriptor's rows are multiples of 16 bytes."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(path, "find_spec", lambda _: True)
    model, _ = adapted(write_base("llama", tmp_path))
    monkeypatch.setattr(type(model.model), "device", torch.device("cuda"))
    assert why_not(model.model, torch.bfloat16) == ""
    use_columns_(model.model, outlier_columns(model.model, ROWS[:2], 4))
    assert "multiples of 16" in why_not(model.model, torch.bfloat16)
    assert base_of(model.model.layers[0].mlp.down_proj).columns is not None
    assert len(LABELS) == len(ROWS)

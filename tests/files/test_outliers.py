"""--matmul int8 in plain PyTorch: activations rounded row by row, but for a few columns of each input.

q, scale = round_rows(x, rounded)          x (N, in) is nearly q * scale, q int8
linear.round_inputs_(columns)              an Int8Linear multiplies int8 by int8 from then on
columns = outlier_columns(backbone, rows)  for each Int8Linear the columns that it does not round
hidden_error(backbone, rows, columns)      what rounding changes in the last hidden state

Compared with: naive loops and products in float64.
"""

import numpy as np
import pytest
import torch
from bases import FAMILIES, write_base
from helpers import CPU

from minarena.files.base import load_backbone
from minarena.files.outliers import (
    LARGEST_ERROR,
    columns_fingerprint,
    hidden_error,
    int8_linears,
    outlier_columns,
    use_columns_,
)
from minarena.int8 import Int8Linear, round_rows
from minarena.text import encode
from minarena.tiny import demo_pairs

ROWS = [np.random.default_rng(n).integers(4, 255, n, dtype=np.int32) for n in (37, 5, 64)]


def linear8(outs=24, ins=40, seed=0) -> Int8Linear:
    generator = torch.Generator().manual_seed(seed)
    CB = torch.randint(-127, 128, (outs, ins), generator=generator, dtype=torch.int8)
    return Int8Linear(CB, torch.rand(outs, generator=generator) + 0.1, torch.randn(outs, generator=generator))


def naive_rounding(row: np.ndarray) -> tuple[np.ndarray, float]:
    """Half to even, by the row's largest value, in float64."""
    largest = np.abs(row).max()
    return np.round(row / largest * 127), largest / 127


def test_each_row_is_rounded_by_its_own_largest_value():
    x = torch.randn(6, 40) * torch.logspace(-6, 6, 6).unsqueeze(1)
    q, scale = round_rows(x)
    for i, row in enumerate(x.double().numpy()):
        wanted, wanted_scale = naive_rounding(row)
        assert np.abs(q[i].numpy() - wanted).max() <= 1 and (q[i].numpy() != wanted).mean() < 0.05  # ties
        assert scale[i].item() == pytest.approx(wanted_scale, rel=1e-6)
    assert (q.abs().amax(1) == 127).all()  # -128, whose negative int8 has not, never occurs
    assert ((q * scale.unsqueeze(1) - x).abs() <= 0.5001 * scale.unsqueeze(1)).all()


def test_a_row_of_zeros_stays_one_and_a_bad_number_is_not_hidden():
    x = torch.zeros(3, 8)
    x[1, 2], x[2, 3] = torch.inf, torch.nan
    q, scale = round_rows(x)
    assert (q[0] == 0).all() and scale[0].isfinite()
    assert not scale[1:].isfinite().any()
    y = linear8(ins=8)
    y.round_inputs_(torch.tensor([0]))
    assert y(x)[0].isfinite().all() and not y(x)[1:].isfinite().any()


@pytest.mark.parametrize("columns", [[], [3], [0, 7, 39]])
def test_forward_and_backward_are_the_naive_ones(columns):
    linear = linear8()
    linear.round_inputs_(torch.tensor(columns, dtype=torch.int64))
    x = torch.randn(2, 9, 40)
    x[..., columns] *= 100
    x.requires_grad_()
    up = torch.randn(2, 9, 24)
    y = linear(x)
    y.backward(up)
    W = linear.weight.double().numpy() * (linear.SCB.double().numpy() / 127)[:, None]
    wanted, wanted_dx = np.zeros((18, 24)), np.zeros((18, 40))
    for i in range(18):
        row = x.detach().double().numpy().reshape(18, 40)[i].copy()
        spared = row[columns].copy()
        row[columns] = 0
        q, scale = naive_rounding(row)
        wanted[i] = q * scale @ W.T + spared @ W[:, columns].T + linear.bias.double().numpy()
        g = up.double().numpy().reshape(18, 24)[i] * (linear.SCB.double().numpy() / 127)
        q, scale = naive_rounding(g)
        wanted_dx[i] = q * scale @ linear.weight.double().numpy()
    assert np.linalg.norm(y.detach().reshape(18, 24).numpy() - wanted) < 1e-3 * np.linalg.norm(wanted)
    assert np.linalg.norm(x.grad.reshape(18, 40).numpy() - wanted_dx) < 1e-3 * np.linalg.norm(wanted_dx)
    exact = x.detach().double().reshape(18, 40).numpy() @ W.T + linear.bias.double().numpy()
    assert 1e-6 < np.linalg.norm(y.detach().reshape(18, 24).numpy() - exact) / np.linalg.norm(exact) < 0.05


def test_large_columns_spoil_a_row_unless_they_are_spared():
    linear, x = linear8(ins=64), torch.randn(50, 64)
    x[:, [5, 20]] *= 300
    exact = linear(x)
    error = {}
    for columns in ([], [5], [5, 20]):
        linear.round_inputs_(torch.tensor(columns, dtype=torch.int64))
        small = torch.ones(64, dtype=torch.bool)
        small[[5, 20]] = False
        part = torch.where(small, x, 0.0)  # what the small columns give, which is what is lost
        scale_of = (linear(x) - exact).norm() / torch.nn.functional.linear(part, linear.weight * 0.01).norm()
        error[len(columns)] = scale_of.item()
    assert error[2] < 0.1 * error[1] and error[1] < error[0] * 1.01
    linear.round_inputs_(None)
    assert torch.equal(linear(x), exact)


@pytest.fixture(params=FAMILIES)
def backbone(request, tmp_path):
    return load_backbone(write_base(request.param, tmp_path), CPU, torch.float32)


def test_the_columns_are_those_with_the_largest_values_and_one_input_has_one_choice(backbone):
    columns = outlier_columns(backbone, ROWS, 5)
    assert columns.keys() == int8_linears(backbone).keys() and len(columns) == 14
    seen = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, inputs, name=name: seen.setdefault(name, []).append(inputs[0][0])
        )
        for name, module in int8_linears(backbone).items()
    ]
    with torch.no_grad():
        for row in ROWS:
            backbone(input_ids=torch.tensor(row[None].astype(np.int64)), use_cache=False)
    for hook in hooks:
        hook.remove()
    for name, found in columns.items():
        largest = [max(abs(value) for value in column) for column in torch.cat(seen[name]).T.tolist()]
        wanted = sorted(range(len(largest)), key=lambda i: -largest[i])[:5]
        assert found.tolist() == sorted(wanted), name
    for layer in ("layers.0", "layers.1"):
        q, k, v = (columns[f"{layer}.self_attn.{kind}_proj"] for kind in "qkv")
        assert torch.equal(q, k) and torch.equal(q, v)
        assert torch.equal(columns[f"{layer}.mlp.gate_proj"], columns[f"{layer}.mlp.up_proj"])


def test_the_same_base_has_the_same_columns_whatever_it_multiplied_by_before(backbone):
    first = outlier_columns(backbone, ROWS, 5)
    assert columns_fingerprint(first) == columns_fingerprint(outlier_columns(backbone, ROWS, 5))
    use_columns_(backbone, outlier_columns(backbone, ROWS, 0))  # rounds everything, and moves values
    assert columns_fingerprint(outlier_columns(backbone, ROWS, 5)) == columns_fingerprint(first)
    assert columns_fingerprint(outlier_columns(backbone, ROWS, 4)) != columns_fingerprint(first)
    assert all(module.columns is None for module in int8_linears(backbone).values())


def test_the_guard_sees_a_base_whose_activations_cannot_be_rounded(tiny, tokenizer):
    backbone = load_backbone(tiny, CPU, torch.float32)
    rows = encode(tokenizer, demo_pairs(8, seed=0), 400)
    columns = outlier_columns(backbone, rows[:2])
    small = hidden_error(backbone, rows, columns)
    assert 0 < small < 0.05
    assert all(module.columns is None for module in int8_linears(backbone).values())
    with torch.no_grad():  # one column that drowns the others and gives nothing
        for layer in backbone.layers:
            layer.input_layernorm.weight[7] = 3000.0
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                linear.weight[:, 7] = 0
    none = {name: value[:0] for name, value in columns.items()}
    spoilt, spared = (hidden_error(backbone, rows, c) for c in (none, outlier_columns(backbone, rows[:2])))
    assert spared < 0.05 and spoilt > LARGEST_ERROR > 3 * spared

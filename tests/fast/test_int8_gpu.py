"""The int8 product on a GPU: its kernels, and a model that trains on them; skipped where there is none.

    python -m pytest -m gpu tests/fast/test_int8_gpu.py

Compared with: float64; int8.RoundedProduct, the same numbers in plain PyTorch in fp32 on the CPU.
"""

import numpy as np
import pytest
import torch
from bases import write_base
from helpers import adapted
from test_gpu import logits_and_gradient, on_gpu

from minarena.fast.blocks import BLOCKS
from minarena.fast.fused_linear import base_of
from minarena.fast.int8_product import int8_gradient, int8_product
from minarena.fast.path import use_fast_path_, why_not
from minarena.files.outliers import outlier_columns, use_columns_
from minarena.model import AdapterConfig
from minarena.text import encode
from minarena.tiny import demo_pairs, write_tiny

pytestmark = pytest.mark.gpu
# in, widths of the projections of an input: Gemma-2-9B, Gemma-3-270M, SmolLM2-135M (Llama), Qwen2.5-0.5B
SHAPES = {
    "gemma2 q k v": (3584, [4096, 2048, 2048]),
    "gemma2 o": (4096, [3584]),
    "gemma2 gate up": (3584, [14336, 14336]),
    "gemma2 down": (14336, [3584]),
    "gemma3 q k v": (640, [1024, 256, 256]),
    "gemma3 gate up": (640, [2048, 2048]),
    "llama q k v": (576, [576, 192, 192]),
    "llama gate up": (576, [1536, 1536]),
    "llama down": (1536, [576]),
    "qwen2 q k v": (896, [896, 128, 128]),
    "qwen2 down": (4864, [896]),
    "tiny q k v": (64, [64, 32, 32]),
}


def relative(ours: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((ours.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("kernel", ["of this GPU", "large tiles", "small tiles"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_product_and_its_gradient_are_float64s(shape, kernel, monkeypatch, unwritten_is_nan):
    """Tokens that fill no tile, one token, with and without outlier columns and LoRA."""
    from minarena.fast import int8_kernels

    if kernel != "of this GPU":
        own, processors, _ = int8_kernels.card(torch.device("cuda"))
        tiles = BLOCKS[99] if kernel == "small tiles" else own
        monkeypatch.setattr(int8_kernels, "card", lambda device: (tiles, processors, None))
    in_features, widths = SHAPES[shape]
    out = sum(widths)
    g = torch.Generator("cuda").manual_seed(0)
    W = torch.randint(-127, 128, (out, in_features), generator=g, device="cuda", dtype=torch.int8)
    W_scale = torch.rand(out, generator=g, device="cuda") * 0.01 + 1e-3
    for tokens, S, several in ((1, 0, False), (777, 96, True), (130, 32, False), (2049, 128, True)):
        q = torch.randint(-127, 128, (tokens, in_features), generator=g, device="cuda", dtype=torch.int8)
        scale = torch.rand(tokens, generator=g, device="cuda") + 0.1
        blocks = len(widths) if several else 1
        side_x = torch.randn(tokens, blocks * S, generator=g, device="cuda").bfloat16() * 50
        side_W = torch.randn(out, S, generator=g, device="cuda").bfloat16()
        wanted = (q.double() @ W.double().T) * scale.double()[:, None] * W_scale.double()
        x_blocks = side_x.double().split(S, dim=1) if S and several else [side_x.double()] * len(widths)
        sides = [x @ w.double().T for x, w in zip(x_blocks, side_W.split(widths), strict=True)]
        wanted += torch.cat(sides, dim=1)
        error = relative(int8_product(q, scale, W, W_scale, side_x, side_W, widths), wanted)
        assert error < 0.003, (tokens, S)  # bf16's rounding is .0017
    for part in W.split(widths):
        q = torch.randint(-127, 128, (777, len(part)), generator=g, device="cuda", dtype=torch.int8)
        scale = torch.rand(777, generator=g, device="cuda")
        wanted = (q.double() @ part.double()) * scale.double()[:, None]
        assert relative(int8_gradient(q, scale, part, side_x), wanted) < 0.003


@pytest.fixture(params=["gemma2", "gemma3", "llama", "mistral", "qwen2", "qwen3"])
def base(request, tmp_path) -> str:
    """Sides that are multiples of 16; Gemma-2 with four layers, a soft-cap, every other with a window."""
    if request.param == "gemma2":
        return write_tiny(str(tmp_path), num_hidden_layers=4)
    return write_base(
        request.param, tmp_path, vocab_size=260, head_dim=16, hidden_size=64, intermediate_size=96
    )


@pytest.fixture
def rows(tokenizer):
    table = demo_pairs(24, seed=9)
    return encode(tokenizer, table, 2200), table["label"].to_numpy()


def rounding(model, rows: list):
    """The model with the outlier columns of its base in use; found before LoRA changes the modules' names."""
    columns = outlier_columns(model.model, rows[:4], 8)
    use_columns_(model.model, columns)
    return model


def test_a_model_on_the_kernels_is_as_near_to_fp32_as_the_dequantized_one(base, rows):
    """The CPU runs the same int8 numbers in fp32; what bf16 adds is what it adds to dequantized weights."""
    config = AdapterConfig(r=8, alpha=9.0)
    wanted = {}
    for int8 in (False, True):
        twin = adapted(base, config)[0]
        wanted[int8] = logits_and_gradient(rounding(twin, rows[0]) if int8 else twin, *rows, torch.float32)
    distance = {}
    for int8 in (False, True):
        model = on_gpu(base, config, torch.bfloat16)
        if int8:
            rounding(model, rows[0])
            for name, module in model.model.named_modules():
                if getattr(module, "columns", None) is not None:
                    assert torch.equal(module.columns.cpu(), twin.model.get_submodule(name).columns), name
        assert not why_not(model.model, torch.bfloat16)
        use_fast_path_(model)
        p, gradient = logits_and_gradient(model, *rows, torch.bfloat16)
        wanted_p, wanted_gradient = wanted[int8]
        error = ((gradient - wanted_gradient).norm() / wanted_gradient.norm()).item()
        distance[int8] = np.abs(p - wanted_p).max(), error
    print(distance)
    assert distance[True][0] < 2 * distance[False][0] + 0.01
    assert distance[True][1] < 2 * distance[False][1] + 0.05


def test_one_compiled_region_serves_all_layers_and_saves_the_product(base, rows):
    """The backward must not multiply the forward's products again: each is one call a forward."""
    from minarena.fast import int8_kernels

    model = on_gpu(base, AdapterConfig(r=8, alpha=9.0), torch.bfloat16)
    use_fast_path_(rounding(model, rows[0]))
    calls, real = [], int8_kernels.launch_

    def count(y, *arguments):
        calls.append(tuple(y.shape))
        real(y, *arguments)

    int8_kernels.launch_ = count
    try:
        logits_and_gradient(model, [rows[0][0]], rows[1][:1], torch.bfloat16)
    finally:
        int8_kernels.launch_ = real
    layers = len(model.model.layers)
    predict, forward, backward = 4 * layers, 4 * layers, 7 * layers
    # the first layer's input needs no gradient of its own, so up to three products fewer
    assert predict + forward + backward - 3 <= len(calls) <= predict + forward + backward
    assert base_of(model.model.layers[0].mlp.down_proj).columns is not None

"""bitsandbytes' int8 weights: W = CB * (SCB / 127), multiplied by their dequantized values.

CB, SCB = stored_int8(linear)              of a bitsandbytes Linear8bitLt, before or after its first forward
W = dequantize(CB, SCB, torch.float32)     (out, in)
use_dequantized_(model)                    Linear8bitLt -> Int8Linear, in place, over the same memory

Compared with: bitsandbytes' own dequantization and matmul, and the plain product in float64.
"""

import json
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from helpers import CPU

import quantize
from minarena.files.base import load_backbone
from minarena.int8 import Int8Linear, dequantize, stored_int8, use_dequantized_


def linear8(outs=24, ins=40, bias=True, seed=0) -> bnb.nn.Linear8bitLt:
    """Quantized as transformers does it: `.to(device)` quantizes the float weight."""
    generator = torch.Generator().manual_seed(seed)
    linear = bnb.nn.Linear8bitLt(ins, outs, bias=bias, has_fp16_weights=False, threshold=6.0)
    weight = torch.randn(outs, ins, generator=generator) * torch.logspace(-2, 1, outs).unsqueeze(1)
    linear.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    if bias:
        linear.bias.data = torch.randn(outs, generator=generator)
    return linear.to("cpu")


def ours(linear) -> Int8Linear:
    holder = torch.nn.Sequential(linear)
    assert use_dequantized_(holder) == 1
    return holder[0]


def test_the_dequantized_weight_is_bitsandbytes_own_and_close_to_the_float_one():
    CB, SCB = stored_int8(linear8())
    W = dequantize(CB, SCB, torch.float32)
    torch.testing.assert_close(W, bnb.functional.int8_vectorwise_dequant(CB, SCB), rtol=1e-6, atol=0)
    generator = torch.Generator().manual_seed(0)
    original = torch.randn(24, 40, generator=generator) * torch.logspace(-2, 1, 24).unsqueeze(1)
    step = original.abs().amax(dim=1, keepdim=True) / 127  # fp16 while quantizing: half a step and a bit
    assert ((W - original).abs() <= 0.6 * step).all()


def test_a_bf16_weight_is_rounded_once():
    """A scale that is rounded first makes a whole row up to 0.4 % too large or too small."""
    CB, SCB = stored_int8(linear8(outs=64, ins=4096))
    exact = CB.double() * (SCB.double() / 127).unsqueeze(1)
    once = dequantize(CB, SCB, torch.bfloat16)
    assert torch.equal(once, exact.float().bfloat16())
    twice = CB.bfloat16() * (SCB / 127).bfloat16().unsqueeze(1)
    slope = [(W.double() * exact).sum(dim=1) / exact.square().sum(dim=1) - 1 for W in (once, twice)]
    assert slope[0].abs().median() < 2e-4 and slope[1].abs().median() > 1e-3


@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_backward_are_the_float64_product_with_the_bias(bias):
    linear = linear8(bias=bias)
    CB, SCB = stored_int8(linear)
    exact = (CB.double() * (SCB.double() / 127).unsqueeze(1)).requires_grad_(False)
    b = linear.bias.detach().double() if bias else 0
    module = ours(linear)
    x = torch.randn(2, 7, 40, requires_grad=True)
    up = torch.randn(2, 7, 24)
    y = module(x)
    y.backward(up)
    torch.testing.assert_close(y.double(), x.detach().double() @ exact.T + b, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(x.grad.double(), up.double() @ exact, rtol=1e-5, atol=1e-4)
    assert not list(module.parameters())  # frozen: the int8 bytes are buffers


def test_gradient_of_the_int8_product_passes_the_numerical_check():
    CB, SCB = stored_int8(linear8(outs=5, ins=6, bias=False))
    module = Int8Linear(CB, SCB.double())
    assert torch.autograd.gradcheck(module, torch.randn(3, 6, dtype=torch.float64, requires_grad=True))


def test_the_product_is_bitsandbytes_own_training_product():
    """On a CPU in training mode bitsandbytes, too, multiplies by the dequantized weight."""
    x = torch.randn(3, 40, requires_grad=True)
    theirs = linear8().train()
    y = theirs(x)
    y.sum().backward()
    gradient, x.grad = x.grad, None
    y_ours = ours(linear8())(x)
    y_ours.sum().backward()
    torch.testing.assert_close(y_ours, y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, gradient, rtol=1e-5, atol=1e-5)


def test_the_output_dtype_is_autocasts_where_it_is_on_and_the_inputs_elsewhere():
    module, x = ours(linear8()), torch.randn(3, 40)
    assert module(x).dtype == torch.float32 and module(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(x).dtype == torch.bfloat16


def test_the_stored_bytes_are_found_before_and_after_the_first_forward():
    linear = linear8()
    before = [t.clone() for t in stored_int8(linear)]
    assert linear.state.CB is None
    linear(torch.randn(2, 40))
    assert linear.state.CB is not None
    after = stored_int8(linear)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert before[0].dtype == torch.int8 and before[1].dtype == torch.float32
    x = torch.randn(2, 40)
    assert torch.equal(ours(linear)(x), ours(linear8())(x))  # converting works at either time


def test_the_backward_keeps_no_float_copy_of_the_weight():
    """Autograd on its own would save each layer's dequantized weight: 16.6 GB at 9B."""
    saved = []
    module, x = ours(linear8(outs=64, ins=64)), torch.randn(1, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        module(x)
    assert saved and all(t.dtype == torch.int8 or t.numel() <= 64 for t in saved)


@pytest.fixture(scope="module")
def eight_bit(tiny, tmp_path_factory) -> str:
    """quantize.py's folder of the tiny base."""
    out = tmp_path_factory.mktemp("quantized") / "tiny-8bit"
    assert quantize.main(["--model", tiny, "--out", str(out)])["out"] == str(out)
    return str(out)


def test_an_8_bit_folder_is_what_quantizing_at_load_gives_to_the_bit(tiny, eight_bit):
    stored, loaded = (load_backbone(f, CPU, torch.float32).state_dict() for f in (eight_bit, tiny))
    assert stored.keys() == loaded.keys()
    for name in loaded:
        assert stored[name].dtype == loaded[name].dtype and torch.equal(stored[name], loaded[name]), name
    assert sum(t.dtype == torch.int8 for t in loaded.values()) == 14  # seven projections in two layers


def test_transformers_loads_the_8_bit_folder_unchanged(eight_bit):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(eight_bit)
    linears = [m for m in model.modules() if isinstance(m, bnb.nn.Linear8bitLt)]
    backbone = load_backbone(eight_bit, CPU, torch.float32)
    assert len(linears) == 14 and model.score.weight.shape == (2, 64)
    assert model.score.weight.dtype == torch.float32
    for name, module in backbone.named_modules():
        if isinstance(module, Int8Linear):
            assert torch.equal(module.weight, stored_int8(model.model.get_submodule(name))[0])
    assert AutoTokenizer.from_pretrained(eight_bit)("ab")["input_ids"]
    config = json.loads(Path(eight_bit, "config.json").read_text())["quantization_config"]
    assert config["load_in_8bit"] and config["llm_int8_threshold"] == 6.0


def test_quantize_refuses_an_existing_folder_and_an_8_bit_base(eight_bit, tiny, tmp_path):
    with pytest.raises(ValueError, match=f"--out {eight_bit} exists"):
        quantize.main(["--model", tiny, "--out", eight_bit])
    with pytest.raises(ValueError, match="is quantized already"):
        quantize.main(["--model", eight_bit, "--out", str(tmp_path / "again")])
    assert not list(tmp_path.iterdir())


def test_llm_int8_really_calls_bitsandbytes_product_and_dequant_does_not(tiny, monkeypatch):
    called = []
    matmul = bnb.matmul
    monkeypatch.setattr(bnb, "matmul", lambda *a, **k: called.append(1) or matmul(*a, **k))
    ids = torch.randint(4, 260, (1, 9))
    with torch.no_grad():
        load_backbone(tiny, CPU, torch.float32, matmul="dequant").eval()(ids)
        assert not called
        backbone = load_backbone(tiny, CPU, torch.float32, matmul="llm-int8").eval()
        hidden = backbone(ids).last_hidden_state
    assert len(called) == 14
    # LLM.int8 rounds the activations, too: near the dequantized product, not equal
    with torch.no_grad():
        dequantized = load_backbone(tiny, CPU, torch.float32).eval()(ids).last_hidden_state
    difference = (hidden - dequantized).norm() / dequantized.norm()
    assert 1e-4 < difference < 0.2

"""LoRA by hand: y = W x + (alpha / r) * B A dropout(x), over any linear layer, float or 8-bit.

inject_lora_(model, r=64, alpha=4.0, dropout=0.05, freeze_layers=0)    wraps the seven projections in place
LoRALinear(linear, r, alpha, dropout).lora_A.weight (r, in), .lora_B.weight (out, r): PEFT's names

Compared with: PEFT on the same weights, forward and gradients, and the formula in float64. Always r > 1,
alpha != r and a lora_B that is not zero, or a mistake would not show.
"""

import copy
import math

import pytest
import torch
from helpers import CPU, stir_
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModel, BitsAndBytesConfig

from minarena.files.base import load_backbone
from minarena.lora import PROJECTIONS, LoRALinear, inject_lora_, layer_number

R, ALPHA = 6, 9.0
IDS = torch.randint(4, 260, (3, 17), generator=torch.Generator().manual_seed(0))


def both(folder: str, quantize: bool):
    """(our backbone, PEFT's) with the same adapter, in training mode."""
    ours = load_backbone(folder, CPU, torch.float32, quantize=quantize)
    inject_lora_(ours, R, ALPHA, generator=torch.Generator().manual_seed(3))
    stir_(ours)
    keywords = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)} if quantize else {}
    base = AutoModel.from_pretrained(folder, attn_implementation="eager", **keywords)
    config = LoraConfig(r=R, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=list(PROJECTIONS))
    theirs = get_peft_model(base, config)
    for name, p in theirs.named_parameters():
        if p.requires_grad:
            p.data.copy_(ours.get_parameter(ours_name(name)))
    return ours.train(), theirs.train()


def ours_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".default.", ".")


@pytest.mark.parametrize("quantize", [False, True])
def test_forward_and_gradients_are_pefts(tiny, quantize):
    ours, theirs = both(tiny, quantize)
    up = torch.randn(3, 17, 64, generator=torch.Generator().manual_seed(1))
    hidden = [model(input_ids=IDS).last_hidden_state for model in (ours, theirs)]
    torch.testing.assert_close(*hidden, rtol=1e-5, atol=2e-5)
    for h in hidden:
        (h * up).sum().backward()
    compared = 0
    for name, p in theirs.named_parameters():
        if p.requires_grad:
            gradient = ours.get_parameter(ours_name(name)).grad
            scale = p.grad.abs().max()
            assert scale > 0
            torch.testing.assert_close(gradient, p.grad, rtol=1e-4, atol=1e-5 * scale.item())
            compared += 1
    assert compared == sum(p.requires_grad for p in ours.parameters()) == 2 * 7 * 2
    with torch.no_grad():  # the adapter does something: a fresh one, whose B is zero, is the base alone
        inject_lora_(ours, R, ALPHA)
        assert (ours(input_ids=IDS).last_hidden_state - hidden[0]).abs().max() > 0.1


def test_the_layer_is_its_formula_in_float64():
    base = nn.Linear(5, 7)
    layer = LoRALinear(base, r=3, alpha=2.0, dropout=0.0)
    stir_(layer)
    x = torch.randn(2, 4, 5)
    W, b, A, B = (
        p.detach().double() for p in (base.weight, base.bias, layer.lora_A.weight, layer.lora_B.weight)
    )
    expected = x.double() @ (W + (2.0 / 3) * B @ A).T + b
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-6)


def test_dropout_is_on_loras_input_only_and_only_in_training():
    layer = LoRALinear(nn.Linear(64, 64), r=3, alpha=2.0, dropout=0.5)
    x = torch.randn(400, 64)
    with torch.no_grad():
        assert torch.equal(layer.train()(x), layer.base_layer(x))  # B is zero: no dropout on the base's input
        stir_(layer)
        plain = layer.eval()(x)
        assert torch.equal(plain, layer(x))
        drawn = torch.stack([layer.train()(x) for _ in range(200)])
    assert (drawn[0] - plain).abs().max() > 0.1
    torch.testing.assert_close(drawn.mean(dim=0), plain, rtol=0, atol=0.4 * drawn.std(dim=0).max().item())


def test_a_starts_kaiming_uniform_and_b_zero_the_same_on_every_device():
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    layers = [LoRALinear(nn.Linear(96, 32), 16, 4.0, 0.0, g) for g in generators]
    A = layers[0].lora_A.weight
    assert torch.equal(A, layers[1].lora_A.weight) and not layers[0].lora_B.weight.any()
    bound = math.sqrt(6 / ((1 + 5) * 96))  # gain sqrt(2 / (1 + a^2)) with a = sqrt 5, over sqrt fan_in
    assert A.abs().max() <= bound and A.abs().max() > 0.95 * bound
    assert A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    on_meta = LoRALinear(nn.Linear(96, 32, device="meta"), 16, 4.0, 0.0)
    assert on_meta.lora_A.weight.shape == A.shape


def test_the_seven_projections_of_the_layers_above_are_wrapped_and_no_others(tiny):
    backbone = load_backbone(tiny, CPU, torch.float32)
    linears = {name for name, _ in backbone.named_modules() if name.rpartition(".")[2] in PROJECTIONS}
    assert len(linears) == 14
    assert set(inject_lora_(backbone, R, ALPHA)) == linears
    names = inject_lora_(backbone, R, ALPHA, freeze_layers=1)  # again, over the same base
    assert set(names) == {name for name in linears if name.startswith("layers.1.")}
    wrapped = {name for name, m in backbone.named_modules() if isinstance(m, LoRALinear)}
    assert wrapped == set(names)
    assert not any("base_layer.base_layer" in name for name, _ in backbone.named_modules())


def test_injecting_again_leaves_the_base_as_it_was(tiny):
    backbone = load_backbone(tiny, CPU, torch.float32).eval()
    with torch.no_grad():
        plain = backbone(input_ids=IDS).last_hidden_state
        before = copy.deepcopy(backbone.state_dict())
        inject_lora_(backbone, R, ALPHA)
        stir_(backbone)
        assert not torch.equal(backbone(input_ids=IDS).last_hidden_state, plain)
        inject_lora_(backbone, 3, ALPHA)  # B is zero again
        torch.testing.assert_close(backbone(input_ids=IDS).last_hidden_state, plain, rtol=0, atol=0)
    for name, tensor in backbone.state_dict().items():
        if "lora_" not in name:
            assert torch.equal(tensor, before[name.replace(".base_layer", "")]), name


def test_a_model_without_projections_or_too_few_layers_is_refused(tiny):
    with pytest.raises(ValueError, match="no projection to adapt"):
        inject_lora_(nn.Sequential(nn.Linear(3, 3)), R, ALPHA)
    with pytest.raises(ValueError, match="at or above layer 2"):
        inject_lora_(load_backbone(tiny, CPU, torch.float32), R, ALPHA, freeze_layers=2)


def test_projections_outside_of_numbered_layers_are_wrapped_whatever_is_frozen():
    block = nn.ModuleDict({name: nn.Linear(4, 4) for name in PROJECTIONS})
    for freeze_layers in (0, 3):
        assert inject_lora_(block, R, ALPHA, freeze_layers=freeze_layers) == list(PROJECTIONS)


def test_the_layer_number_is_read_from_the_name():
    assert layer_number("model.layers.17.self_attn.q_proj.lora_A.weight") == 17
    assert layer_number("score.weight") == -1

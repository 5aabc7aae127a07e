"""What only a GPU can show; skipped, with that reason, where there is none.

    python -m pytest -m gpu

Compared with: the same thing on the CPU in fp32 or float64, and the state of an optimiser before it was
saved.
"""

import numpy as np
import pytest
import torch
from bases import write_base
from helpers import adapted, one_step, predict

from minarena.fast import blocks
from minarena.fast.attention import plain
from minarena.fast.blocks import BLOCKS, blocks_of
from minarena.fast.cuda_graphs import use_graphs_
from minarena.fast.fused_linear import project
from minarena.fast.packing import collate_packed
from minarena.fast.path import compiled, logits_of_packed, use_fast_path_, why_not
from minarena.fast.recompute import fit_layers_
from minarena.fast.softcap_tiles import tiles_of
from minarena.files.base import load_backbone
from minarena.files.checkpoint import save_checkpoint
from minarena.files.resume import load_checkpoint_
from minarena.int8 import DequantizedProduct, Int8Linear
from minarena.lora import LoRALinear
from minarena.model import AdapterConfig, PreferenceModel, attach_adapter_
from minarena.optim import make_optimizer
from minarena.text import encode
from minarena.tiny import demo_pairs, write_tiny

pytestmark = pytest.mark.gpu
BUDGET = {"token_budget": 1024, "pad_id": 0}


def with_memory(least: int, monkeypatch) -> None:
    """The blocks of a GPU with so many KiB of shared memory, here; skipped where this GPU has less."""
    if blocks.shared_memory(torch.device("cuda")) < least:
        pytest.skip(f"needs a GPU with {least} KiB of shared memory")
    monkeypatch.setattr(blocks, "shared_memory", lambda device: least)
    assert blocks_of(torch.device("cuda")) is BLOCKS[least] or least == 227  # but for a B200


def on_gpu(folder: str, config: AdapterConfig, dtype: torch.dtype) -> PreferenceModel:
    """The model of helpers.adapted on the GPU: same base, same adapter, residual stream as train.py has
    it."""
    twin, _ = adapted(folder, config)
    residual = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    model = PreferenceModel(load_backbone(folder, torch.device("cuda"), dtype), torch.nn.Identity(), residual)
    attach_adapter_(model, config)
    source = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(source[name])
    return model


@pytest.fixture
def rows(tokenizer):
    table = demo_pairs(24, seed=9)
    return encode(tokenizer, table, 2200), table["label"].to_numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_int8_product_and_its_gradient_are_float64s(dtype):
    generator = torch.Generator().manual_seed(1)
    CB = torch.randint(-127, 128, (96, 160), generator=generator, dtype=torch.int8)
    SCB = torch.rand(96, generator=generator) + 0.1
    x = torch.randn(3, 7, 160, generator=generator)
    wanted_x = x.double().requires_grad_()
    wanted = wanted_x @ (CB.double() * (SCB.double() / 127)[:, None]).T
    wanted.sin().sum().backward()
    got_x = x.to("cuda", dtype).requires_grad_()
    got = DequantizedProduct.apply(got_x, CB.cuda(), SCB.cuda())
    got.backward(wanted.detach().cos().to("cuda", dtype))  # the same gradient of the output on both sides
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    for mine, theirs in ((got, wanted), (got_x.grad, wanted_x.grad)):
        error = (mine.detach().cpu().double() - theirs.detach()).norm() / theirs.detach().norm()
        assert error < tolerance


def test_a_base_is_quantized_to_the_same_bytes_on_the_gpu_and_on_the_cpu(tiny):
    cpu = load_backbone(tiny, torch.device("cpu"), torch.float32).state_dict()
    gpu = load_backbone(tiny, torch.device("cuda"), torch.float32).state_dict()
    assert cpu.keys() == gpu.keys()
    for name in cpu:
        difference = (cpu[name].float() - gpu[name].cpu().float()).abs().max()
        assert difference <= (1 if cpu[name].dtype == torch.int8 else 0), name


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-3), (torch.float16, 0.01), (torch.bfloat16, 0.05)]
)
def test_probabilities_are_those_of_the_cpu_in_fp32(tiny, rows, dtype, bound):
    config = AdapterConfig(r=6, alpha=9.0)
    wanted = predict(adapted(tiny, config)[0], rows[0], **BUDGET)
    got = predict(on_gpu(tiny, config, dtype), rows[0], dtype=dtype, **BUDGET)
    assert np.ptp(wanted) > 0.1  # else anything would be close
    assert np.abs(got - wanted).max() < bound


def test_five_steps_in_bf16_have_the_losses_of_fp32_on_the_cpu(tiny, rows):
    config = AdapterConfig(r=6, alpha=9.0)
    losses = {}
    for dtype, model in (
        (torch.float32, adapted(tiny, config)[0]),
        (torch.bfloat16, on_gpu(tiny, config, torch.bfloat16)),
    ):
        optimizer = make_optimizer(model, 0.0)
        losses[dtype] = [
            one_step(model, optimizer, *rows, lr=1e-3, dtype=dtype, **BUDGET)[0] for _ in range(5)
        ]
    assert np.abs(np.subtract(*losses.values())).max() < 0.03
    assert losses[torch.bfloat16][-1] < losses[torch.bfloat16][0]


def test_recomputed_layers_give_the_same_gradient(tiny, rows):
    config = AdapterConfig(r=6, alpha=9.0, dropout=0.1)
    gradients = []
    for recompute in (False, True):
        model = on_gpu(tiny, config, torch.float32)
        if recompute:
            model.model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        one_step(model, make_optimizer(model, 0.0), *rows, lr=0.0, **BUDGET)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[0].norm()


def test_8_bit_adamw_goes_on_from_a_checkpoint_bit_for_bit(tiny, rows, tmp_path):
    # hidden 64 with r 64: lora_A and lora_B of the MLP have 8,192 elements, enough for bitsandbytes' 8-bit
    # state
    config = AdapterConfig(r=64, alpha=4.0)
    model = on_gpu(tiny, config, torch.float32)
    optimizer = make_optimizer(model, 0.0)
    for _ in range(3):
        one_step(model, optimizer, *rows, lr=1e-3, **BUDGET)
    kinds = {v.dtype for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)}
    assert torch.uint8 in kinds
    save_checkpoint(str(tmp_path), 3, model, optimizer, config, "tiny")
    resumed = on_gpu(tiny, config, torch.float32)
    resumed_optimizer = make_optimizer(resumed, 0.0)
    assert load_checkpoint_(str(tmp_path), resumed, resumed_optimizer)[0] == 3
    one_step(model, optimizer, *rows, lr=1e-3, **BUDGET)
    one_step(resumed, resumed_optimizer, *rows, lr=1e-3, **BUDGET)
    other = dict(resumed.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, other[name]), name


FAMILIES = ["gemma2", "gemma3", "llama", "mistral", "qwen2", "qwen3"]


@pytest.fixture(params=FAMILIES)
def base(request, tmp_path) -> str:
    """Four layers of Gemma-2, soft-capped, every other with a window shorter than a row; two of others."""
    if request.param == "gemma2":
        return write_tiny(str(tmp_path), num_hidden_layers=4)
    return write_base(request.param, tmp_path, vocab_size=260, head_dim=16, hidden_size=64)


def logits_and_gradient(model, rows, labels, dtype) -> tuple[np.ndarray, torch.Tensor]:
    p = predict(model, rows, dtype=dtype, **BUDGET)
    one_step(
        model, make_optimizer(model, 0.0), rows, labels, lr=0.0, max_grad_norm=0.0, dtype=dtype, **BUDGET
    )
    return p, torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize(
    ("base", "memory"), [*((family, 0) for family in FAMILIES), ("gemma2", 99)], indirect=["base"]
)
def test_the_fast_path_is_as_near_to_fp32_as_the_reference(base, memory, rows, monkeypatch):
    if memory:  # only attention with a cap has blocks of its own
        with_memory(memory, monkeypatch)
    config = AdapterConfig(r=6, alpha=9.0)
    wanted_p, wanted = logits_and_gradient(adapted(base, config)[0], *rows, torch.float32)
    distance = {}
    for fast in (False, True):
        model = on_gpu(base, config, torch.bfloat16)
        assert not why_not(model.model, torch.bfloat16)
        if fast:
            use_fast_path_(model)
        p, gradient = logits_and_gradient(model, *rows, torch.bfloat16)
        distance[fast] = np.abs(p - wanted_p).max(), ((gradient - wanted).norm() / wanted.norm()).item()
    print(distance)
    assert distance[True][0] < 2 * distance[False][0] + 0.005
    assert distance[True][1] < 1.5 * distance[False][1]


def test_fast_layers_that_are_recomputed_give_the_same_gradient(tiny, rows):
    config = AdapterConfig(r=6, alpha=9.0, dropout=0.1)
    gradients = []
    for recomputed in (0, 2):
        model = on_gpu(tiny, config, torch.bfloat16)
        use_fast_path_(model)
        model.recomputed = recomputed
        torch.manual_seed(3)
        one_step(model, make_optimizer(model, 0.0), *rows, lr=0.0, dtype=torch.bfloat16, **BUDGET)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert (gradients[0] - gradients[1]).norm() < 1e-3 * gradients[0].norm()


def test_the_backward_draws_the_dropout_mask_of_the_forward():
    linears = [
        LoRALinear(Int8Linear(torch.zeros(96, 160, dtype=torch.int8), torch.ones(96)), 8, 16, 0.5).cuda()
    ]
    torch.nn.init.normal_(linears[0].lora_B.weight)
    region = compiled(lambda module, seed, x: project([module], module.base_layer, x, seed)[0])
    x = torch.randn(64, 160, device="cuda").requires_grad_()
    y = region(linears[0].train(), torch.tensor(7, dtype=torch.int32, device="cuda"), x).sum()
    y.backward()
    A, B = linears[0].lora_A.weight, linears[0].lora_B.weight
    for parameter in (A, B, x):  # y is linear in each of the three, given the mask
        assert (parameter * parameter.grad).sum().item() == pytest.approx(y.item(), rel=1e-3)
    assert y.abs() > 0.01


@pytest.mark.parametrize("memory", BLOCKS)
@pytest.mark.parametrize("window", [None, 100, 300])
@pytest.mark.parametrize("H, G, D", [(2, 2, 256), (1, 2, 128), (1, 3, 64), (2, 1, 16)])
def test_the_attention_kernels_are_as_near_to_fp32_as_bf16_allows(
    H, G, D, window, memory, unwritten_is_nan, monkeypatch
):
    """Rows shorter and longer than a tile, a tail, scores that the cap bends; each gradient by itself."""
    from minarena.fast.softcap_kernels import CappedAttention  # Triton comes with PyTorch for GPUs only

    with_memory(memory, monkeypatch)
    packed = collate_packed([np.zeros(n) for n in (700, 130, 40, 257)], "cuda", 1536, 8)
    shapes = (1536, H, G, D), (1536, H, D), (1536, H, D), (1536, H, G, D)
    q, k, v, grad = (torch.randn(shape, device="cuda").bfloat16() for shape in shapes)
    settings = 3 / D**0.5, 5.0, window
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    tiles = tiles_of(packed.lengths, "cuda")
    got = CappedAttention.apply(*inputs, tiles.table, tiles.pairs, *settings)
    wanted_inputs = [x.float().requires_grad_() for x in (q, k, v)]
    wanted = plain(*wanted_inputs, packed.lengths, *settings)
    pairs = [(got, wanted)]
    pairs += zip(
        torch.autograd.grad(got, inputs, grad),
        torch.autograd.grad(wanted, wanted_inputs, grad.float()),
        strict=True,
    )
    for name, (mine, theirs) in zip(("out", "dq", "dk", "dv"), pairs, strict=True):
        error = ((mine.float() - theirs).norm() / theirs.norm()).item()
        print(f"{name} {error:.4f}")
        assert error < 0.01, name


@pytest.mark.parametrize("base", ["gemma3", "llama", "qwen2"], indirect=True)  # a soft-cap has none
def test_graphs_add_the_gradients_of_the_same_micro_batches_run_one_by_one(base, rows):
    config = AdapterConfig(r=6, alpha=9.0, dropout=0.0, head_dropout=0.0)
    gradients = {}
    for graphs in (False, True):
        model = on_gpu(base, config, torch.bfloat16)
        use_fast_path_(model)
        if graphs:
            use_graphs_(model, logits_of_packed)
        optimizer, found = make_optimizer(model, 0.0), []
        for first in (0, 8, 16, 4, 12, 0):  # sizes come again, with other rows
            part = slice(first, first + 8)
            one_step(model, optimizer, rows[0][part], rows[1][part], lr=0.0, dtype=torch.bfloat16, **BUDGET)
            found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
        gradients[graphs] = torch.stack(found)
    assert any(model.graphs.values())
    error = (gradients[True] - gradients[False]).norm(dim=1) / gradients[False].norm(dim=1)
    assert error.max() < 0.02
    assert not torch.equal(gradients[True][0], gradients[True][1])


@pytest.mark.parametrize("base", ["gemma2", "llama"], indirect=True)
def test_a_small_base_without_a_soft_cap_has_graphs(base):
    model = on_gpu(base, AdapterConfig(r=6, alpha=9.0), torch.bfloat16)
    use_fast_path_(model)
    fit_layers_(model, 1024, 256)
    assert hasattr(model, "graphs") == (model.model.config.model_type == "llama")


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_a_recording_that_runs_out_of_memory_drops_all_graphs_and_training_goes_on(base, rows):
    model, calls = on_gpu(base, AdapterConfig(r=6, alpha=9.0), torch.bfloat16), []

    def logits(*arguments):
        calls.append("one")
        found = logits_of_packed(*arguments)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("full")
        return found

    def loss(count: int) -> float:
        part, budget = (rows[0][:count], rows[1][:count]), {**BUDGET, "token_budget": 100_000}
        return one_step(model, optimizer, *part, lr=0.0, dtype=torch.bfloat16, **budget)[0]

    use_fast_path_(model)
    use_graphs_(model, logits)
    optimizer = make_optimizer(model, 0.0)
    losses = [loss(4), loss(4), loss(20)]  # run, recorded; run
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        loss(20)
    assert not model.graphs and torch.cuda.current_stream() == torch.cuda.default_stream()
    assert [loss(20), loss(20), loss(20)] == pytest.approx([losses[2]] * 3, abs=1e-3)
    assert len(model.graphs) == 1 and all(model.graphs.values())


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_a_replayed_graph_draws_other_dropout_masks_each_time_and_the_same_for_a_seed(base, rows):
    model = on_gpu(base, AdapterConfig(r=6, alpha=9.0, dropout=0.5, head_dropout=0.0), torch.bfloat16)
    use_fast_path_(model)
    use_graphs_(model, logits_of_packed)
    optimizer, losses = make_optimizer(model, 0.0), []
    for seed in (1, 1, 1, 2, 1, 2):  # the first two run and record
        torch.manual_seed(seed)
        part = rows[0][:8], rows[1][:8]
        losses.append(one_step(model, optimizer, *part, lr=0.0, dtype=torch.bfloat16, **BUDGET)[0])
    assert losses[2] == pytest.approx(losses[4], abs=1e-6) and losses[3] == pytest.approx(losses[5], abs=1e-6)
    assert abs(losses[2] - losses[3]) > 1e-4

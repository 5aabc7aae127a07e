"""The fast path, on a CPU: the same arithmetic, uncompiled or through the compiler's front end.

use_fast_path_(model)          a PreferenceModel whose rows are packed from then on
packed_logits(model, rows)     (B, 2) for B rows of token ids
why_not(backbone, dtype)       "" or the reason why the reference path is taken

Compared with: transformers' own layers on padded rows (PreferenceModel.forward) and on one row at a time,
logits and gradients. What only a GPU can show is in test_gpu.py.
"""

import functools
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from bases import FAMILIES, write_base
from helpers import CPU, adapted, one_step, predict

import train
from minarena.batching import collate
from minarena.fast import blocks, path
from minarena.fast.fused_linear import hash_dropout, project
from minarena.fast.packing import collate_packed
from minarena.fast.path import take_fast_path_, use_fast_path_, why_not
from minarena.fast.recompute import recomputed_layers
from minarena.files.base import load_backbone
from minarena.int8 import Int8Linear
from minarena.lora import LoRALinear
from minarena.model import AdapterConfig, PreferenceModel, attach_adapter_
from minarena.optim import make_optimizer

ROWS = [np.random.default_rng(n).integers(4, 255, n, dtype=np.int32) for n in (37, 5, 64, 21, 40)]
LABELS = np.array([1.0, 0.0, 0.5, 1.0, 0.0])
WINDOW = dict(  # shorter than the rows; every other layer
    gemma2=dict(sliding_window=16, initializer_range=1.0),  # at 0.02 the soft-cap would change nothing
    qwen2=dict(use_sliding_window=True, sliding_window=16, max_window_layers=1),
)


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """Regions as they are; the compiler's settings restored."""
    monkeypatch.setattr(path, "fused_region", lambda region: region)
    with path.partitioner.patch(
        {name: getattr(path.partitioner, name) for name in path.KEPT_FOR_THE_BACKWARD}
    ):
        yield


@pytest.fixture(scope="module", params=FAMILIES)
def base(request, tmp_path_factory) -> str:
    family = request.param
    return write_base(family, tmp_path_factory.mktemp(family), **WINDOW.get(family, {}))


def results(model, budget: int, recomputed: int = 0) -> tuple[np.ndarray, float, torch.Tensor]:
    """(P of each row, loss, all gradients) with dropout as the model has it"""
    p = predict(model, ROWS, token_budget=budget, pad_id=0)
    model.recomputed = recomputed
    torch.manual_seed(5)
    loss, _ = one_step(
        model,
        make_optimizer(model, 0.0),
        ROWS,
        LABELS,
        lr=0.0,
        max_grad_norm=0,
        token_budget=budget,
        pad_id=0,
    )
    return p, loss, torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def assert_same(ours, theirs, tolerance=1e-4):
    np.testing.assert_allclose(ours[0], theirs[0], atol=1e-5)
    assert ours[1] == pytest.approx(theirs[1], abs=1e-5)
    assert (ours[2] - theirs[2]).norm() < tolerance * theirs[2].norm()


@pytest.mark.parametrize("budget", [1, 100, 10_000])
def test_packed_equals_padded_equals_one_row_at_a_time(base, budget):
    model, _ = adapted(base)
    padded, alone = results(model, 10_000), results(model, 1)
    assert np.ptp(padded[0]) > 0.05  # else anything would be close
    assert_same(alone, padded)
    use_fast_path_(model)
    assert_same(results(model, budget), padded)


def test_a_tail_that_fills_a_micro_batch_up_changes_nothing(base):
    model, _ = adapted(base)
    use_fast_path_(model)
    wanted = path.packed_logits(model.eval(), ROWS)
    filled = path.logits_of_packed(model, collate_packed(ROWS, tokens=512, count=8))
    assert filled.shape == (8, 2)
    torch.testing.assert_close(filled[: len(ROWS)], wanted)


def test_layers_that_are_recomputed_or_frozen_change_nothing(base):
    for changes in ({"dropout": 0.0}, {"freeze_layers": 1}):
        model, _ = adapted(base, **changes)
        padded = results(model, 10_000)
        use_fast_path_(model)
        assert_same(results(model, 100, recomputed=2), padded)


def test_another_adapter_is_put_onto_the_joined_weights_which_stay_those_of_the_reference(tiny):
    model, _ = adapted(tiny)
    use_fast_path_(model)
    other = PreferenceModel(load_backbone(tiny, CPU, torch.float32), torch.nn.Identity())
    for m in (model, other):
        attach_adapter_(m, AdapterConfig(r=3, alpha=2.0, head="linear"), seed=4)
    assert_same(results(model, 100), results(other, 100))
    padded = collate(ROWS, 0)
    torch.testing.assert_close(model.eval()(*padded), other.eval()(*padded))


@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
def test_one_graph_of_each_region_serves_all_layers_and_micro_batches(monkeypatch, tmp_path):
    """Two for training and two for inference, whatever the sizes; a limit that is hit is an error here."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compile_ = functools.cache(lambda region: torch.compile(region, backend=counter))
    monkeypatch.setattr(path, "fused_region", compile_)
    torch._dynamo.reset()
    kinds = ["sliding_attention", "full_attention"] * 6
    model, _ = adapted(
        write_base("gemma2", tmp_path, num_hidden_layers=12, layer_types=kinds, sliding_window=16)
    )
    padded = results(model, 10_000)
    use_fast_path_(model)
    for budget in (1, 64, 100, 10_000):
        assert_same(results(model, budget, recomputed=3), padded, 1e-3)
    assert counter.frame_count == 4


@pytest.mark.parametrize("count", [1, 2])
def test_dropout_keeps_the_mean_and_the_backward_has_the_mask_of_the_forward(count):
    torch.manual_seed(0)
    CB = torch.zeros(count * 24, 40, dtype=torch.int8)  # W = 0: what is left is LoRA
    linears = [LoRALinear(Int8Linear(CB[:24], torch.ones(24)), 8, 16, 0.5) for _ in range(count)]
    for linear in linears:
        torch.nn.init.normal_(linear.lora_B.weight)
    base, x = Int8Linear(CB, torch.ones(len(CB))), torch.rand(512, 40).requires_grad_()
    y = torch.cat(list(project(linears, base, x, torch.tensor(7, dtype=torch.int32))), dim=-1)
    clean = torch.cat([linear.eval()(x) for linear in linears], dim=-1).detach()
    assert (y - clean).abs().max() > 0.5  # something was dropped
    assert (y.mean(0) - clean.mean(0)).abs().max() < 0.15 * clean.mean(0).abs().max()
    y[:, :24].sum().backward()
    for parameter in (linears[0].lora_A.weight, linears[0].lora_B.weight):  # y is linear in each of them
        assert (parameter * parameter.grad).sum().item() == pytest.approx(y[:, :24].sum().item(), rel=1e-4)


def test_dropouts_hash_is_as_good_as_independent_coins():
    """Frequencies of one element, and of pairs at many distances, of two seeds, and of rows and columns."""
    p, shape, one = 0.25, (1024, 768), torch.ones(1024, 768)
    seeds = torch.tensor([0, 1, 2, -5, 2**31 - 1, 123456789], dtype=torch.int32)
    zero = torch.stack([hash_dropout(one, p, seed) == 0 for seed in seeds]).double()
    assert torch.allclose(hash_dropout(one, p, seeds[3]), torch.where(zero[3] == 1, 0.0, 1 / (1 - p)))
    n = one.numel()
    sigma = (p * (1 - p) / n) ** 0.5
    assert ((zero.mean((1, 2)) - p).abs() < 5 * sigma).all()
    for dim, count in ((1, shape[1]), (2, shape[0])):  # each column's and each row's own frequency
        spread = (zero.mean(dim) - p) / (p * (1 - p) / shape[dim - 1]) ** 0.5
        assert spread.abs().max() < 6 and spread.std().item() == pytest.approx(1, abs=0.1), count
    centred = (zero - p).flatten(1) / (p * (1 - p)) ** 0.5
    for distance in [1, 2, 3, 4, 8, 32, 64, 128, 767, 768, 769, 1536, 4096]:
        products = (centred[:, :-distance] * centred[:, distance:]).mean(1)
        assert products.abs().max() < 5 / n**0.5, distance
    between = centred @ centred.T / n - torch.eye(len(seeds))
    assert between.abs().max() < 5 / n**0.5


def test_dropout_is_drawn_anew_for_each_step_layer_and_product(tiny):
    model, _ = adapted(tiny, dropout=0.5)
    torch.manual_seed(1)
    first, again = (torch.stack(path.dropout_seeds(model.model, True)) for _ in range(2))
    torch.manual_seed(1)
    same = torch.stack(path.dropout_seeds(model.model, True))
    assert first.shape == (2, 4) and len({*first.flatten().tolist(), *again.flatten().tolist()}) == 16
    assert torch.equal(first, same)
    assert path.dropout_seeds(model.model, False) == [None, None]
    assert path.dropout_seeds(adapted(tiny, dropout=0.0)[0].model, True) == [None, None]


def test_rows_begin_at_multiples_of_8_tokens_which_a_gpus_products_need():
    packed = collate_packed([np.arange(5, dtype=np.int32), np.arange(9, dtype=np.int32)])
    assert packed.lengths == [8, 16]
    assert packed.ids[8:17].tolist() == packed.positions[8:17].tolist() == list(range(9))
    assert packed.last.tolist() == [4, 16] and packed.ends.tolist()[:3] == [0, 8, 24]


@pytest.mark.parametrize("family", ["llama", "qwen3"])  # qwen3 has norms of q and k as well
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_the_residual_stream_stays_bf16_whatever_dtype_the_norms_are_stored_in(family, stored, tmp_path):
    backbone = load_backbone(write_base(family, tmp_path, dtype=stored), CPU, torch.bfloat16)
    model = PreferenceModel(backbone, torch.nn.Identity(), torch.bfloat16)
    attach_adapter_(model, AdapterConfig(r=6))
    use_fast_path_(model)
    layer, hidden = backbone.layers[0], torch.randn(16, 56, dtype=torch.bfloat16)
    q, k, v = path.before_attention(layer, None, hidden, *torch.randn(2, 16, 1, 16).bfloat16())
    assert (
        q.dtype == k.dtype == v.dtype == path.after_attention(layer, None, hidden, q).dtype == torch.bfloat16
    )


def test_why_not_names_the_reason(tiny, monkeypatch):
    backbone = load_backbone(tiny, CPU, torch.float32)
    assert "GPU" in why_not(backbone, torch.bfloat16)
    monkeypatch.setattr(type(backbone), "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=9))
    monkeypatch.setattr(blocks, "shared_memory", lambda device: 227)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(path, "find_spec", lambda name: None)
    assert "Triton" in why_not(backbone, torch.bfloat16)
    monkeypatch.setattr(path, "find_spec", lambda name: name)
    for capability, dtype, reason in (((7, 5), torch.bfloat16, "8.0"), ((9, 0), torch.float16, "bf16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert reason in why_not(backbone, dtype)
    assert why_not(backbone, torch.bfloat16) == ""
    for name, value in (("use_bidirectional_attention", True), ("attention_dropout", 0.1)):
        before = getattr(backbone.config, name, None)
        setattr(backbone.config, name, value)
        assert "attention" in why_not(backbone, torch.bfloat16)
        setattr(backbone.config, name, before)
    attention = backbone.layers[0].self_attn
    # head size, cap, KiB of shared memory
    cases = [(24, 50.0, 227, "16, 32"), (512, 50.0, 227, "256"), (64, 90.0, 227, "80"), (512, None, 64, None)]
    cases += [(256, 50.0, 64, "99 KiB"), (256, 50.0, 227, None), (256, 50.0, 99, None)]
    for D, cap, memory, reason in cases:
        monkeypatch.setattr(blocks, "shared_memory", lambda device, found=memory: found)
        attention.head_dim, backbone.config.attn_logit_softcapping = D, cap
        said = why_not(backbone, torch.bfloat16)
        assert reason in said if reason else said == ""
    backbone.config.model_type = "olmo2"
    assert "olmo2" in why_not(backbone, torch.bfloat16)
    kept_in_floats = load_backbone(tiny, CPU, torch.float32, quantize=False)
    assert "in floats" in why_not(kept_in_floats, torch.bfloat16)
    of_bitsandbytes = load_backbone(tiny, CPU, torch.float32, matmul="llm-int8")
    assert "--matmul" in why_not(of_bitsandbytes, torch.bfloat16)


def test_where_it_cannot_be_taken_a_line_says_so_and_the_reference_is_used(tiny, capsys):
    model, _ = adapted(tiny)
    capsys.readouterr()
    take_fast_path_(model, torch.float32)
    assert model.fast is None
    assert (
        capsys.readouterr().err
        == "fast path off: it needs a GPU of compute capability 8.0 (A100, RTX 30) or later\n"
    )


def test_layers_are_recomputed_as_far_as_memory_asks(tiny):
    backbone = load_backbone(tiny, CPU, torch.float32)
    frees = (2**30, 2**30 + 2**28, 2**31, 2**40)
    counts = [recomputed_layers(backbone, 65536, 128, free) for free in frees]
    assert counts[0] == 2 and counts[-1] == 0 and counts == sorted(counts, reverse=True)
    assert [recomputed_layers(backbone, 65536, n, 2**34) for n in (128, 65536)] == [0, 2]  # P and dS


def test_train_py_says_which_path_it_takes(pairs_file, tmp_path, capsys):
    train.main(["--data", pairs_file, "--limit", "16", "--n-splits", "4", "--out", str(tmp_path / "run")])
    assert re.search(r"\d threads?, reference path", capsys.readouterr().err)


@pytest.mark.parametrize(("gib", "layers"), [(60, 0), (20, 22), (2, 42)])
def test_as_many_layers_are_recomputed_as_do_not_fit(gib, layers):
    """Gemma-2-9B's shape, 7,500 tokens: a layer keeps .83 GB, 3.75 GB pass by, and 5 % are left free."""
    sizes = dict(hidden_size=3584, intermediate_size=14336, num_attention_heads=16, num_key_value_heads=8)
    config = SimpleNamespace(**sizes, num_hidden_layers=42, attn_logit_softcapping=50.0)
    attention = SimpleNamespace(self_attn=SimpleNamespace(head_dim=256))
    backbone = SimpleNamespace(config=config, layers=[attention])
    assert recomputed_layers(backbone, tokens=7500, longest=2200, free=gib * 2**30) == layers

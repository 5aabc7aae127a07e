"""The model: a backbone of transformers', pooled at each row's last real token, read by a head.

model = PreferenceModel(load_backbone(folder, device, torch.float32), make_head("linear", 64, 0.0))
logits = model(input_ids, attention_mask)      # (B, 2) fp32, padding on either side; index 0 = first answer
pool_last(hidden, mask) -> (B, C)

Compared with: transformers' own sequence classifiers with eager attention, a loop over rows, and arithmetic.
Weights are drawn with initializer_range 1.0: at the usual 0.02 a forgotten soft-cap changes 8e-7.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CPU, adapted
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    Qwen2Config,
)

from minarena.batching import collate
from minarena.files.base import base_folder, load_backbone
from minarena.model import AdapterConfig, PreferenceModel, attach_adapter_, default_dtype, pool_last
from minarena.optim import trainable

PAD, EOS = 0, 1
SIZE = dict(vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
SIZE |= dict(num_key_value_heads=2, initializer_range=1.0, max_position_embeddings=128)
SIZE |= dict(pad_token_id=PAD, eos_token_id=EOS, bos_token_id=2, num_labels=2)
GEMMA = dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=6)
CONFIGS = {
    "gemma2": lambda **k: Gemma2Config(**{**SIZE, **GEMMA, **k}),
    "gemma3": lambda **k: Gemma3TextConfig(**{**SIZE, **GEMMA, **k}),
    "llama": lambda **k: LlamaConfig(**{**SIZE, **k}),
    "qwen2": lambda **k: Qwen2Config(**{**SIZE, **k}),
}


def rows(lengths=(5, 23, 11, 2), seed=0) -> list[np.ndarray]:
    """Token ids from 3 on, EOS last: no pad id inside, so transformers' pooling and ours mean one token."""
    rng = np.random.default_rng(seed)
    return [np.append(rng.integers(3, 99, n - 1), EOS) for n in lengths]


def pair(family: str, folder, **changes):
    """(ours, transformers' sequence classifier with eager attention) over the same weights."""
    torch.manual_seed(0)
    hf = AutoModelForSequenceClassification.from_config(
        CONFIGS[family](**changes), attn_implementation="eager"
    )
    with torch.no_grad():  # norms and biases are drawn as ones and zeros, which would hide them
        for name, p in hf.named_parameters():
            if "norm" in name or name.endswith("bias"):
                p.add_(torch.randn_like(p) * 0.3)
    hf.save_pretrained(folder)
    ours = PreferenceModel(load_backbone(str(folder), CPU, torch.float32, quantize=False), hf.score)
    return ours.eval(), hf.eval()


@torch.no_grad()
def logits_of(model, batch, side="left"):
    ids, mask = collate(batch, PAD)
    if side == "right":
        ids, mask = ids.clone(), mask.clone()
        for i, row in enumerate(batch):
            ids[i], mask[i] = ids[i].roll(len(row)), mask[i].roll(len(row))
    result = model(input_ids=ids, attention_mask=mask)
    return result if isinstance(result, torch.Tensor) else result.logits


@pytest.mark.parametrize("family", CONFIGS)
def test_logits_are_those_of_transformers_eager_classifier(family, tmp_path):
    ours, hf = pair(family, tmp_path)
    for side in ("left", "right"):
        torch.testing.assert_close(
            logits_of(ours, rows(), side), logits_of(hf, rows(), side), rtol=0, atol=5e-5
        )
    one_by_one = torch.cat([logits_of(hf, [row]) for row in rows()])  # no padding at all
    torch.testing.assert_close(logits_of(ours, rows()), one_by_one, rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("family", "off"),
    [
        ("gemma2", {"attn_logit_softcapping": 1e9}),
        ("gemma2", {"sliding_window": 128}),
        ("gemma2", {"query_pre_attn_scalar": 32}),
        ("gemma3", {"sliding_window": 128}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 10.0}}),
        ("qwen2", {"num_key_value_heads": 4}),
    ],
)
def test_the_comparison_above_sees_what_makes_each_family(family, off, tmp_path):
    """Switched off, each of these moves a logit by a hundred times the tolerance above or more."""
    with_it = logits_of(pair(family, tmp_path / "a")[0], rows())
    without = logits_of(pair(family, tmp_path / "b", **off)[0], rows())
    assert (with_it - without).abs().max() > 5e-3


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("quantize", [False, True])
def test_padding_side_and_company_in_the_batch_change_no_logit(family, quantize, tmp_path):
    pair(family, tmp_path)
    model, _ = adapted(str(tmp_path), quantize=quantize)
    expected = torch.cat([logits_of(model, [row]) for row in rows()])
    company = [*rows((40,), seed=1), *rows(), *rows((17, 3), seed=2)]
    for side in ("left", "right"):
        torch.testing.assert_close(logits_of(model, rows(), side), expected, rtol=0, atol=5e-6)
        torch.testing.assert_close(logits_of(model, company, side)[1:5], expected, rtol=0, atol=5e-6)
    assert expected.std(dim=0).min() > 0.03  # rows do differ


def test_the_token_under_the_padding_changes_no_logit(tmp_path):
    """The mask says what is padding, never the id: pad may be EOS, or any other token."""
    ours, _ = pair("gemma2", tmp_path)
    ids, mask = collate(rows(), PAD)
    with torch.no_grad():
        other = ours(torch.where(mask == 1, ids, EOS), mask)
        assert torch.equal(ours(ids, mask), other)


@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_pooling_takes_the_last_real_token(side):
    rng = np.random.default_rng(0)
    hidden, mask = torch.randn(6, 9, 4), torch.ones(6, 9, dtype=torch.int64)
    lengths = [9] * 6 if side == "none" else [1, 2, 9, *rng.integers(1, 9, 3)]
    for i, n in enumerate(lengths):
        mask[i] = torch.tensor([0] * (9 - n) + [1] * n if side == "left" else [1] * n + [0] * (9 - n))
    expected = []
    for row, row_mask in zip(hidden, mask, strict=True):
        last = None
        for vector, real in zip(row, row_mask, strict=True):
            last = vector if real else last
        expected.append(last)
    assert torch.equal(pool_last(hidden, mask), torch.stack(expected))


def test_the_9b_shape_has_222_500_098_trainable_parameters():
    """Counted on the meta device, which holds no memory, and by hand."""
    config = Gemma2Config(
        hidden_size=3584, intermediate_size=14336, num_hidden_layers=42, num_attention_heads=16
    )
    config.num_key_value_heads, config.head_dim = 8, 256
    with torch.device("meta"):
        model = PreferenceModel(AutoModel.from_config(config).requires_grad_(False), torch.nn.Identity())
    attach_adapter_(model, AdapterConfig(r=64))
    hidden, inner, queries, keys = 3584, 14336, 16 * 256, 8 * 256
    sides = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
    sides += [(hidden, inner), (hidden, inner), (inner, hidden)]
    lora = 42 * sum(64 * (a + b) for a, b in sides)
    head = hidden * hidden // 2 + hidden // 2 + hidden // 2 * 2 + 2
    assert sum(p.numel() for p in trainable(model)) == lora + head == 222_500_098


def test_everything_but_adapter_and_head_is_frozen(tiny):
    model, _ = adapted(tiny)
    for name, p in model.named_parameters():
        assert p.requires_grad == ("lora_" in name or name.startswith("score")), name
        assert not p.requires_grad or p.dtype == torch.float32


def test_head_and_logits_are_fp32_under_autocast(tiny):
    model, _ = adapted(tiny)
    seen = []
    model.score.register_forward_pre_hook(lambda _, x: seen.append(x[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = logits_of(model, rows())
    assert logits.dtype == torch.float32 and seen == [torch.float32]


def test_the_compute_dtype_on_a_cpu_is_fp32():
    assert default_dtype(CPU, training=True) == default_dtype(CPU, training=False) == "fp32"


def refusal(folder) -> str:
    with pytest.raises(ValueError) as error, base_folder(str(folder)) as checked:
        load_backbone(checked, CPU, torch.float32)
    assert len(str(error.value).splitlines()) == 1 and str(error.value).startswith(f"--model {folder}: ")
    return str(error.value)


def test_a_folder_that_is_no_base_is_refused_by_name(tiny, tmp_path):
    assert "no such folder" in refusal(tmp_path / "none")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no config.json" in refusal(empty)
    pickled = tmp_path / "pickled"
    shutil.copytree(tiny, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert "no .safetensors file" in refusal(pickled)
    cut = tmp_path / "cut"
    shutil.copytree(tiny, cut)
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:1000])
    refusal(cut)
    strange = tmp_path / "strange"
    shutil.copytree(tiny, strange)
    (strange / "config.json").write_text('{"model_type": "none-such"}')
    assert "none-such" in refusal(strange)
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    (broken / "config.json").write_text("{")
    refusal(broken)


def test_weights_that_lack_a_tensor_or_are_of_another_method_are_refused_by_name(tiny, tmp_path):
    config = json.loads(Path(tiny, "config.json").read_text())
    deeper = tmp_path / "deeper"
    shutil.copytree(tiny, deeper)
    changes = {"num_hidden_layers": 3, "layer_types": [*config["layer_types"], "sliding_attention"]}
    (deeper / "config.json").write_text(json.dumps({**config, **changes}))
    assert "the weights lack model.layers.2." in refusal(deeper)
    four = tmp_path / "four-bit"
    shutil.copytree(tiny, four)
    method = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
    (four / "config.json").write_text(json.dumps({**config, "quantization_config": method}))
    assert "8-bit" in refusal(four)


def test_a_name_that_is_nowhere_is_refused_by_name():
    assert "no-such-base" in refusal("no-such-base")

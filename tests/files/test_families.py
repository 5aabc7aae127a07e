"""Every family that people have as a base, on the reference path, with the settings of its published models.

load_backbone(folder, ...) + a linear head is transformers' own classifier; LoRA on it is PEFT's
quantize.py, train.py and infer.py take each

Compared with: transformers' AutoModelForSequenceClassification with PEFT's LoRA: logits and gradients, with
padding on the left.
"""

import json

import pytest
import torch
import transformers
from bases import SIZES, write_tokenizer_folder
from helpers import CPU, write_pairs
from peft import LoraConfig, get_peft_model

import infer
import quantize
import train
from minarena.files.base import load_backbone
from minarena.lora import PROJECTIONS
from minarena.model import AdapterConfig, PreferenceModel, attach_adapter_
from minarena.tiny import demo_pairs

IDS = torch.randint(4, 260, (3, 48), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, :20] = MASK[2, :5] = 0  # left padding
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
CAPS = dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0, sliding_window=16)
# name: (transformers' classes, settings of the published model that are not the class's defaults)
FAMILIES = {
    "Qwen3": ("Qwen3", dict(rope_theta=1e6)),
    "Mistral-7B": ("Mistral", dict(sliding_window=16)),
    "Mistral-7B-v0.3": ("Mistral", dict(sliding_window=None, rope_theta=1e6)),
    "Llama-3.1": (
        "Llama",
        dict(rope_scaling=LLAMA3 | dict(original_max_position_embeddings=32), rope_theta=5e5),
    ),
    "Qwen2.5 with YaRN": (
        "Qwen2",
        dict(
            rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32),
            rope_theta=1e6,
        ),
    ),
    "Qwen2.5, upper layers windowed": (
        "Qwen2",
        dict(use_sliding_window=True, sliding_window=16, max_window_layers=1, rope_theta=1e6),
    ),
    "Gemma-2-2B": ("Gemma2", dict(CAPS, head_dim=32, query_pre_attn_scalar=32)),
    "Gemma-2-27B": ("Gemma2", dict(CAPS, head_dim=16, query_pre_attn_scalar=14)),
    "Gemma-3-1B": (
        "Gemma3Text",
        dict(
            sliding_window=16, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=16
        ),
    ),
}


def classifier(name: str, labels: int = 2):
    family, settings = FAMILIES[name]
    settings = SIZES | dict(initializer_range=0.1, pad_token_id=0, eos_token_id=1, bos_token_id=2) | settings
    if family == "Qwen2":
        settings.pop("head_dim")
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**settings, num_labels=labels)
    model = transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    for parameter_name, p in model.named_parameters():
        if parameter_name.endswith(".bias"):
            torch.nn.init.normal_(p)
    return model.eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_gradients_are_those_of_transformers_and_peft(name, tmp_path):
    theirs = classifier(name)
    theirs.save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=3, lora_alpha=7, target_modules=list(PROJECTIONS), modules_to_save=["score"])
    theirs = get_peft_model(theirs, lora).eval()
    ours = PreferenceModel(load_backbone(str(tmp_path / "base"), CPU, torch.float32, quantize=False), None)
    attach_adapter_(ours, AdapterConfig(r=3, alpha=7.0, head="linear"))
    generator = torch.Generator().manual_seed(1)
    names = {}
    for parameter_name, p in theirs.named_parameters():
        if p.requires_grad:
            own = parameter_name.removeprefix("base_model.model.").replace(".default", "")
            names[own.replace(".modules_to_save", "")] = p
            p.data.normal_(0, 0.1, generator=generator)
    for own, p in names.items():
        ours.get_parameter(own).data.copy_(p.data)
    positions = (MASK.cumsum(dim=1) - 1).clamp(min=0)
    expected = theirs(input_ids=IDS, attention_mask=MASK, position_ids=positions).logits
    logits = ours.eval()(IDS, MASK)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    for result in (logits, expected):
        result[:, 0].sub(result[:, 1]).sum().backward()
    assert len(names) == 2 * 14 + 1
    for own, p in names.items():
        scale = p.grad.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(ours.get_parameter(own).grad, p.grad, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("name", ["Llama-3.1", "Qwen2.5 with YaRN"])
def test_the_long_context_settings_are_not_lost(name, tmp_path):
    """Else the test above would prove nothing of them: without, the logits are others."""
    model = classifier(name)
    with torch.no_grad():
        with_rope = model(input_ids=IDS[:1]).logits
        plain = classifier(name)
        plain.config.rope_parameters = {"rope_type": "default", "rope_theta": 1e6}
        other = type(plain)(plain.config).eval()
        other.load_state_dict(model.state_dict())
        assert (other(input_ids=IDS[:1]).logits - with_rope).abs().max() > 1e-3


# The recipe's bases: (family, labels of a published classifier, class of the tokenizer, tokenizer's settings)
MISSION = {
    "gemma-2-9b-it": ("Gemma-2-2B", None, "GemmaTokenizer", dict(pad_token="<pad>")),
    "Qwen2.5-7B-Instruct": (
        "Qwen2.5 with YaRN",
        None,
        "Qwen2Tokenizer",
        dict(pad_token="<pad>", bos_token=None),
    ),
    "DeepSeek-R1-Distill-Qwen-7B": ("Qwen2.5, upper layers windowed", None, "LlamaTokenizerFast", {}),
    "FsfairX-Gemma2-RM": ("Gemma-2-2B", 1, "GemmaTokenizer", dict(pad_token="<pad>")),
}


@pytest.mark.parametrize("name", MISSION)
def test_the_recipes_bases_go_through_all_three_commands(name, tmp_path):
    """Training on the 8-bit folder is training on the base, quantized when it is loaded: to the last bit."""
    family, labels, class_name, settings = MISSION[name]
    model = classifier(family, labels or 2)
    model.resize_token_embeddings(400)
    base = tmp_path / "base"
    if labels is None:  # a causal model
        causal = transformers.AutoModelForCausalLM.from_config(model.config)
        causal.model.load_state_dict(model.model.state_dict())
        model = causal
    write_tokenizer_folder(base, "digits by three", class_name, "llama", **settings)
    model.to(torch.bfloat16).save_pretrained(base)
    data = write_pairs(tmp_path / "data.parquet", demo_pairs(24, seed=5))
    quantized = quantize.main(["--model", str(base), "--out", str(tmp_path / "8bit")])
    assert quantized["head"] == "new"
    assert (tmp_path / "8bit" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    losses = []
    for folder in (base, tmp_path / "8bit"):
        out = tmp_path / f"run-{folder.name}"
        words = ["--model", str(folder), "--data", data, "--out", str(out), "--max-length", "200"]
        train.main([*words, "--batch-size", "8", "--n-splits", "4", "--lr", "0.01", "--lora-r", "4"])
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        losses.append([event["loss"] for event in log if event["event"] == "step"])
    assert losses[0] == losses[1] and len(losses[0]) == 3
    words = ["--adapter", str(tmp_path / "run-8bit"), "--data", data, "--out", str(tmp_path / "out.csv")]
    assert infer.main(words)["rows"] == 24

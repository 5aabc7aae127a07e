"""8-bit folders and adapters that other tools wrote: each works as transformers or PEFT would, or is refused.

load_backbone(folder, ...)     what is 8-bit is decided by the files, not by config.json
load_adapter_(model, folder)   targets as names, whole names or patterns; a head of another kind is refused

Compared with: a float model that has the dequantized numbers of the files, and PEFT's model with the same
adapter.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from bases import random_base, write_base
from helpers import CPU
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from minarena.files.adapter import load_adapter_
from minarena.files.base import load_backbone
from minarena.int8 import dequantize, quantize
from minarena.lora import PROJECTIONS
from minarena.model import AdapterConfig, PreferenceModel, attach_adapter_
from minarena.quantization.stream import convert, open_source

IDS = torch.randint(4, 260, (2, 19), generator=torch.Generator().manual_seed(0))
CLASSIFIER, CAUSAL = AutoModelForSequenceClassification, AutoModelForCausalLM

# ------------------------------------------------------------------------------ 8-bit folders

# (class, settings of BitsAndBytesConfig, how many of the 14 projections lie in 8-bit)
EIGHT_BIT = {
    "as usual": (CLASSIFIER, {}, 14),
    "o_proj kept in floats": (CLASSIFIER, {"llm_int8_skip_modules": ["score", "o_proj"]}, 12),
    "a layer kept in floats": (CLASSIFIER, {"llm_int8_skip_modules": ["score", "model.layers.0"]}, 7),
    "the classifier's head in 8-bit": (CLASSIFIER, {"llm_int8_skip_modules": []}, 14),
    "the LM head in 8-bit": (CAUSAL, {"llm_int8_skip_modules": []}, 14),
    "called 8-bit, kept in fp16": (CLASSIFIER, {"llm_int8_has_fp16_weight": True}, 0),
    "called 8-bit, prepared for offloading": (CLASSIFIER, {"llm_int8_enable_fp32_cpu_offload": True}, 0),
}


def write_8bit(kind: str, folder: Path) -> tuple[str, int]:
    auto, settings, stored = EIGHT_BIT[kind]
    labels = 2 if auto is CLASSIFIER else None
    base = write_base("llama", folder / "float", torch.bfloat16, labels=labels)
    config = BitsAndBytesConfig(load_in_8bit=True, **settings)
    auto.from_pretrained(base, quantization_config=config, device_map={"": "cpu"}).save_pretrained(
        folder / "8"
    )
    for file in Path(base).glob("tokenizer*"):
        shutil.copy(file, folder / "8")
    return str(folder / "8"), stored


def expected_hidden(folder: str, quantized: bool) -> torch.Tensor:
    """The last hidden state by the numbers that lie in the files, in fp32."""
    stored = load_file(f"{folder}/model.safetensors")
    model = random_base("llama", seed=9).model
    for name, p in model.named_parameters():
        tensor, scale = stored[f"model.{name}"], stored.get(f"model.{name}".removesuffix("weight") + "SCB")
        if (
            scale is None and not quantized and name.endswith("proj.weight")
        ):  # we quantize what is all in floats
            tensor, scale = quantize(tensor)
        p.data = tensor.float() if scale is None else dequantize(tensor, scale, torch.float32)
    with torch.no_grad():
        return model(IDS).last_hidden_state[:, -1]


@pytest.mark.parametrize("kind", EIGHT_BIT)
def test_a_folder_is_taken_as_its_files_are(kind, tmp_path):
    folder, stored = write_8bit(kind, tmp_path)
    in_files = load_file(f"{folder}/model.safetensors")
    assert sum(t.dtype == torch.int8 and "proj" in name for name, t in in_files.items()) == stored
    model = PreferenceModel(load_backbone(folder, CPU, torch.float32), torch.nn.Identity())
    with torch.no_grad():
        hidden = model.eval()(IDS, torch.ones_like(IDS))
    torch.testing.assert_close(hidden, expected_hidden(folder, stored > 0), rtol=1e-4, atol=1e-4)
    for matmul in ("dequant", "llm-int8"):  # and it can be trained
        model = PreferenceModel(load_backbone(folder, CPU, torch.float32, matmul=matmul), torch.nn.Identity())
        attach_adapter_(model, AdapterConfig(r=2))
        model.train()(IDS, torch.ones_like(IDS)).sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", EIGHT_BIT)
def test_quantize_takes_such_a_folder_or_names_the_tensor(kind, tmp_path):
    folder, stored = write_8bit(kind, tmp_path)
    if kind == "the classifier's head in 8-bit":
        with pytest.raises(ValueError, match=r"tensor score\.weight is stored as I8"):
            open_source(folder)
        return
    (tmp_path / "out").mkdir()
    assert len(convert(open_source(folder), tmp_path / "out")) == 14 - stored
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(t.dtype == torch.int8 for t in written.values()) == 14
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")


def test_a_two_label_classifier_does_not_keep_a_reward_models_settings(tmp_path):
    base = Path(write_base("gemma2", tmp_path / "base", labels=1))
    config = json.loads((base / "config.json").read_text())
    config |= {"problem_type": "regression", "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    (base / "config.json").write_text(json.dumps(config))
    for labels, kind in ((2, None), (1, "regression")):
        (tmp_path / str(labels)).mkdir()
        convert(open_source(str(base), labels=labels), tmp_path / str(labels))
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / str(labels))
        assert model.config.problem_type == kind and model.config.num_labels == labels
        assert len(model.config.id2label) == len(model.config.label2id) == labels
    model(IDS[:, :5], labels=torch.zeros(2, 1)).loss.item()


# ------------------------------------------------------------------------------ adapters

FULL = [
    f"model.layers.{i}.{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}"
    for i in (0, 1)
    for name in PROJECTIONS
]
TARGETS = {
    "all-linear": {"target_modules": "all-linear"},
    "a pattern": {"target_modules": r".*\.(q|k|v|o|gate|up|down)_proj"},
    "whole names": {"target_modules": FULL},
    "whole names of the upper layer": {"target_modules": FULL[7:]},
    "names with their parent": {"target_modules": [name.split(".", 3)[3] for name in FULL[:7]]},
    "a head that is targeted and saved": {"target_modules": [*PROJECTIONS, "score"]},
    "nothing excluded": {"target_modules": list(PROJECTIONS), "exclude_modules": ["lm_head"]},
    "a layers pattern": {
        "target_modules": list(PROJECTIONS),
        "layers_to_transform": [1],
        "layers_pattern": "layers",
    },
}


def write_adapter(folder: Path, base=None, **settings):
    base = base or random_base("llama", labels=2)
    lora = {"r": 4, "lora_alpha": 11, "task_type": "SEQ_CLS", "target_modules": list(PROJECTIONS), **settings}
    model = get_peft_model(base, LoraConfig(**lora))
    generator = torch.Generator().manual_seed(3)
    for p in model.parameters():
        if p.requires_grad:
            p.data.normal_(0, 0.1, generator=generator)
    model.save_pretrained(folder)
    return model


def plain_model(tmp_path) -> PreferenceModel:
    base = write_base("llama", tmp_path / "base", labels=2)
    return PreferenceModel(load_backbone(base, CPU, torch.float32, quantize=False), torch.nn.Identity())


@torch.no_grad()
@pytest.mark.parametrize("kind", TARGETS)
def test_targets_in_any_form_give_pefts_logits(kind, tmp_path):
    model = plain_model(tmp_path)
    write_adapter(tmp_path / "adapter", **TARGETS[kind])
    theirs = PeftModel.from_pretrained(random_base("llama", labels=2), tmp_path / "adapter").eval()
    theirs.config.pad_token_id = 0
    load_adapter_(model, tmp_path / "adapter")
    ours = model.eval()(IDS, torch.ones_like(IDS))
    torch.testing.assert_close(ours, theirs(IDS).logits, rtol=1e-5, atol=1e-5)
    source = open_source(str(tmp_path / "base"), str(tmp_path / "adapter"))
    assert source.head == "adapter" and len(source.merge.matrices) in (7, 14)


def test_an_adapter_of_a_bare_backbone_is_merged(tmp_path):
    base = write_base("llama", tmp_path / "base", labels=2)
    write_adapter(tmp_path / "adapter", random_base("llama").model, task_type="FEATURE_EXTRACTION")
    source = open_source(base, str(tmp_path / "adapter"))
    assert len(source.merge.matrices) == 14 and source.head == "base"


def renamed(old: str, new: str):
    def change(tensors: dict) -> dict:
        return {name.replace(old, new): tensor for name, tensor in tensors.items()}

    return change


HEADS = {
    "another name": renamed("score.weight", "classifier.weight"),
    "PEFT's name in memory": renamed("score.weight", "score.modules_to_save.default.weight"),
    "a third kind": renamed("score.weight", "score.0.weight"),
    "a bias": lambda t: t | {"base_model.model.score.bias": torch.ones(2)},
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_of_another_kind_is_not_taken_for_one_of_ours(kind, tmp_path):
    model = plain_model(tmp_path)
    write_adapter(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(HEADS[kind](load_file(path)), path)
    named = "classifier.weight" if kind == "another name" else "is of no head that we know"
    for load in (
        lambda: load_adapter_(model, tmp_path / "adapter"),
        lambda: open_source(str(tmp_path / "base"), str(tmp_path / "adapter")),
    ):
        with pytest.raises(ValueError, match=named) as error:
            load()
        assert str(tmp_path / "adapter") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"alora_invocation_tokens": [1, 2]},
        {"trainable_token_indices": [1, 2]},
        {"lora_bias": True},
        {"use_a_thing_of_tomorrow": {"scale": 3}},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_that_mean_another_product_are_refused_by_both(settings, tmp_path):
    model = plain_model(tmp_path)
    write_adapter(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    for load in (
        lambda: load_adapter_(model, tmp_path / "adapter"),
        lambda: open_source(str(tmp_path / "base"), str(tmp_path / "adapter")),
    ):
        with pytest.raises(ValueError, match=next(iter(settings))):
            load()

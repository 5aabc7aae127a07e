"""A text model inside a checkpoint that reads pictures, too, as Gemma-3 4B, 12B and 27B are published.

load_backbone(folder, ...)    its text part, strictly; the other parts are left out
quantize.py writes an ordinary text classifier of it

Compared with: transformers' whole model on text, hidden states and gradients.
"""

import json
from pathlib import Path

import pytest
import torch
import transformers
from bases import SIZES
from helpers import CPU, write_pairs
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

import infer
import quantize
import train
from minarena.files.adapter import load_adapter_
from minarena.files.base import load_backbone, read_config
from minarena.files.tokenizer import load_tokenizer
from minarena.lora import PROJECTIONS
from minarena.model import PreferenceModel
from minarena.quantization.stream import open_source
from minarena.tiny import byte_tokenizer, demo_pairs

IDS = torch.randint(4, 260, (2, 40), generator=torch.Generator().manual_seed(0))
TEXT = SIZES | dict(initializer_range=0.05)
FAMILIES = {
    "gemma3": dict(
        text_config=TEXT
        | dict(
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"],
            rope_scaling={"factor": 8.0, "rope_type": "linear"},
            query_pre_attn_scalar=16,
        ),
        vision_config=dict(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        ),
        mm_tokens_per_image=4,
    ),
    "mistral3": dict(
        text_config=TEXT | dict(model_type="mistral", sliding_window=None),
        vision_config=dict(
            model_type="pixtral",
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        ),
    ),
}
CLASSES = {"gemma3": "Gemma3", "mistral3": "Mistral3"}


def whole_model(family: str):
    torch.manual_seed(0)
    config = getattr(transformers, f"{CLASSES[family]}Config")(**FAMILIES[family])
    return getattr(transformers, f"{CLASSES[family]}ForConditionalGeneration")(config).eval()


def write_multimodal(family: str, folder: Path, naming: str = "published", dtype=torch.float32) -> str:
    """Names as published, `language_model.model.layers...`, or the model's own, `model.language_model...`."""
    model = whole_model(family).to(dtype)
    model.save_pretrained(folder)
    published = load_file(folder / "model.safetensors")
    assert "language_model.model.norm.weight" in published and any(
        "vision_tower" in name for name in published
    )
    if naming == "own":
        own = {name: t.clone() for name, t in model.state_dict().items() if name != "lm_head.weight"}
        save_file(own, folder / "model.safetensors", {"format": "pt"})
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("naming", ["published", "own"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_part_computes_what_the_whole_model_computes_on_text(family, naming, tmp_path):
    base = write_multimodal(family, tmp_path / "base", naming)
    backbone = load_backbone(base, CPU, torch.float32, quantize=False)
    whole = whole_model(family).model
    with torch.no_grad():
        expected = whole(input_ids=IDS, attention_mask=torch.ones_like(IDS)).last_hidden_state
        torch.testing.assert_close(backbone(IDS).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
    assert backbone.state_dict().keys() == whole.language_model.state_dict().keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tensor_that_is_missing_or_has_no_place_is_named(family, tmp_path):
    base = write_multimodal(family, tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    for changed, words in (
        (
            {k: t for k, t in tensors.items() if k != name},
            "the weights lack model.layers.1.mlp.up_proj.weight",
        ),
        (tensors | {"language_model.model.more": torch.ones(2)}, "language_model.model.more has no place"),
        (tensors | {"audio_tower.weight": torch.ones(2)}, r"audio_tower\.weight has no place"),
    ):
        save_file(changed, path, {"format": "pt"})
        for load in (lambda: load_backbone(base, CPU, torch.float32), lambda: open_source(base)):
            with pytest.raises(ValueError, match=words):
                load()


@pytest.mark.parametrize("family", FAMILIES)
def test_all_three_commands_take_it(family, tmp_path):
    """Training on the 8-bit folder is training on the base, quantized when it is loaded: to the last bit."""
    base = write_multimodal(family, tmp_path / "base", dtype=torch.bfloat16)
    data = write_pairs(tmp_path / "data.parquet", demo_pairs(40, seed=5))
    quantize.main(["--model", base, "--out", str(tmp_path / "out")])
    losses = {}
    for name in ("base", "out"):
        options = ["--model", str(tmp_path / name), "--data", data, "--out", str(tmp_path / f"run-{name}")]
        train.main([*options, "--batch-size", "8", "--n-splits", "5", "--lr", "0.01", "--lora-r", "4"])
        log = (tmp_path / f"run-{name}" / "log.jsonl").read_text().splitlines()
        losses[name] = [event["loss"] for event in map(json.loads, log) if event["event"] == "step"]
    assert len(losses["out"]) == 4 and losses["out"] == losses["base"]
    result = infer.main(
        ["--adapter", str(tmp_path / "run-out"), "--data", data, "--out", str(tmp_path / "submission.csv")]
    )
    assert result["rows"] == 40
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert classifier.config.model_type == read_config(base).model_type
    ids = load_tokenizer(str(tmp_path / "out"))("a text")["input_ids"]
    assert ids == load_tokenizer(base)("a text")["input_ids"]


def test_an_adapter_that_peft_trained_on_the_whole_model_is_taken(tmp_path):
    base = write_multimodal("gemma3", tmp_path / "base")
    targets = rf".*language_model.*\.({'|'.join(PROJECTIONS)})"
    model = get_peft_model(whole_model("gemma3"), LoraConfig(r=4, lora_alpha=11, target_modules=targets))
    for p in model.parameters():
        if p.requires_grad:
            p.data.normal_(0, 0.05)
    model.save_pretrained(tmp_path / "adapter")
    assert len(open_source(base, str(tmp_path / "adapter")).merge.matrices) == 14
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.score.weight": torch.ones(2, 56)}, path)
    ours = PreferenceModel(load_backbone(base, CPU, torch.float32, quantize=False), torch.nn.Identity())
    load_adapter_(ours, tmp_path / "adapter")
    with torch.no_grad():
        hidden = model.eval().base_model.model.model(input_ids=IDS, attention_mask=torch.ones_like(IDS))
        expected = hidden.last_hidden_state[:, -1] @ torch.ones(56, 2)
        torch.testing.assert_close(ours.eval()(IDS, torch.ones_like(IDS)), expected, rtol=1e-4, atol=1e-4)


def test_other_models_of_several_parts_are_still_refused(tmp_path):
    base = Path(write_multimodal("gemma3", tmp_path / "base"))
    config = json.loads((base / "config.json").read_text()) | {"model_type": "paligemma"}
    (base / "config.json").write_text(json.dumps(config))
    for load in (lambda: load_backbone(str(base), CPU, torch.float32), lambda: open_source(str(base))):
        with pytest.raises(ValueError, match=f"--model {base}: ") as error:
            load()
        assert "\n" not in str(error.value)

"""An earlier LoRA adapter, ours or one as PEFT writes it, merged into the base before it is quantized.

merge = read_merge(folder, shapes)        shapes: name -> shape of the base's tensors
merge.matrices["model.layers.0.mlp.up_proj"] -> A (r, in), B (out, r), scale
merged_weight(W, A, B, scale) -> W + scale * B A, in fp32
open_source(base, adapter) does both for a base, and float_rows(source, name, device) shows the merged matrix.
The oracle is PEFT: it makes each adapter here and merges it itself. Whatever cannot be merged is refused.
"""

import json
import math
from pathlib import Path

import peft
import pytest
import torch
from bases import random_base, write_base
from safetensors.torch import load_file, save_file
from test_stream import by_transformers, tensors_of

from minarena.files.adapter import save_adapter
from minarena.int8 import dequantize
from minarena.lora import PROJECTIONS, is_projection, merged_weight
from minarena.model import AdapterConfig, PreferenceModel, attach_adapter_
from minarena.quantization.merge import read_merge
from minarena.quantization.stream import convert, float_rows, open_source

VARIANTS = {
    "plain": {},
    "rank_pattern": {
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 5, r".*\.0\.self_attn\.v_proj": 7}
    },
    "alpha_pattern": {"alpha_pattern": {"1.self_attn.q_proj": 32, "up_proj": 1}},
    "both patterns, rsLoRA": {
        "rank_pattern": {"k_proj": 6},
        "alpha_pattern": {"k_proj": 9},
        "use_rslora": True,
    },
    "rsLoRA": {"use_rslora": True},
    "some projections": {"target_modules": ["q_proj", "down_proj"]},
    "targets as a pattern": {"target_modules": r".*\.1\..*_proj"},
    "one layer": {"layers_to_transform": [1]},
    "one layer as a number": {"layers_to_transform": 0},
    "without some": {"exclude_modules": ["layers.0.self_attn.q_proj"]},
    "norm and embeddings saved whole": {"modules_to_save": ["score", "norm", "embed_tokens"]},
    "gaussian": {"init_lora_weights": "gaussian"},
}


def write_adapter(model, folder, seed: int = 1, **changes):
    """Put a LoRA with random matrices onto a transformers model by PEFT and save it; returns PEFT's model."""
    settings = dict(r=4, lora_alpha=11, target_modules=list(PROJECTIONS), task_type="SEQ_CLS") | changes
    model = peft.get_peft_model(model, peft.LoraConfig(**settings))
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.3 if "lora" in name else 1.0)
    model.save_pretrained(folder)
    return model


def merged_by_peft(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in model.merge_and_unload().state_dict().items()}


def edited(folder, **changes) -> str:
    """The adapter with other settings."""
    path = Path(folder) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return str(folder)


def without(folder, part: str) -> str:
    path = Path(folder) / "adapter_model.safetensors"
    tensors = load_file(path)
    kept = {name: tensor.clone() for name, tensor in tensors.items() if part not in name}
    assert len(kept) < len(tensors)
    save_file(kept, path)
    return str(folder)


def test_the_merged_weight_by_hand():
    W = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    A, B = torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0], [10.0]])
    assert merged_weight(W, A, B, 0.5).tolist() == [[2.0, 1.0], [8.0, -1.0]]
    assert merged_weight(W.bfloat16(), A.half(), B, 0.5).dtype == torch.float32


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["gemma2", "qwen2"])
def test_every_merged_matrix_is_pefts(family, variant, tmp_path):
    base = write_base(family, tmp_path / "base", labels=2)
    model = write_adapter(random_base(family, labels=2), tmp_path / "adapter", **VARIANTS[variant])
    source = open_source(base, str(tmp_path / "adapter"))
    wanted, before = merged_by_peft(model), tensors_of(base)
    changed = 0
    for name in filter(is_projection, source.shapes):
        W = torch.cat([*float_rows(source, name, "cpu")])
        torch.testing.assert_close(W, wanted[name], rtol=0, atol=1e-5)
        changed += not torch.allclose(W, before[name], atol=1e-3)
    assert changed == len(source.merge.matrices) > 0
    for name in source.shapes.keys() - set(filter(is_projection, source.shapes)):
        assert torch.equal(source.read(name), wanted[name]), name
    assert source.head == "adapter"


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "llama", "qwen2"])
def test_merged_and_quantized_once_is_within_one_step_of_peft_then_transformers(family, tmp_path):
    base = write_base(family, tmp_path / "base", torch.bfloat16, labels=2)
    model = write_adapter(random_base(family, torch.bfloat16, labels=2).float(), tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "float")
    theirs = tensors_of(by_transformers(str(tmp_path / "float"), tmp_path / "theirs", labels=2))
    (tmp_path / "ours").mkdir()
    convert(open_source(base, str(tmp_path / "adapter")), tmp_path / "ours")
    ours = tensors_of(tmp_path / "ours")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        if tensor.dtype == torch.int8:
            steps = (tensor.int() - theirs[name].int()).abs()
            assert steps.max() <= 1
            assert (steps > 0).float().mean() < 0.01  # rounding at the edge, not another matrix
        elif name.endswith(".SCB"):  # the largest |w| of a row, rounded to fp16 by both
            torch.testing.assert_close(tensor, theirs[name], rtol=2**-10, atol=0)


def test_our_own_adapter_is_merged_with_its_scale(tmp_path):
    """Against the model that computes with the adapter unmerged; the head of two linears has no place."""
    base = write_base("gemma2", tmp_path / "base")
    model = PreferenceModel(random_base("gemma2").model, torch.nn.Identity())
    config = AdapterConfig(r=4, alpha=6.0)
    attach_adapter_(model, config)
    for module in model.modules():
        if hasattr(module, "lora_B"):
            torch.nn.init.normal_(module.lora_B.weight, std=0.3)
    save_adapter(tmp_path / "adapter", model, config, base)
    source = open_source(base, str(tmp_path / "adapter"))
    assert source.head == "new"
    assert len(source.merge.matrices) == 14
    for name in source.merge.matrices:
        linear = model.get_submodule(name).eval()
        x = torch.eye(linear.base_layer.in_features)
        W = torch.cat([*float_rows(source, f"{name}.weight", "cpu")])
        torch.testing.assert_close(linear(x).T, W, rtol=0, atol=1e-5)


def test_a_head_of_another_number_of_labels_in_the_adapter_gives_a_new_one(tmp_path):
    """The seed's case: three labels were trained, two are wanted. The base's own head is outdated, too."""
    base = write_base("gemma2", tmp_path / "base", labels=2)
    (tmp_path / "three").mkdir()
    write_adapter(random_base("gemma2", labels=3), tmp_path / "adapter")
    assert open_source(base, str(tmp_path / "adapter"), labels=2).head == "new"
    assert open_source(base, str(tmp_path / "adapter"), labels=3).head == "adapter"
    assert open_source(base, labels=2).head == "base"


def test_an_adapter_of_a_causal_model_merges_without_its_lm_head(tmp_path):
    base = write_base("llama", tmp_path / "base")
    model = write_adapter(
        random_base("llama"), tmp_path / "adapter", task_type="CAUSAL_LM", modules_to_save=["lm_head"]
    )
    source, wanted = open_source(base, str(tmp_path / "adapter")), merged_by_peft(model)
    assert source.head == "new"
    for name in filter(is_projection, source.shapes):
        W = torch.cat([*float_rows(source, name, "cpu")])
        torch.testing.assert_close(W, wanted[name], rtol=0, atol=1e-5)


def test_merging_onto_an_8bit_base_starts_from_its_dequantized_weights(tmp_path):
    base = by_transformers(write_base("llama", tmp_path / "base"), tmp_path / "base8", labels=2)
    (tmp_path / "base" / "tokenizer.json").rename(tmp_path / "base8" / "tokenizer.json")
    (tmp_path / "base" / "tokenizer_config.json").rename(tmp_path / "base8" / "tokenizer_config.json")
    model = write_adapter(random_base("llama", labels=2), tmp_path / "adapter", target_modules=["q_proj"])
    source = open_source(base, str(tmp_path / "adapter"))
    (tmp_path / "out").mkdir()
    errors = convert(source, tmp_path / "out")
    assert sorted(errors) == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    old, new, tensors = (
        tensors_of(base),
        tensors_of(tmp_path / "out"),
        load_file(tmp_path / "adapter" / "adapter_model.safetensors"),
    )
    assert model.peft_config["default"].lora_alpha == 11
    for name, tensor in old.items():
        module = name.rpartition(".")[0]
        if module not in errors:
            assert name == "score.weight" or torch.equal(new[name], tensor), name
            continue
        A, B = (tensors[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB")
        W = old[f"{module}.weight"].double() * old[f"{module}.SCB"].double()[:, None] / 127 + 11 / 4 * B @ A
        W8 = dequantize(new[f"{module}.weight"], new[f"{module}.SCB"], torch.float32)
        step = new[f"{module}.SCB"][:, None] / 127
        assert ((W8 - W).abs() <= 0.6 * step).all()  # half a step, and fp16 before it


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"target_modules": [*PROJECTIONS, "embed_tokens"]}, "embed_tokens"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"peft_type": "IA3"}, "peft_type is not LORA"),
        ({"target_modules": [*PROJECTIONS, "query_key_value"]}, "'query_key_value' is no projection"),
        ({"target_modules": ["q_proj"]}, "down_proj is not among the adapter's targets"),
        ({"rank_pattern": {"q_proj(": 4}}, r"config.json is damaged: .*unterminated subpattern .*q_proj\("),
        ({"alpha_pattern": {"[": 4}}, r"adapter_config.json is damaged: unterminated character set"),
        ({"target_modules": "*"}, r"adapter_config.json is damaged: nothing to repeat at position 0 in '\*'"),
        ({"exclude_modules": "("}, r"adapter_config.json is damaged: missing \)"),
        ({"alpha_pattern": {"q_proj": "much"}}, r"adapter_config.json is damaged: unsupported operand"),
        ({"rank_pattern": ["q_proj"]}, r"adapter_config.json is damaged: 'list' object"),
        ({"modules_to_save": 5}, r"adapter_config.json is damaged: .*'int'"),
        ({"r": 8}, r"lora_A.weight is \(4, 100\), this base and the adapter's rank need \(8, 100\)"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name(changes, named, tmp_path):
    base = write_base("gemma2", tmp_path / "base", labels=2)
    write_adapter(random_base("gemma2", labels=2), tmp_path / "adapter")
    edited(tmp_path / "adapter", **changes)
    with pytest.raises(ValueError, match=named) as error:
        open_source(base, str(tmp_path / "adapter"))
    assert str(tmp_path / "adapter") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "part, named",
    [
        ("layers.1.mlp.up_proj.lora_B", "model.layers.1.mlp.up_proj.lora_B.weight is missing"),
        ("layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj has no tensors in the file"),
        ("score", "modules_to_save 'score' has no tensors"),
    ],
)
def test_an_adapter_with_a_part_missing_is_refused(part, named, tmp_path):
    base = write_base("gemma2", tmp_path / "base", labels=2)
    write_adapter(random_base("gemma2", labels=2), tmp_path / "adapter")
    with pytest.raises(ValueError, match=named):
        open_source(base, without(tmp_path / "adapter", part))


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"hidden_size": 64}, r"another size"),
        ({"intermediate_size": 104}, r"mlp\.\w+_proj\.lora_[AB]\.weight is .*another size"),
        ({"num_hidden_layers": 3}, r"layers\.2\..* is no projection of this base"),
        ({"vocab_size": 300}, r"embed_tokens.weight is \(300, 56\), the base's is \(261, 56\)"),
    ],
)
def test_an_adapter_of_another_size_is_refused_with_the_tensor(changes, named, tmp_path):
    base = write_base("llama", tmp_path / "base", labels=2)
    saved = {"modules_to_save": ["score", "embed_tokens"]} if "vocab_size" in changes else {}
    write_adapter(random_base("llama", labels=2, **changes), tmp_path / "adapter", **saved)
    with pytest.raises(ValueError, match=named):
        open_source(base, str(tmp_path / "adapter"))


def test_numbers_in_an_adapter_that_are_not_finite_are_refused(tmp_path):
    base = write_base("llama", tmp_path / "base", labels=2)
    write_adapter(random_base("llama", labels=2), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    for bad in (math.nan, math.inf, -math.inf):
        tensors[name][3, 1] = bad
        save_file(tensors, path)
        with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.lora_B\.weight has values"):
            read_merge(str(tmp_path / "adapter"), open_source(base).shapes)

"""A base is loaded whole, or refused by name: before any weight is read, by train.py and quantize.py alike.

load_backbone(folder, device, dtype)      each tensor has its place, each layer the seven projections
require_projections(model)                each layer has each of the seven once, and no other matrix
match_tensors(folder, stored, shapes)     the tensors that lie in the files against those of config.json

Compared with: transformers' own random models of these families; the tensors that were written.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from bases import SIZES, base_config, random_base, write_base
from helpers import CPU
from safetensors.torch import load_file, save_file
from test_bad_input import line_of

import quantize
import train
from minarena.batching import collate
from minarena.config import InferConfig
from minarena.files.base import check_length, load_backbone, load_base
from minarena.lora import require_projections
from minarena.quantization.stream import open_source
from minarena.tiny import byte_tokenizer

IDS = dict(pad_token_id=0, eos_token_id=1, bos_token_id=2)
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=32)
# family: (settings beside the usual sizes, what is named)
PARTLY = {
    "Phi3": ({}, "layers.0.self_attn.qkv_proj is a linear layer other"),
    "Glm4": ({}, "layers.0.mlp.gate_up_proj is a linear layer other"),
    "Mixtral": (dict(num_local_experts=4), "layers.0.mlp."),
    "Qwen2Moe": (dict(num_experts=4, shared_expert_intermediate_size=32, **EXPERTS), "layers.0.mlp."),
    "Qwen3Moe": (dict(num_experts=4, **EXPERTS), "layers.0.mlp."),
    "Starcoder2": ({}, "layers.0.mlp.c_fc is a linear layer other"),
}
WHOLE = ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "Gemma2", "Gemma3Text", "Olmo2"]


def tiny_model(family: str, **changes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **IDS, **changes)
    return transformers.AutoModelForCausalLM.from_config(config)


def write_model(model, folder: Path) -> str:
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def both_refuse(base, pairs_file: str, tmp_path: Path, monkeypatch) -> tuple[str, str]:
    """The lines of train.py and of quantize.py; neither leaves anything behind."""
    data = ["--data", pairs_file, "--n-splits", "8", "--out", str(tmp_path / "run")]
    lines = []
    for command, more in ((train, data), (quantize, ["--out", str(tmp_path / "8bit")])):
        lines.append(line_of(command, ["--model", str(base), *more], monkeypatch))
        assert str(base) in lines[-1] and len(lines[-1]) < 500
    assert not (tmp_path / "8bit").exists()
    return tuple(lines)


@pytest.mark.parametrize("family", PARTLY)
def test_a_base_that_lora_would_adapt_in_part_is_refused_by_name(family, pairs_file, tmp_path, monkeypatch):
    changes, named = PARTLY[family]
    base = write_model(tiny_model(family, **changes), tmp_path / "base")
    for line in both_refuse(base, pairs_file, tmp_path, monkeypatch):
        assert named in line


@pytest.mark.parametrize("family", WHOLE)
def test_a_base_with_the_seven_projections_is_loaded_as_transformers_loads_it(family, tmp_path):
    model = tiny_model(family)
    base = write_model(model, tmp_path / "base")
    loaded = load_backbone(base, CPU, torch.float32, quantize=False).state_dict()
    wanted = model.model.state_dict()
    assert loaded.keys() == wanted.keys()
    assert all(torch.equal(loaded[name], wanted[name]) for name in wanted)
    assert len(open_source(base).tensors) >= len(wanted)


def test_a_layer_that_lacks_a_projection_or_has_it_twice_is_named():
    model = tiny_model("Llama").model
    require_projections(model)
    model.layers[1].mlp.experts = torch.nn.ModuleDict({"up_proj": torch.nn.Linear(4, 4)})
    with pytest.raises(ValueError, match="layer 1 has more than one up_proj"):
        require_projections(model)
    del model.layers[1].mlp.experts
    model.layers[1].mlp.gate_proj = torch.nn.Identity()
    with pytest.raises(ValueError, match="layer 1 has no gate_proj"):
        require_projections(model)


# ------------------------------------------------------------------------------ weights that have no place

Q = "model.layers.1.self_attn.q_proj"
NO_PLACE = {
    "a bias under attention_bias: false": {f"{Q}.bias": torch.ones(64)},
    "a layer more": {"model.layers.2.mlp.up_proj.weight": torch.ones(100, 56)},
    "a norm of q": {"model.layers.0.self_attn.q_norm.weight": torch.ones(16)},
    "another head": {"value_head.weight": torch.ones(1, 56)},
    "LoRA, not merged": {f"{Q}.lora_A.weight": torch.ones(2, 56)},
}


def with_tensors(base: str, more: dict) -> str:
    save_file(load_file(f"{base}/model.safetensors") | more, f"{base}/model.safetensors", {"format": "pt"})
    return base


@pytest.mark.parametrize("name", NO_PLACE)
def test_a_tensor_without_a_place_is_refused_by_both_commands(name, pairs_file, tmp_path, monkeypatch):
    base = with_tensors(write_base("llama", tmp_path / "base"), NO_PLACE[name])
    for line in both_refuse(base, pairs_file, tmp_path, monkeypatch):
        assert f"model.safetensors: tensor {next(iter(NO_PLACE[name]))} has no place in a model" in line


def test_a_head_and_rotary_tables_are_left_out(tmp_path):
    base = write_base("llama", tmp_path / "base")
    wanted = load_backbone(base, CPU, torch.float32).state_dict()
    more = {"score.weight": torch.ones(1, 56), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    with_tensors(base, more)
    loaded = load_backbone(base, CPU, torch.float32).state_dict()
    assert loaded.keys() == wanted.keys()
    assert all(torch.equal(loaded[name], wanted[name]) for name in wanted)
    open_source(base)


def test_two_sets_of_weights_in_one_folder_are_refused(pairs_file, tmp_path, monkeypatch):
    """transformers would read model.safetensors, quantize.py the shards of the index."""
    random_base("llama", seed=1).save_pretrained(tmp_path / "base", max_shard_size="60KB")
    shutil.copy(Path(write_base("llama", tmp_path / "other")) / "model.safetensors", tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    for line in both_refuse(tmp_path / "base", pairs_file, tmp_path, monkeypatch):
        assert "model.safetensors, and model.safetensors.index.json names others: delete" in line
    (tmp_path / "base" / "model.safetensors").unlink()
    load_backbone(str(tmp_path / "base"), CPU, torch.float32)


def test_an_index_that_names_model_safetensors_itself_is_fine(tmp_path):
    base = write_base("llama", tmp_path / "base")
    keys = load_file(f"{base}/model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(keys, "model.safetensors")}
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    load_backbone(base, CPU, torch.float32)
    open_source(base)


# ------------------------------------------------------------------------------ numbers, tokens, lengths


@pytest.mark.parametrize(
    "value, words",
    [(float("nan"), "has NaN"), (float("-inf"), "has NaN or inf"), (7e4, "has values above 65,504")],
)
def test_a_number_that_is_none_is_the_bases_and_not_a_rows(value, words, pairs_file, tmp_path, monkeypatch):
    stored = load_file(Path(write_base("llama", tmp_path / "base")) / "model.safetensors")
    for name in (f"{Q}.weight", "model.norm.weight"):
        bad = stored[name].clone()
        bad.view(-1)[5] = value
        base = with_tensors(str(tmp_path / "base"), {name: bad})
        if "above" in words and "norm" in name:  # large, but nothing rounds a norm to fp16
            load_backbone(base, CPU, torch.float32)
        else:
            for line in both_refuse(base, pairs_file, tmp_path, monkeypatch):
                assert f"tensor {name} {words}" in line and "--resume" not in line
        with_tensors(base, {name: stored[name]})


def test_a_token_without_an_embedding_is_named_before_weights_are_read(pairs_file, tmp_path, monkeypatch):
    base = write_base("llama", tmp_path / "base", vocab_size=260)
    settings = json.loads((tmp_path / "base" / "tokenizer_config.json").read_text())
    added = {"260": {"content": "<tool>", "special": False}}
    (tmp_path / "base" / "tokenizer_config.json").write_text(
        json.dumps(settings | {"added_tokens_decoder": added})
    )
    monkeypatch.setattr("minarena.files.base.load_backbone", None)
    for line in both_refuse(base, pairs_file, tmp_path, monkeypatch):
        assert "its tokenizer has token 260, the model has 260 embeddings" in line


LONGROPE = dict(rope_type="longrope", short_factor=[1.0] * 8, long_factor=[4.0] * 8, factor=4.0)
ROPE = {
    "dynamic": (dict(rope_type="dynamic", factor=4.0), 64, 64),
    "longrope": (LONGROPE | dict(original_max_position_embeddings=32), 128, 32),
}


@torch.no_grad()
def moved_by_a_neighbour(model, short: int, long: int) -> float:
    """How far the short row's hidden state moves when a longer row joins its batch."""
    rows = [np.random.default_rng(i).integers(4, 260, n) for i, n in enumerate((short, long))]
    alone, both = (
        model(*collate(batch, 0), use_cache=False).last_hidden_state[0, -1] for batch in (rows[:1], rows)
    )
    return (alone - both).abs().max().item()


@pytest.mark.parametrize("kind", ROPE)
def test_rope_that_looks_at_the_longest_row_is_refused_beyond_its_length_and_right_up_to_it(kind):
    rope, positions, limit = ROPE[kind]
    config = base_config("llama", rope_scaling=rope, max_position_embeddings=positions)
    model = transformers.AutoModel.from_config(config).eval()
    assert moved_by_a_neighbour(model, 20, limit) < 1e-5
    assert moved_by_a_neighbour(model, 20, limit + 1) > 1e-3
    check_length(config, limit)
    with pytest.raises(ValueError, match=f"rope type '{kind}' .*: --max-length {limit} is fine"):
        check_length(config, limit + 1)


@pytest.mark.parametrize(
    "rope",
    [
        dict(rope_type="linear", factor=4.0),
        dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32),
        dict(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rope_that_is_fixed_works_at_any_length(rope, capsys):
    config = base_config("llama", rope_scaling=rope, max_position_embeddings=128)
    assert moved_by_a_neighbour(transformers.AutoModel.from_config(config).eval(), 20, 200) < 1e-5
    check_length(config, 128)
    assert not capsys.readouterr().err
    check_length(config, 129)
    assert "--max-length 129 is above the base's 128 positions" in capsys.readouterr().err


def test_the_commands_check_the_length_before_the_weights(tmp_path, monkeypatch):
    rope, positions, _ = ROPE["dynamic"]
    changes = dict(rope_scaling=rope, max_position_embeddings=positions)
    base = write_base("llama", tmp_path / "base", **changes)
    fits = InferConfig(model=base, dtype="fp32", matmul="dequant", max_length=64)
    load_base(fits, CPU, rows=None)
    monkeypatch.setattr("minarena.files.base.load_backbone", None)
    with pytest.raises(ValueError, match="--max-length 65"):
        load_base(replace(fits, max_length=65), CPU, rows=None)

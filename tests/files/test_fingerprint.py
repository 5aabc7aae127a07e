"""A base is known again: by its configuration, weights and tokenizer, not by its name.

fingerprint(folder, tokenizer)      {"config", "weights", "tokenizer"}: 16 digits each
differences(before, now)            the parts that changed; nothing is known of a run from before fingerprints

Compared with: folders that differ in one thing.
"""

import json
import shutil
from pathlib import Path

import pytest
from bases import random_base, write_base, write_tokenizer_folder
from safetensors.torch import load_file, save_file

from minarena.files.fingerprint import SAMPLE, differences, fingerprint
from minarena.files.tokenizer import ids_differ_from_transformers, load_tokenizer


def of(folder) -> dict[str, str]:
    return fingerprint(str(folder), load_tokenizer(str(folder)))


@pytest.fixture
def base(tmp_path) -> Path:
    return Path(write_base("llama", tmp_path / "base"))


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def one_merge(base: Path) -> None:
    """LoRA merged into one projection: all its numbers change a little."""
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"] += 1e-3
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


def the_middle_of_a_large_matrix(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    embeddings = tensors["model.embed_tokens.weight"]
    assert embeddings.numel() * embeddings.element_size() > 4 * SAMPLE
    embeddings[len(embeddings) // 2] += 1
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


def another_added_token(base: Path) -> None:
    """Said by tokenizer_config.json alone, and no special token."""
    new = {"content": "<new>", "special": False, "lstrip": False, "rstrip": False, "normalized": False}
    edit(base / "tokenizer_config.json", added_tokens_decoder={"300": new | {"single_word": False}})


def in_half_precision(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    save_file({k: t.half() for k, t in tensors.items()}, base / "model.safetensors", {"format": "pt"})


def another_token(base: Path) -> None:
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))


CHANGES = {
    "other weights": (lambda base: write_base("llama", base, seed=1), ["weights"]),
    "a merge into one matrix": (one_merge, ["weights"]),
    "the middle of a matrix": (the_middle_of_a_large_matrix, ["weights"]),
    "another added token": (another_added_token, ["tokenizer"]),
    "weights stored in fp16": (in_half_precision, ["weights"]),
    "another rope": (lambda base: edit(base / "config.json", rms_norm_eps=1e-3), ["config"]),
    "another pipeline": (another_token, ["tokenizer"]),
    "another EOS": (lambda base: edit(base / "tokenizer_config.json", eos_token="<bos>"), ["tokenizer"]),
    "another transformers": (lambda base: edit(base / "config.json", transformers_version="4.0"), []),
    "another chat template": (lambda base: edit(base / "tokenizer_config.json", chat_template="{{ x }}"), []),
    "another place": (lambda base: shutil.copytree(base, base.parent / "copy"), []),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changed_is_named(name, base):
    change, named = CHANGES[name]
    before = of(base)
    assert set(before) == {"config", "weights", "tokenizer"} and of(base) == before
    change(base)
    now = of(base.parent / "copy" if name == "another place" else base)
    assert differences(before, now) == named
    assert differences(None, now) == differences({}, now) == []


def test_another_sharding_is_the_same_base(base, tmp_path):
    random_base("llama").save_pretrained(tmp_path / "cut", max_shard_size="60KB")
    for file in base.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "cut")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 2
    assert differences(of(base), of(tmp_path / "cut")) == []


def test_little_of_a_large_file_is_read(base, monkeypatch):
    """The size of the samples, not of the tensors, is what is hashed."""
    hashed = []
    real = __import__("hashlib").sha256
    monkeypatch.setattr("hashlib.sha256", lambda data: hashed.append(len(data)) or real(data))
    monkeypatch.setattr("minarena.files.fingerprint.SAMPLE", 16)
    of(base)
    assert hashed[1] < 21 * (16 * 2 + 80) < (base / "model.safetensors").stat().st_size / 50


def test_a_run_whose_ids_change_with_this_code_is_known(tmp_path):
    write_tokenizer_folder(tmp_path / "changed", "digits by three", "LlamaTokenizerFast", "qwen2")
    assert ids_differ_from_transformers(str(tmp_path / "changed"))
    write_tokenizer_folder(tmp_path / "same", "digits by three", "LlamaTokenizerFast", "llama")
    assert not ids_differ_from_transformers(str(tmp_path / "same"))

"""A base's tokenizer: the ids of its own tokenizer.json, the special tokens of its configuration.

load_tokenizer(folder)                    a fast tokenizer with an EOS token, or a ValueError
write_tokenizer(tokenizer, folder, into)  the same tokenizer in another folder, tokenizer.json as it was
check_vocabulary(tokenizer, embeddings)   every token has an embedding

transformers rebuilds some tokenizers from the code of their class, without tokenizer.json's own pre-tokenizer
and normaliser. Compared with: tokenizers.Tokenizer.from_file, which knows no class and no configuration.
"""

import json
import shutil
from pathlib import Path

import pytest
from bases import PIPELINES, TEXTS, write_base, write_tokenizer_folder
from helpers import write_pairs
from tokenizers import Tokenizer
from transformers import AutoTokenizer

import infer
import minarena.text
import quantize
import train
from minarena.files.tokenizer import check_vocabulary, load_tokenizer, write_tokenizer
from minarena.text import TEMPLATE
from minarena.tiny import demo_pairs

CLASSES = ["GPT2Tokenizer", "GemmaTokenizer", "Qwen2Tokenizer", "LlamaTokenizerFast"]
FAMILIES = ["qwen2", "llama", "gemma2"]  # config.json's


def raw_ids(folder: Path, text: str) -> list[int]:
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    raw.encode_special_tokens = True  # a text's "<eos>" is text
    return raw.encode(text, add_special_tokens=False).ids


def our_ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("class_name", CLASSES)
def test_the_ids_are_those_of_tokenizer_json(class_name, family, pipeline, tmp_path):
    write_tokenizer_folder(tmp_path, pipeline, class_name, family)
    tokenizer = load_tokenizer(str(tmp_path))
    for text in [*TEXTS, "a user's <eos> and <bos>"]:
        assert our_ids(tokenizer, text) == raw_ids(tmp_path, text), text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (2, 1)


def test_transformers_own_ids_differ(tmp_path):
    """Else the test above would prove nothing."""
    write_tokenizer_folder(tmp_path, "digits by three", "LlamaTokenizerFast", "qwen2")
    by_class = AutoTokenizer.from_pretrained(tmp_path)
    assert type(by_class).__name__ == "Qwen2Tokenizer"
    assert any(our_ids(by_class, text) != raw_ids(tmp_path, text) for text in TEXTS)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_settings_of_the_configuration_stay(family, tmp_path):
    """Tokens that only tokenizer_config.json names, the chat template, and a truncation that is baked in."""
    added = {"331": {"content": "<tool>", "special": False}, "332": {"content": "<think>", "special": True}}
    more = {"pad_token": "<think>", "added_tokens_decoder": added, "chat_template": "{{ messages }}"}
    write_tokenizer_folder(tmp_path / "base", "digits by three", "Qwen2Tokenizer", family, **more)
    path = tmp_path / "base" / "tokenizer.json"
    raw = Tokenizer.from_file(str(path))
    raw.enable_truncation(max_length=5)
    raw.save(str(path))
    tokenizer = load_tokenizer(str(tmp_path / "base"))
    write_tokenizer(tokenizer, str(tmp_path / "base"), tmp_path / "copy")
    shutil.copy(tmp_path / "base" / "config.json", tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenizer.json").read_bytes() == path.read_bytes()
    for one in (tokenizer, load_tokenizer(str(tmp_path / "copy"))):
        assert (one.bos_token_id, one.eos_token_id, one.pad_token_id) == (2, 1, 332)
        assert one.convert_tokens_to_ids(["<tool>", "<think>"]) == [331, 332]
        assert one.chat_template == "{{ messages }}"
        assert our_ids(one, "a <tool>")[-1] == 331 and len(our_ids(one, TEXTS[0])) > 5


def test_a_special_token_that_only_the_class_names_is_taken_where_tokenizer_json_has_it(tmp_path):
    write_tokenizer_folder(tmp_path, "no words", "GemmaTokenizer", "gemma2", bos_token=None)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["eos_token"]  # GemmaTokenizer's own is <eos>
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_tokenizer(str(tmp_path)).eos_token_id == 1
    qwen = write_tokenizer_folder(tmp_path / "qwen", "no words", "Qwen2Tokenizer", "qwen2")
    assert load_tokenizer(str(qwen)).pad_token_id is None  # Qwen2Tokenizer's <|endoftext|> is not there


def test_a_folder_without_tokenizer_json_is_taken_as_transformers_takes_it(tmp_path):
    write_tokenizer_folder(tmp_path, "a space in front", "GPT2Tokenizer", "llama")
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(pair) for pair in model["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    by_class, tokenizer = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))
    assert [our_ids(by_class, text) for text in TEXTS] == [our_ids(tokenizer, text) for text in TEXTS]
    (tmp_path / "copy").mkdir()
    write_tokenizer(tokenizer, str(tmp_path), tmp_path / "copy")
    shutil.copy(tmp_path / "config.json", tmp_path / "copy")
    copy = load_tokenizer(str(tmp_path / "copy"))
    assert [our_ids(copy, text) for text in TEXTS] == [our_ids(tokenizer, text) for text in TEXTS]


def test_the_three_commands_take_these_ids(tmp_path, monkeypatch):
    """A base as DeepSeek-R1-Distill-Qwen: model_type qwen2, LlamaTokenizerFast, a pipeline of its own."""
    base, out = tmp_path / "base", tmp_path / "8bit"
    write_base("qwen2", base, vocab_size=400)
    write_tokenizer_folder(base, "digits by three", "LlamaTokenizerFast", "qwen2")
    data = write_pairs(tmp_path / "pairs.parquet", demo_pairs(24, seed=3))
    rows, real = [], minarena.text.encode

    def recorded(tokenizer, table, *settings):
        rows.extend(real(tokenizer, table, *settings))
        for ids, row in zip(rows[-len(table) :], table.itertuples(), strict=True):
            raw = raw_ids(base, TEMPLATE.format(row.prompt, row.response_a, row.response_b))
            assert ids.tolist() == [2, *raw, 1]
        return rows[-len(table) :]

    monkeypatch.setattr("minarena.rows.encode", recorded)
    monkeypatch.setattr("minarena.ensemble.predict.encode", recorded)
    quantize.main(["--model", str(base), "--out", str(out)])
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    run = ["--out", str(tmp_path / "run"), "--batch-size", "12", "--lora-r", "2", "--n-splits", "4"]
    train.main(["--model", str(out), "--data", data, *run])
    infer.main(["--adapter", str(tmp_path / "run"), "--data", data, "--out", str(tmp_path / "out.csv")])
    assert len(rows) == 24 + 6 + 24  # training rows, held-out rows in two orders ... and all again


# ------------------------------------------------------------------------------ embeddings


def test_a_token_without_an_embedding_is_named_if_a_row_can_hold_it(tmp_path):
    added = {"331": {"content": "<tool>", "special": True}}
    write_tokenizer_folder(tmp_path, "no words", "Qwen2Tokenizer", "llama", added_tokens_decoder=added)
    check_vocabulary(load_tokenizer(str(tmp_path)), 331)  # as Gemma 3's <image_soft_token>: no text has it
    added["331"]["special"] = False
    write_tokenizer_folder(tmp_path, "no words", "Qwen2Tokenizer", "llama", added_tokens_decoder=added)
    with pytest.raises(ValueError, match="has token 331, the model has 331 embeddings"):
        check_vocabulary(load_tokenizer(str(tmp_path)), 331)
    check_vocabulary(load_tokenizer(str(tmp_path)), 332)
    write_tokenizer_folder(tmp_path, "no words", "Qwen2Tokenizer", "llama", pad_token="<padding>")
    with pytest.raises(ValueError, match="has token 331"):
        check_vocabulary(load_tokenizer(str(tmp_path)), 331)

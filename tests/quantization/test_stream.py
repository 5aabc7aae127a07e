"""quantize.py's work, as functions: a base becomes an 8-bit sequence classifier, one matrix at a time.

source = open_source(folder, adapter=None, labels=2)   headers are read, everything is checked
errors = convert(source, into, seed=0)                 the folder is written; relative error of each matrix
float_rows(source, "model.layers.0.mlp.up_proj.weight", "cpu")   the merged float matrix, some rows at a time
with new_folder(out, size) as folder: ...              a folder that takes its name only if all went well
The oracle is transformers with bitsandbytes: it loads the same base in 8-bit and saves it.
"""

import json
from pathlib import Path

import pytest
import torch
from bases import FAMILIES, random_base, write_base
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

import minarena.quantization.stream
from minarena.files.base import load_backbone
from minarena.files.tokenizer import load_tokenizer
from minarena.int8 import dequantize
from minarena.quantization.stream import bytes_to_write, convert, float_rows, open_source
from minarena.text import encode
from minarena.tiny import demo_pairs

# The dictionary of the seed (its model's config.json), as published.
SEEDS_CONFIG = {
    "_load_in_4bit": False,
    "_load_in_8bit": True,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "fp4",
    "bnb_4bit_use_double_quant": False,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
    "llm_int8_skip_modules": None,
    "llm_int8_threshold": 6.0,
    "load_in_4bit": False,
    "load_in_8bit": True,
    "quant_method": "bitsandbytes",
}


def tensors_of(folder) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(Path(folder).glob("*.safetensors")) for k, v in load_file(file).items()}


def by_transformers(folder: str, into, labels: int, device: str = "cpu") -> str:
    """The same base, quantized and saved by transformers and bitsandbytes."""
    model = AutoModelForSequenceClassification.from_pretrained(
        folder,
        num_labels=labels,
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        device_map={"": device},
    )
    model.save_pretrained(into)
    return str(into)


def converted(folder: str, into, **options) -> str:
    into.mkdir()
    convert(open_source(folder, **options), into)
    return str(into)


def logits(folder: str) -> torch.Tensor:
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = tokenizer(["one answer", "another, longer one"], padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(texts["input_ids"], attention_mask=texts["attention_mask"]).logits.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_bytes_are_those_that_transformers_writes(family, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(
        minarena.quantization.stream, "CHUNK", 1300
    )  # several pieces a matrix, the last one shorter
    base = write_base(family, tmp_path / "base", dtype)
    ours = tensors_of(converted(base, tmp_path / "ours"))
    theirs = tensors_of(by_transformers(base, tmp_path / "theirs", labels=2))
    assert ours.keys() == theirs.keys()
    assert sum(name.endswith(".SCB") for name in ours) == 14
    assert sum(name.endswith(".bias") for name in ours) == (6 if family == "qwen2" else 0)
    for name in ours.keys() - {"score.weight"}:  # a new head: drawn anew
        assert ours[name].dtype == theirs[name].dtype, name
        assert torch.equal(ours[name], theirs[name]), name
    assert ours["score.weight"].dtype == theirs["score.weight"].dtype


@pytest.mark.gpu
def test_the_bytes_of_a_gpu_are_those_that_transformers_writes_there(tmp_path, monkeypatch):
    monkeypatch.setattr(minarena.quantization.stream, "CHUNK", 1300)
    base = write_base("gemma2", tmp_path / "base", torch.bfloat16)
    (tmp_path / "ours").mkdir()
    convert(open_source(base), tmp_path / "ours", device="cuda")
    ours = tensors_of(tmp_path / "ours")
    theirs = tensors_of(by_transformers(base, tmp_path / "theirs", labels=2, device="cuda"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() - {"score.weight"})


@pytest.mark.parametrize("stored, said", [(torch.float32, "bfloat16"), (torch.float16, None)])
def test_the_configurations_dtype_comes_first_as_in_transformers(stored, said, tmp_path):
    """Weights that are stored wider than it says are rounded before they are quantized."""
    base = Path(write_base("gemma2", tmp_path / "base", stored))
    config = json.loads((base / "config.json").read_text()) | {"dtype": said}
    (base / "config.json").write_text(json.dumps(config))
    ours = tensors_of(converted(str(base), tmp_path / "ours"))
    theirs = tensors_of(by_transformers(str(base), tmp_path / "theirs", labels=2))
    for name in theirs:
        if name.endswith((".SCB", "proj.weight")):
            assert torch.equal(ours[name], theirs[name]), name
    configs = [json.loads((tmp_path / side / "config.json").read_text()) for side in ("ours", "theirs")]
    assert configs[0]["dtype"] == configs[1]["dtype"] == (said or "float16")


@pytest.mark.parametrize("labels", [1, 2, 3])
def test_a_head_with_the_asked_labels_stays_and_another_is_replaced(labels, tmp_path):
    base = write_base("gemma2", tmp_path / "base", labels=labels)
    kept = tensors_of(converted(base, tmp_path / "kept", labels=labels))["score.weight"]
    assert torch.equal(kept, tensors_of(base)["score.weight"])
    new = tensors_of(converted(base, tmp_path / "new", labels=labels + 1))["score.weight"]
    assert new.shape == (labels + 1, 56)
    assert 0.1 < new.std() < 0.3  # initializer_range is 0.2
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "new")
    assert model.config.num_labels == labels + 1
    assert torch.equal(model.score.weight, new)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_the_folder_unchanged_with_batches_and_the_same_logits(family, tmp_path):
    base = write_base(family, tmp_path / "base", torch.bfloat16, labels=2)
    ours, theirs = converted(base, tmp_path / "ours"), by_transformers(base, tmp_path / "theirs", labels=2)
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    wanted = json.loads((tmp_path / "theirs" / "config.json").read_text())
    if (
        FAMILIES[family][1].get("pad_token", "") is None
    ):  # transformers leaves it empty, and its classifier then refuses batches
        assert wanted.pop("pad_token_id") is None
        wanted["pad_token_id"] = 1  # EOS
    assert config == wanted
    AutoTokenizer.from_pretrained(base).save_pretrained(theirs)
    if FAMILIES[family][1].get("pad_token", "") is None:
        (tmp_path / "theirs" / "config.json").write_text(json.dumps(wanted))
        for folder in (ours, theirs):
            tokenizer = AutoTokenizer.from_pretrained(folder)
            tokenizer.pad_token = tokenizer.eos_token
            tokenizer.save_pretrained(folder)
    assert torch.equal(logits(ours), logits(theirs))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokenizer_keeps_its_special_tokens_and_its_ids(family, tmp_path):
    before = load_tokenizer(write_base(family, tmp_path / "base"))
    after = load_tokenizer(converted(str(tmp_path / "base"), tmp_path / "out"))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(before, name) == getattr(after, name)
    assert before.bos_token_id == (None if "bos_token" in FAMILIES[family][1] else 2)
    pairs = demo_pairs(12, seed=1)
    for one, other in zip(encode(before, pairs, 200), encode(after, pairs, 200), strict=True):
        assert one.tolist() == other.tolist()


def test_the_seeds_config_dictionary_is_accepted_as_it_stands(tmp_path):
    ours = converted(write_base("gemma2", tmp_path / "base", labels=3), tmp_path / "ours", labels=3)
    before, path = logits(ours), tmp_path / "ours" / "config.json"
    config = json.loads(path.read_text())
    written = config["quantization_config"]
    unused = {"bnb_4bit_compute_dtype": "bfloat16"}  # of 4-bit, and torch's default dtype where we write it
    assert written | unused == SEEDS_CONFIG
    path.write_text(json.dumps(config | {"quantization_config": SEEDS_CONFIG}))
    assert torch.equal(logits(ours), before)
    load_backbone(ours, torch.device("cpu"), torch.float32)
    again = converted(ours, tmp_path / "again", labels=3)  # and as a base
    assert torch.equal(logits(again), before)


def test_an_8bit_base_without_an_adapter_keeps_its_bytes(tmp_path):
    base = by_transformers(write_base("qwen2", tmp_path / "base"), tmp_path / "base8", labels=2)
    AutoTokenizer.from_pretrained(tmp_path / "base").save_pretrained(base)
    source = open_source(base)
    assert source.is_8bit()
    into = tmp_path / "out"
    into.mkdir()
    assert convert(source, into) == {}  # nothing was quantized
    before, after = tensors_of(base), tensors_of(into)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_bare_backbone_is_a_base_too(tmp_path):
    model = random_base("llama")
    model.model.save_pretrained(tmp_path / "bare")
    assert "layers.0.mlp.up_proj.weight" in tensors_of(tmp_path / "bare")
    AutoTokenizer.from_pretrained(write_base("llama", tmp_path / "whole")).save_pretrained(tmp_path / "bare")
    ours = tensors_of(converted(str(tmp_path / "bare"), tmp_path / "ours"))
    whole = tensors_of(converted(str(tmp_path / "whole"), tmp_path / "ours2"))
    assert ours.keys() == whole.keys()
    assert all(torch.equal(ours[name], whole[name]) for name in ours)


def test_shards_in_and_out_have_an_index_and_change_nothing(tmp_path, monkeypatch):
    base = write_base("gemma2", tmp_path / "base")
    one = tensors_of(converted(base, tmp_path / "one"))
    random_base("gemma2").save_pretrained(tmp_path / "cut", max_shard_size="100KB")
    load_tokenizer(base).save_pretrained(tmp_path / "cut")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 2
    monkeypatch.setattr(minarena.quantization.stream, "SHARD_BYTES", 30_000)
    source = open_source(str(tmp_path / "cut"))
    (tmp_path / "many").mkdir()
    convert(source, tmp_path / "many")
    many = tensors_of(tmp_path / "many")
    assert many.keys() == one.keys()
    assert all(torch.equal(many[name], one[name]) for name in one)
    files = {file.name: file.stat().st_size for file in (tmp_path / "many").glob("*.safetensors")}
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == files.keys()
    assert index["weight_map"].keys() == many.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in many.values()) == bytes_to_write(source)
    for path in (tmp_path / "many").glob("*.safetensors"):  # aligned, as safetensors writes them
        data = path.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        for name, entry in header.items():
            if name != "__metadata__":
                assert entry["data_offsets"][0] % many[name].element_size() == 0
    for name, size in files.items():  # the limit holds but for a single tensor that is larger
        with safe_open(tmp_path / "many" / name, "pt") as file:
            assert size <= 30_000 or list(file.keys()) == ["model.embed_tokens.weight"]
    assert torch.equal(logits(str(tmp_path / "many")), logits(str(tmp_path / "one")))


def test_the_reported_error_is_that_of_the_written_matrix(tmp_path, monkeypatch):
    monkeypatch.setattr(minarena.quantization.stream, "CHUNK", 1300)
    base = write_base("llama", tmp_path / "base")
    source, into = open_source(base), tmp_path / "out"
    into.mkdir()
    errors = convert(source, into)
    floats, stored = tensors_of(base), tensors_of(into)
    assert len(errors) == 14
    for module, error in errors.items():
        W = floats[f"{module}.weight"].double()
        W8 = dequantize(stored[f"{module}.weight"], stored[f"{module}.SCB"], torch.float32).double()
        assert error == pytest.approx(((W8 - W).norm() / W.norm()).item(), rel=1e-4)
        assert 0.001 < error < 0.02
        assert torch.equal(torch.cat([*float_rows(source, f"{module}.weight", "cpu")]).double(), W)


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' /proc")
def test_memory_does_not_grow_with_the_model(tmp_path, monkeypatch):
    """The sample is taken where a matrix is quantized; all that came before it must be on disk by then."""
    converted(write_base("llama", tmp_path / "small"), tmp_path / "first")  # what a first time alone takes
    base = write_base(
        "llama", tmp_path / "base", hidden_size=512, intermediate_size=2048, num_hidden_layers=12
    )
    source, samples, quantize = open_source(base), [], minarena.quantization.stream.quantize
    (tmp_path / "out").mkdir()
    start = anonymous_bytes()
    monkeypatch.setattr(minarena.quantization.stream, "CHUNK", 1 << 17)
    monkeypatch.setattr(
        minarena.quantization.stream, "quantize", lambda W: samples.append(anonymous_bytes()) or quantize(W)
    )
    convert(source, tmp_path / "out")
    assert bytes_to_write(source) > 38e6
    assert max(samples) - start < 13e6  # a third; the allocator alone was seen to move by 6e6

"""Folders that other people made: a base or an adapter is read, never obeyed, and a damaged one is named.

with base_folder(name) as folder: ...     the one door to a base: found or fetched, and checked (folders.py)

A base with code of its own, with pickled weights, with an index, a tokenizer or a config.json that leads out
of the folder; adapters that do not fit; outputs that cannot be written. Each is given to the commands.

Compared with: a file that the code would have written, a pickle that leaves a trace when it is opened,
and the weights that lie in the folder.
"""

import json
import os
import pickle
import shutil
import stat
from pathlib import Path

import pytest
import torch
from helpers import CPU
from safetensors.torch import load_file, save_file
from test_bad_input import line_of
from transformers import AutoTokenizer

import infer
import quantize
import train
from minarena.files.base import base_folder, load_backbone
from minarena.files.tokenizer import check_vocabulary, load_tokenizer
from minarena.quantization.stream import open_source
from minarena.tiny import write_tiny

INDEX = "model.safetensors.index.json"
KERNEL = {"_attn_implementation": "somebody/kernel", "attn_implementation": "somebody/kernel"}


class Trap:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard_elsewhere(base: Path, name: str) -> None:
    """An index in place of the weights, by which they are all in `name`; a harmless file lies there, too."""
    keys = load_file(base / "model.safetensors")
    (base / "model.safetensors").rename(base.parent / "outside.safetensors")
    save_file({"x": torch.ones(1)}, base / "other.safetensors")
    (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(keys, name)}))


def tokenizer_elsewhere(base: Path) -> None:
    (base / "tokenizer.json").rename(base.parent / "tokenizer.1.0.0.json")
    (base / "vocab.json").write_text("{}")
    edit(base / "tokenizer_config.json", fast_tokenizer_files=["../tokenizer.1.0.0.json"])


def only_pickled(base: Path) -> None:
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(base.parent / "trace")))


def pickled_shard(base: Path) -> None:
    shard_elsewhere(base, "model.bin")
    (base / "model.bin").write_bytes(pickle.dumps(Trap(base.parent / "trace")))


def without_tokenizer(base: Path) -> None:
    for file in base.glob("tokenizer*"):
        file.unlink()


def cut(base: Path) -> None:
    whole = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def other_tokenizer(base: Path) -> None:
    """Of another model: one more token than there are embeddings."""
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["another"] = len(tokenizer["model"]["vocab"])
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))


BASES = {
    "an index that leads out": (lambda b: shard_elsewhere(b, "../outside.safetensors"), "names '../outside"),
    "an index with a path": (lambda b: shard_elsewhere(b, f"{b.parent}/outside.safetensors"), "names '/"),
    "an index with a pickle": (pickled_shard, "'model.bin': only .safetensors files of this folder are read"),
    "an index that is none": (lambda b: (b / INDEX).write_text("[" * 10**5), "index.json is damaged"),
    "an index of numbers": (lambda b: (b / INDEX).write_text('{"weight_map": {"x": 1}}'), "names 1"),
    "an index that names a number": (lambda b: (b / INDEX).write_text('{"weight_map": 5}'), "names 5"),
    "a tokenizer that leads out": (tokenizer_elsewhere, "names '../tokenizer.1.0.0.json'"),
    "pickled weights": (
        only_pickled,
        "no .safetensors file: pickled weights are not read, convert them first",
    ),
    "no weights": (lambda b: (b / "model.safetensors").unlink(), "no .safetensors file"),
    "no tokenizer": (without_tokenizer, "no tokenizer: none of tokenizer.json"),
    "another model's tokenizer": (
        other_tokenizer,
        "its tokenizer has token 260, the model has 260 embeddings",
    ),
    "an adapter in it": (lambda b: (b / "adapter_config.json").write_text("{}"), "quantize.py --adapter"),
    "no config": (lambda b: (b / "config.json").unlink(), "no config.json: not a model folder"),
    "a broken config": (lambda b: (b / "config.json").write_text("{"), "not a valid JSON file"),
    "a config that is none": (lambda b: (b / "config.json").write_text("[]"), "config.json: "),
    "a wrong config": (
        lambda b: edit(b / "config.json", hidden_size="a"),
        "'hidden_size' expected int, got str",
    ),
    "a config of another size": (lambda b: edit(b / "config.json", vocab_size=270), "needs (270, 64)"),
    "cut weights": (cut, "incomplete metadata, file not fully covered"),
    "empty weights": (lambda b: (b / "model.safetensors").write_bytes(b""), "header too small"),
    "a broken tokenizer": (lambda b: (b / "tokenizer.json").write_text("{"), "no usable tokenizer"),
}


@pytest.fixture
def base(tiny, tmp_path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "base"))


@pytest.mark.parametrize("name", BASES)
def test_a_base_that_cannot_be_used_is_refused_by_both_commands(
    name, base, pairs_file, tmp_path, monkeypatch
):
    spoil, words = BASES[name]
    spoil(base)
    run = ["--data", pairs_file, "--n-splits", "8", "--limit", "16", "--out", str(tmp_path / "run")]
    for command, more in ((train, run), (quantize, ["--out", str(tmp_path / "8bit")])):
        said = line_of(command, ["--model", str(base), *more], monkeypatch)
        assert str(base) in said and words in said and len(said) < 600
    assert not (tmp_path / "8bit").exists() and not (tmp_path / "trace").exists()


# ------------------------------------------------------------------------------ code of others


@pytest.fixture
def coded(base, tmp_path, monkeypatch) -> Path:
    """A base whose configuration, model and tokenizer are said to be classes in files of its own; whoever
    imports one of these leaves a file, and any question on the terminal is answered with yes."""
    for part in ("config", "model", "tokenizer"):
        (base / f"{part}.py").write_text(
            f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass A:\n    pass\n"
        )
    names = {
        "AutoConfig": "config.A",
        "AutoModel": "model.A",
        "AutoModelForSequenceClassification": "model.A",
    }
    names["AutoTokenizer"] = ["tokenizer.A", "tokenizer.A"]
    edit(base / "config.json", auto_map=names)
    edit(base / "tokenizer_config.json", auto_map={"AutoTokenizer": names["AutoTokenizer"]})
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return base


def test_code_in_a_folder_never_runs(coded, tmp_path, capsys):
    """Where transformers knows the classes, it takes its own; where it does not, the base is refused."""
    with base_folder(str(coded)) as folder:
        assert type(load_backbone(folder, CPU, torch.float32)).__module__.startswith("transformers.")
        assert type(load_tokenizer(folder)).__module__.startswith("transformers.")
        assert type(open_source(folder).config).__module__.startswith("transformers.")
    edit(coded / "config.json", model_type="unheard-of")
    for load in (lambda: load_backbone(str(coded), CPU, torch.float32), lambda: open_source(str(coded))):
        with pytest.raises(ValueError, match=f"--model {coded}: .*custom code"):
            load()
    edit(coded / "tokenizer_config.json", tokenizer_class="UnheardOf")
    with pytest.raises(ValueError, match="no usable tokenizer"):
        load_tokenizer(str(coded))
    assert not (tmp_path / "ran").exists()


def test_the_code_would_have_run(coded, tmp_path):
    """Else the test above would prove nothing: transformers, asked as it is by default, runs it on a yes."""
    edit(coded / "config.json", model_type="unheard-of")
    with pytest.raises(AttributeError):  # the class is none, but its file was run
        AutoTokenizer.from_pretrained(str(coded))
    assert (tmp_path / "ran").exists()


def test_what_config_json_says_of_files_and_kernels_is_not_obeyed(base, tmp_path):
    """transformers_weights names the file of the weights, attn_implementation a kernel of the hub's."""
    expected = load_backbone(str(base), CPU, torch.float32).state_dict()
    torch.save({"embed_tokens.weight": torch.zeros(260, 64)}, base / "adapter_model.bin")
    edit(base / "config.json", transformers_weights="adapter_model.bin", **KERNEL)
    backbone = load_backbone(str(base), CPU, torch.float32)
    assert backbone.config._attn_implementation == "eager"  # with the soft-cap
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    quantize.main(["--model", str(base), "--out", str(tmp_path / "8bit")])
    written = json.loads((tmp_path / "8bit" / "config.json").read_text())
    assert not {"transformers_weights", *KERNEL} & written.keys()


def test_of_a_hub_repository_neither_pickles_nor_code_are_fetched_and_its_folder_is_checked(
    base, monkeypatch
):
    asked = {}

    def fetched(name, allow_patterns):
        asked[name] = allow_patterns
        return str(base)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    with base_folder("somebody/base") as folder:
        assert folder == str(base)
    [patterns] = asked.values()
    for file in (
        "pytorch_model.bin",
        "model.pt",
        "modeling_a.py",
        "model.pkl",
        "model-1-of-2.bin",
        "x.msgpack",
    ):
        assert not any(Path(file).match(pattern) for pattern in patterns)
    shard_elsewhere(base, "../outside.safetensors")
    with pytest.raises(ValueError, match=r"names '\.\./outside\.safetensors'"), base_folder("somebody/base"):
        pass


def test_the_vocabulary_of_a_tokenizer_may_be_smaller_than_the_embeddings(tiny):
    tokenizer = load_tokenizer(tiny)
    for embeddings in (260, 320):
        check_vocabulary(tokenizer, embeddings)
    with pytest.raises(ValueError, match=f"--model {tiny}: its tokenizer has token 259"):
        check_vocabulary(tokenizer, 259)


# ------------------------------------------------------------------------------ adapters

Q = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
HEAD = "base_model.model.score.4.weight"
FLOAT8 = torch.float8_e4m3fn


def settings(**changes):
    return lambda folder: edit(folder / "adapter_config.json", **changes)


def record(**changes):
    return lambda folder: edit(folder / "train_config.json", **changes)


def tensors(change):
    def apply(folder: Path) -> None:
        stored = load_file(folder / "adapter_model.safetensors")
        change(stored)
        save_file(stored, folder / "adapter_model.safetensors")

    return apply


def whole(file: str, content: str):
    return lambda folder: (folder / file).write_text(content)


def pickled_adapter(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Trap(folder.parent / "trace")))


ADAPTERS = {
    "another rank": (settings(r=8), "r 8 "),
    "a huge rank": (settings(r=10**12), "r 1000000000000 does not fit the tensors"),
    "a rank that is a yes": (settings(r=True), "r True"),
    "alpha NaN": (settings(lora_alpha=float("nan")), "lora_alpha nan: must be above 0"),
    "alpha a text": (settings(lora_alpha="9"), "lora_alpha '9'"),
    "dropout 2": (settings(lora_dropout=2.0), "lora_dropout 2.0"),
    "dropout null": (settings(lora_dropout=None), "lora_dropout None"),
    "layers by name": (settings(layers_to_transform=["first"]), "layers_to_transform ['first']"),
    "another kind": (settings(peft_type="IA3"), "peft_type is not LORA"),
    "other targets": (settings(target_modules=[["q_proj"]]), "target_modules [['q_proj']]"),
    "three labels": (
        tensors(lambda t: t.update({HEAD: torch.ones(3, 32)})),
        "(3, 32), this model needs (2, 32)",
    ),
    "a missing tensor": (tensors(lambda t: t.pop(Q)), "q_proj.lora_A.weight is missing"),
    "one tensor more": (tensors(lambda t: t.update(more=torch.ones(1))), "tensor more has no place"),
    "no tensors": (tensors(lambda t: t.clear()), "does not fit the tensors"),
    "NaN": (
        tensors(lambda t: t[Q].fill_(float("nan"))),
        "q_proj.lora_A.weight has values that are not finite",
    ),
    "whole numbers": (tensors(lambda t: t.update({Q: t[Q].long()})), "is stored as torch.int64"),
    "float8": (tensors(lambda t: t.update({Q: t[Q].to(FLOAT8)})), "is stored as torch.float8_e4m3fn"),
    "only pickled": (pickled_adapter, "of a pickled adapter_model.bin PEFT makes one"),
    "cut": (whole("adapter_model.safetensors", "cut"), "not a usable adapter"),
    "deep settings": (whole("adapter_config.json", "[" * 10**5), "not a usable adapter"),
    "no settings": (whole("adapter_config.json", "[]"), "peft_type is not LORA"),
    "no record": (whole("train_config.json", "[]"), "train_config.json is damaged: "),
    "a deep record": (whole("train_config.json", "[" * 10**5), "train_config.json is damaged: "),
    "an order unknown": (record(order="down"), "order 'down': must be ab, ba or both"),
    "a length below 0": (record(max_length=-5), "max_length -5"),
    "a length in words": (record(max_length="long"), "max_length 'long'"),
    "a cut unknown": (record(truncation="right"), "truncation 'right'"),
    "a product unknown": (record(matmul="fast"), "matmul 'fast'"),
    "a base that is a list": (record(model=["tiny"]), "model ['tiny']"),
    "a base that is nowhere": (record(model="/nowhere/base"), "--model /nowhere/base: no such folder"),
}


@pytest.fixture
def adapter(runs, tmp_path) -> Path:
    return Path(shutil.copytree(runs[0], tmp_path / "adapter"))


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_that_cannot_be_used_is_refused_by_name(name, adapter, pairs_file, tmp_path, monkeypatch):
    spoil, words = ADAPTERS[name]
    spoil(adapter)
    words_typed = ["--adapter", str(adapter), "--data", pairs_file, "--limit", "2"]
    said = line_of(infer, [*words_typed, "--out", str(tmp_path / "out.csv")], monkeypatch)
    assert words in said and (str(adapter) in said or "nowhere" in words) and len(said) < 500
    assert not (tmp_path / "out.csv").exists() and not (tmp_path / "trace").exists()


def test_an_adapter_of_another_base_is_refused(tmp_path, pairs_file, runs, monkeypatch):
    other = write_tiny(str(tmp_path / "other"), hidden_size=48)
    words = ["--adapter", runs[0], "--model", other, "--data", pairs_file, "--out", str(tmp_path / "out.csv")]
    assert "this model needs (64, 48)" not in (said := line_of(infer, words, monkeypatch))
    assert f"{runs[0]}: tensor " in said and "an adapter of another base" in said


def test_the_base_that_adapter_config_json_names_is_not_followed(adapter, pairs_file, tmp_path):
    found = []
    for name in ("tiny", "/nowhere/base"):
        edit(adapter / "adapter_config.json", base_model_name_or_path=name)
        outs = ["--out", str(tmp_path / "out.csv"), "--probs", str(tmp_path / "probs.csv")]
        infer.main(["--adapter", str(adapter), "--data", pairs_file, "--limit", "4", *outs])
        found.append((tmp_path / "probs.csv").read_text())
    assert found[0] == found[1]


# ------------------------------------------------------------------------------ outputs


def unwritable(folder: Path) -> Path:
    """A folder of mode 500; for the superuser, whom that does not stop, a place that takes no files."""
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    return Path("/proc/sys") if os.access(folder, os.W_OK) else folder


def test_an_output_that_cannot_be_written_is_noticed_before_any_work(tmp_path, runs, pairs_file, monkeypatch):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.csv").mkdir()
    locked = unwritable(tmp_path / "locked")
    data = ["--data", pairs_file, "--n-splits", "8"]
    monkeypatch.setattr(train, "build", None)
    monkeypatch.setattr(infer, "load_predictor", None)
    for command, words, reason in (
        (train, [*data, "--out", f"{tmp_path}/file"], f"--out {tmp_path}/file: File exists: give another"),
        (train, [*data, "--out", f"{tmp_path}/file/run"], f"--out {tmp_path}/file/run: Not a directory"),
        (train, [*data, "--out", f"{locked}/run"], f"--out {locked}/run: "),
        (train, [*data, "--out", str(locked)], f"--out {locked}: cannot be written to"),
        (quantize, ["--out", f"{tmp_path}/file/8bit"], f"--out {tmp_path}/file/8bit: File exists"),
        (quantize, ["--out", f"{locked}/8bit"], f"--out {locked}/8bit: "),
        (
            infer,
            ["--adapter", *runs, "--out", f"{tmp_path}/folder.csv"],
            "folder.csv: a folder has that name",
        ),
        (
            infer,
            ["--adapter", *runs, "--out", f"{tmp_path}/file/a.csv"],
            "a.csv: cannot be written: Not a dir",
        ),
        (infer, ["--adapter", *runs, "--out", f"{tmp_path}/none/a.csv"], "a.csv: cannot be written: No such"),
        (infer, ["--adapter", *runs, "--out", f"{locked}/a.csv"], f"{locked}/a.csv: cannot be written: "),
    ):
        said = line_of(command, words, monkeypatch)
        assert reason in said, said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.csv", "locked"]

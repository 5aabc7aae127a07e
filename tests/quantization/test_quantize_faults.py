"""What can go wrong while quantize.py works: each fault ends in one line that names the thing.

quantize.main([...]) raises ValueError; from the shell, that is the line and exit status 1
new_folder(out, size): a folder `out`.unfinished that takes the name `out` only when all is written
open_source(folder): everything that can be known from headers is checked before the first byte is written
After every fault there is no folder `out`, nothing new beside it, and each file of the source is as it was;
`refused` checks that, byte by byte. Faults are real where they can be: files are cut and patched, and the
kernel refuses a write.
"""

import errno
import hashlib
import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from bases import random_base, write_base
from safetensors.torch import load_file, save_file
from test_quantize import quantized

import minarena.quantization.stream
from minarena.files.tokenizer import load_tokenizer
from minarena.quantization.stream import new_folder


def hashes(folder) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in Path(folder).iterdir()}


def refused(base, out, *more: str) -> str:
    """The one line with which the command ends; checks what must hold after every fault."""
    before, around = hashes(base), set(Path(out).parent.iterdir())
    with pytest.raises(ValueError) as error:
        quantized(str(base), out, *more)
    assert hashes(base) == before
    assert set(Path(out).parent.iterdir()) == around
    assert "\n" not in str(error.value)
    return str(error.value)


def rewritten(base: str, change, file: str = "model.safetensors") -> str:
    tensors = {name: tensor.clone() for name, tensor in load_file(Path(base) / file).items()}
    change(tensors)
    save_file(tensors, Path(base) / file, metadata={"format": "pt"})
    return base


def test_an_existing_output_is_refused_first_and_left_alone(tmp_path, capsys):
    base = write_base("llama", tmp_path / "base")
    (tmp_path / "out").mkdir()
    capsys.readouterr()  # of transformers, which wrote the base
    with pytest.raises(ValueError, match="out exists"):  # before a base is fetched, or a line is printed
        quantized("somebody/no-such-base", tmp_path / "out")
    assert capsys.readouterr() == ("", "")
    (tmp_path / "out" / "precious").write_text("x")
    assert "out exists" in refused(base, tmp_path / "out")
    assert (tmp_path / "out" / "precious").read_text() == "x"
    (tmp_path / "new.unfinished").mkdir()
    assert "new.unfinished is of a run that was killed" in refused(base, tmp_path / "new")


def test_a_disk_too_small_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    base = write_base("llama", tmp_path / "base")
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    monkeypatch.setattr(minarena.quantization.stream, "write_shard", None)  # would be called otherwise
    assert "GB of disk" in refused(base, tmp_path / "out")


@pytest.mark.parametrize("allowed", [20_000, 60_000])
def test_a_write_that_fails_leaves_nothing(allowed, tmp_path):
    """A limit on the size of files makes the kernel refuse a write in the middle of a shard."""
    base = write_base("llama", tmp_path / "base")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (allowed, hard))
        message = refused(base, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert message == f"--out {tmp_path}/out: File too large; what was written is deleted"


def test_an_interrupt_leaves_nothing_and_what_is_unfinished_does_not_look_finished(tmp_path, monkeypatch):
    base = write_base("llama", tmp_path / "base")
    around = set(tmp_path.iterdir())
    seen = []

    def interrupted(W):
        seen.extend(file.name for file in (tmp_path / "out.unfinished").iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(minarena.quantization.stream, "quantize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantized(base, tmp_path / "out")
    assert "model.safetensors" in seen
    assert "config.json" not in seen
    assert set(tmp_path.iterdir()) == around


def test_the_name_is_taken_last_and_a_full_disk_is_one_line(tmp_path):
    with new_folder(str(tmp_path / "out"), 10) as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "file").read_text() == "x"
    full = pytest.raises(ValueError, match="No space left on device; what was written is deleted")
    with full, new_folder(str(tmp_path / "other"), 10):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_shard_that_is_cut_off_or_damaged_is_named(tmp_path):
    random_base("llama").save_pretrained(tmp_path / "base", max_shard_size="60KB")
    load_tokenizer(write_base("llama", tmp_path / "whole")).save_pretrained(tmp_path / "base")
    shard = sorted((tmp_path / "base").glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    for damaged in (whole[:-1], whole[:100], b"", b"\xff" * 8 + whole[8:], whole[:8] + b"x" + whole[9:]):
        shard.write_bytes(damaged)
        message = refused(tmp_path / "base", tmp_path / "out")
        assert f"{shard.name}: cut off or damaged" in message
    shard.unlink()
    assert f"{shard.name}: no such file" in refused(tmp_path / "base", tmp_path / "out")


def test_an_index_that_promises_what_is_not_there_is_named(tmp_path):
    random_base("llama").save_pretrained(tmp_path / "base", max_shard_size="60KB")
    load_tokenizer(write_base("llama", tmp_path / "whole")).save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    file = index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index | {"weight_map": index["weight_map"] | {"model.extra": file}}))
    assert f"{file}: tensor model.extra is missing" in refused(tmp_path / "base", tmp_path / "out")
    path.write_text("[]")
    assert "index.json is damaged" in refused(tmp_path / "base", tmp_path / "out")


@pytest.mark.parametrize(
    "value, problem", [("nan", "NaN or infinity"), ("-inf", "NaN or infinity"), ("7e4", "65,504")]
)
@pytest.mark.parametrize(
    "name", ["layers.1.mlp.up_proj.weight", "layers.0.self_attn.q_proj.bias", "norm.weight"]
)
def test_a_weight_that_is_no_number_is_named(name, value, problem, tmp_path):
    base = write_base("qwen2", tmp_path / "base")

    def change(tensors):
        tensors[f"model.{name}"].view(-1)[7] = float(value)

    rewritten(base, change)
    if value == "7e4" and not name.endswith("proj.weight"):  # large, but stored as it is
        assert quantized(base, tmp_path / "out")["bytes"] > 0
        return
    message = refused(base, tmp_path / "out")
    assert f"tensor model.{name} has " in message
    assert problem in message


@pytest.mark.parametrize(
    "change, named",
    [
        (
            lambda t: t.update({"model.norm.weight": torch.ones(57)}),
            r"model.norm.weight is (57,): config.json needs (56,)",
        ),
        (
            lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.ones(56, 100)}),
            "model.layers.1.mlp.up_proj.weight is (56, 100): config.json needs (100, 56)",
        ),
        (
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
            "the weights lack model.layers.1.mlp.up_proj.weight",
        ),
        (lambda t: t.update({"model.extra.weight": torch.ones(3)}), "model.extra.weight has no place"),
        (
            lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.ones(100, 56, dtype=torch.int64)}),
            "is stored as I64",
        ),
        (
            lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.ones(100, 56, dtype=torch.int8)}),
            "lack model.layers.1.mlp.up_proj.SCB",
        ),
        (lambda t: t.update({"model.norm.weight": torch.ones(56, dtype=torch.int8)}), "is stored as I8"),
    ],
)
def test_a_tensor_that_does_not_fit_the_configuration_is_named(change, named, tmp_path):
    message = refused(rewritten(write_base("llama", tmp_path / "base"), change), tmp_path / "out")
    assert named in message


def test_an_8bit_base_with_a_damaged_scale_or_another_format_is_named(tmp_path):
    quantized(write_base("llama", tmp_path / "base", labels=2), tmp_path / "out8")
    module = "model.layers.1.mlp.up_proj"
    good = load_file(tmp_path / "out8" / "model.safetensors")
    changes = {
        f"{module}.SCB has NaN": {f"{module}.SCB": torch.full((100,), float("nan"))},
        f"{module}.weight_format is not 0": {f"{module}.weight_format": torch.ones((), dtype=torch.uint8)},
        f"{module}.SCB is stored as F16": {f"{module}.SCB": torch.ones(100, dtype=torch.float16)},
        f"{module}.SCB is (56,)": {f"{module}.SCB": torch.ones(56)},
    }
    for named, change in changes.items():
        save_file(good | change, tmp_path / "out8" / "model.safetensors", metadata={"format": "pt"})
        assert named in refused(tmp_path / "out8", tmp_path / "out", "--labels", "3")


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq weights: take the float model"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            "bitsandbytes weights",
        ),
        ({"model_type": "no-such-model"}, "config.json"),
        ({"model_type": "clip"}, "config.json"),
        ({"model_type": "phi3"}, "qkv_proj is a linear layer other than the seven projections"),
        ({"num_hidden_layers": 3}, "the weights lack model.layers.2."),
    ],
)
def test_a_base_that_is_no_plain_float_decoder_is_refused(changes, named, tmp_path):
    base = Path(write_base("llama", tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | changes))
    assert named in refused(base, tmp_path / "out")

"""Another base under the same name: infer.py and --resume refuse it, unless --model says that it is meant.

train.py records the base's fingerprint in train_config.json as "base" (files/fingerprint.py)
A run from before has none: its base is trusted, unless its token ids are other ones now.

Compared with: the same commands on the base as it was.
"""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from bases import base_config, write_base, write_tokenizer_folder
from helpers import write_pairs
from safetensors.torch import load_file, save_file

import infer
import train
from minarena.ensemble import predict
from minarena.tiny import demo_pairs


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """base/, data.parquet, and run/, cut off after two of its three steps, and finished/."""
    folder = tmp_path_factory.mktemp("trained")
    write_base("qwen2", folder / "base", vocab_size=400)
    write_tokenizer_folder(folder / "base", "digits by three", "LlamaTokenizerFast", "llama")
    write_config(folder / "base")
    write_pairs(folder / "data.parquet", demo_pairs(32, seed=2))
    train.main([*words(folder), "--out", str(folder / "finished")])
    shutil.copytree(folder / "finished", folder / "run")
    for name in ("adapter_config.json", "adapter_model.safetensors", "eval.parquet", "checkpoint-3"):
        path = folder / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder


def write_config(base: Path, family: str = "qwen2", **changes) -> None:
    """write_tokenizer_folder wrote that of another family; the weights are qwen2's."""
    base_config(family, vocab_size=400, **changes).save_pretrained(base)


def words(folder: Path, *shape: str) -> list[str]:
    more = ["--batch-size", "8", "--n-splits", "4", "--save-every", "2", *(shape or ("--lora-r", "2"))]
    return ["--model", str(folder / "base"), "--data", str(folder / "data.parquet"), *more]


@pytest.fixture
def place(trained, tmp_path, monkeypatch) -> Path:
    """A copy at the same relative paths, so that the runs' names of their base stay."""
    shutil.copytree(trained, tmp_path / "copy")
    for name in ("run", "finished"):
        path = tmp_path / "copy" / name / "train_config.json"
        path.write_text(path.read_text().replace(str(trained), str(tmp_path / "copy")))
    return tmp_path / "copy"


def other_weights(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors = {name: tensor * 1.01 if "proj.weight" in name else tensor for name, tensor in tensors.items()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


def forget(run: Path) -> None:
    """The record of a run from before fingerprints."""
    record = json.loads((run / "train_config.json").read_text())
    assert set(record.pop("base")) == {"config", "weights", "tokenizer"}
    (run / "train_config.json").write_text(json.dumps(record))


def predicted(place: Path, *more: str) -> list[float]:
    out = ["--out", str(place / "out.csv"), "--probs", str(place / "probs.csv")]
    infer.main(
        [
            "--adapter",
            str(place / "finished"),
            "--data",
            str(place / "data.parquet"),
            "--limit",
            "8",
            *out,
            *more,
        ]
    )
    return pd.read_csv(place / "probs.csv")["winner_model_a"].tolist()


def resumed(place: Path) -> dict:
    return train.main([*words(place), "--resume", "--out", str(place / "run")])


def test_infer_refuses_another_base_of_the_same_name_unless_it_is_typed(place, capsys):
    before = predicted(place)
    other_weights(place / "base")
    with pytest.raises(
        ValueError, match=r"finished: its base had other weights than .*/base has: type --model"
    ):
        predicted(place)
    capsys.readouterr()
    assert predicted(place, "--model", str(place / "base")) != before
    assert "finished: its base had other weights than" in capsys.readouterr().err


def test_resume_refuses_another_base_of_the_same_name(place):
    other_weights(place / "base")
    with pytest.raises(ValueError, match=r"--resume: --model .*/base is not what .*: its weights changed"):
        resumed(place)


def test_resume_takes_the_base_that_the_run_began_with(place):
    assert resumed(place)["resumed_after"] == 2


def test_the_parts_of_a_long_inference_are_of_one_base(place, monkeypatch):
    monkeypatch.setattr(infer, "PART", 3)
    monkeypatch.setattr(predict, "PART", 3)
    monkeypatch.setattr(infer, "predict_pairs", lambda *_, **__: 1 / 0)
    for change, error in ((lambda _: None, ZeroDivisionError), (other_weights, ValueError)):
        change(place / "base")
        with pytest.raises(error) as raised:
            predicted(place, "--model", str(place / "base"))
    assert "holds parts of a run with another base" in str(raised.value)


def test_a_run_from_before_is_taken_where_its_ids_are_the_same(place, capsys):
    for name in ("run", "finished"):
        forget(place / name)
    # llama's class reads tokenizer.json as it is
    write_base("llama", place / "base", vocab_size=400, head_dim=14)
    write_tokenizer_folder(place / "base", "digits by three", "LlamaTokenizerFast", "llama")
    write_config(place / "base", "llama", head_dim=14)
    capsys.readouterr()
    predicted(place)
    assert "token ids" not in capsys.readouterr().err
    assert resumed(place)["resumed_after"] == 2


def test_a_run_from_before_whose_ids_change_gets_a_line_and_is_not_resumed(place, capsys):
    """Its base is of model_type qwen2, with a pipeline of its own."""
    for name in ("run", "finished"):
        forget(place / name)
    capsys.readouterr()
    predicted(place)
    assert "finished: trained with other token ids, transformers' own, than" in capsys.readouterr().err
    with pytest.raises(
        ValueError, match=r"--resume: --model .*/base: its ids were those of .*begin a new run"
    ):
        resumed(place)


def test_resume_refuses_other_contents_of_init_adapter(place):
    start = place / "start"
    shutil.copytree(place / "finished", start)
    options = words(place, "--init-adapter", str(start), "--out", str(place / "second"))
    train.main(options)
    for name in ("adapter_config.json", "adapter_model.safetensors", "eval.parquet", "checkpoint-3"):
        path = place / "second" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    tensors = load_file(start / "adapter_model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, start / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="--resume: init_adapter_sha256 was '"):
        train.main([*options, "--resume"])


def test_resume_is_not_offered_before_there_is_a_checkpoint(place, monkeypatch):
    def bad(*_, **__):
        raise FloatingPointError("loss is nan")

    monkeypatch.setattr(train, "retry_on_oom_", bad)
    with pytest.raises(FloatingPointError, match=r"step 1, rows \[.*\]: loss is nan$"):
        train.main([*words(place), "--out", str(place / "third")])

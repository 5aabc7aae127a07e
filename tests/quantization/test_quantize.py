"""The command quantize.py: options in, an 8-bit folder with its report out, or one line with what is wrong.

quantize.main(["--model", base, "--adapter", adapter, "--labels", "2", "--out", out]) -> the JSON line
out/quantization.json   error of every matrix, change of the last hidden state, versions
The folder serves train.py and infer.py as the float base does, which is quantized when it is loaded: the
losses are the same to the last bit. The oracles: that, the errors recomputed from the files, and the last
hidden state by transformers and PEFT alone. What goes wrong is test_quantize_faults.py's.
"""

import json

import huggingface_hub.constants
import pytest
import torch
from bases import random_base, write_base
from helpers import write_pairs
from safetensors.torch import load_file
from test_merge import write_adapter

import infer
import quantize
import train
from minarena.text import TEMPLATE
from minarena.tiny import demo_pairs


def quantized(base: str, out, *more: str) -> dict:
    return quantize.main(["--model", base, "--out", str(out), *more])


@pytest.mark.parametrize("family, dtype", [("gemma2", torch.bfloat16), ("qwen2", torch.float32)])
def test_training_on_the_folder_is_training_on_the_base_quantized_at_load(family, dtype, tmp_path):
    base = write_base(family, tmp_path / "base", dtype)
    data = write_pairs(tmp_path / "data.parquet", demo_pairs(40, seed=5))
    quantized(base, tmp_path / "out")
    losses = {}
    for name in ("base", "out"):
        options = ["--model", str(tmp_path / name), "--data", data, "--out", str(tmp_path / f"run-{name}")]
        train.main([*options, "--batch-size", "8", "--n-splits", "5", "--lr", "0.01", "--lora-r", "4"])
        log = (tmp_path / f"run-{name}" / "log.jsonl").read_text().splitlines()
        losses[name] = [event["loss"] for event in map(json.loads, log) if event["event"] == "step"]
    assert len(losses["out"]) == 4
    assert losses["out"] == losses["base"]  # to the last bit
    options = ["--data", data, "--out", str(tmp_path / "submission.csv")]
    result = infer.main(["--adapter", str(tmp_path / "run-out"), *options])
    assert result["rows"] == 40


def test_the_report_says_what_quantization_did(tmp_path, capsys):
    base = write_base("gemma2", tmp_path / "base", labels=2)
    write_adapter(random_base("gemma2", labels=2), tmp_path / "adapter")
    result = quantized(base, tmp_path / "out", "--adapter", str(tmp_path / "adapter"))
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1]) == result
    record = json.loads((tmp_path / "out" / "quantization.json").read_text())
    assert record["merged"] == len(record["matrices"]) == 14
    assert record["head"] == "adapter"
    for projection, row in record["projections"].items():
        errors = [error for name, error in record["matrices"].items() if name.endswith(projection)]
        assert row["matrices"] == 2
        assert row["worst"] == max(errors)
        assert row["median"] == pytest.approx(sum(errors) / 2)
        assert f"{projection}  " in captured.err
    assert result["worst"] == max(record["matrices"].values())
    assert "last hidden state" in captured.err


def test_the_change_of_the_last_hidden_state_is_that_against_the_merged_float_model(tmp_path):
    """The other way round: transformers' float model, merged by PEFT, against transformers' 8-bit weights."""
    base = write_base("llama", tmp_path / "base", labels=2)
    model = write_adapter(random_base("llama", labels=2), tmp_path / "adapter")
    result = quantized(base, tmp_path / "out", "--adapter", str(tmp_path / "adapter"))
    backbone = model.merge_and_unload().model.eval()
    tokenizer = quantize.load_tokenizer(str(tmp_path / "out"))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    states = []
    for int8 in (False, True):
        if int8:
            for name, p in backbone.named_parameters():
                scale = stored.get(f"model.{name}".removesuffix("weight") + "SCB")
                if scale is not None:
                    p.data = stored[f"model.{name}"] * (scale / 127)[:, None]
        with torch.no_grad():
            rows = []
            for _, pair in demo_pairs(result["last_hidden_state"]["texts"], seed=0).iterrows():
                text = TEMPLATE.format(pair["prompt"], pair["response_a"], pair["response_b"])
                ids = [2, *tokenizer(text, add_special_tokens=False)["input_ids"], 1]
                rows.append(backbone(torch.tensor([ids])).last_hidden_state[0, -1])
            states.append(torch.stack(rows))
    change = (states[1] - states[0]).norm(dim=1) / states[0].norm(dim=1)
    assert result["last_hidden_state"]["worst"] == pytest.approx(change.max().item(), rel=1e-2)
    assert 0.001 < result["last_hidden_state"]["median"] < 0.2


def test_a_model_that_does_not_fit_is_not_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quantize, "MEMORY", 1e4)
    assert quantized(write_base("llama", tmp_path / "base"), tmp_path / "out")["last_hidden_state"] is None
    assert "not compared" in capsys.readouterr().err


def test_merging_onto_8bit_says_that_it_costs_accuracy(tmp_path, capsys):
    quantized(write_base("llama", tmp_path / "base", labels=2), tmp_path / "out8")
    assert "costs accuracy" not in capsys.readouterr().err
    write_adapter(random_base("llama", labels=2), tmp_path / "adapter")
    quantized(str(tmp_path / "out8"), tmp_path / "out", "--adapter", str(tmp_path / "adapter"))
    assert "costs accuracy" in capsys.readouterr().err


def test_a_hub_id_is_taken_from_the_cache(tmp_path, monkeypatch):
    snapshot = tmp_path / "hub" / "models--some--base" / "snapshots" / "abc"
    write_base("llama", snapshot)
    refs = tmp_path / "hub" / "models--some--base" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert quantized("some/base", tmp_path / "out")["model"] == "some/base"
    with pytest.raises(ValueError, match="--model some/other: "):
        quantized("some/other", tmp_path / "out2")

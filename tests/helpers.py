"""Small things that several test files build: pairs in a file, a model with an adapter that does something.

write_pairs(path, table): the competition's columns (winner, not label), by the ending of the path
adapted(folder, ...): a PreferenceModel over the base in `folder`, with an adapter whose lora_B is not zero
rows_of_all_lengths(n), label_file(path), counted(monkeypatch): for the tests of inference and pseudo-labels
events(out), assert_same_run(one, other): for the tests of runs that were cut off
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from minarena.files.base import load_backbone
from minarena.files.checkpoint import find_checkpoints
from minarena.model import AdapterConfig, PreferenceModel, attach_adapter_
from minarena.rows import Batch
from minarena.runtime import memory
from minarena.step import Compute, predict_p_first, train_step
from minarena.tiny import demo_pairs

TEXTS = ["prompt", "response_a", "response_b"]
CPU = torch.device("cpu")


def write_pairs(path, table: pd.DataFrame) -> str:
    winner = table["label"].map({1.0: "model_a", 0.0: "model_b"})
    table = table.drop(columns="label").assign(winner=winner)
    match Path(path).suffix:
        case ".parquet":
            table.to_parquet(path, index=False)
        case ".csv":
            table.to_csv(path, index=False)
        case ".jsonl":
            table.to_json(path, orient="records", lines=True, force_ascii=False)
    return str(path)


def adapted(folder: str, config: AdapterConfig | None = None, quantize: bool = True, **changes):
    """(model, adapter settings); r 6 and alpha 9 so that a forgotten / r shows, lora_B drawn anew."""
    config = config or AdapterConfig(**{"r": 6, "alpha": 9.0, **changes})
    backbone = load_backbone(folder, CPU, torch.float32, quantize=quantize)
    model = PreferenceModel(backbone, torch.nn.Identity())
    attach_adapter_(model, config, seed=1)
    stir_(model)
    return model.eval(), config


def stir_(model, seed: int = 2) -> None:
    """Draw every lora_B anew, in place: a fresh one is zero and hides what LoRA does."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=generator)


def rows_of_all_lengths(n: int = 23, **columns) -> pd.DataFrame:
    """Pairs of 100 to 400 tokens, one a byte, in no order, with ids that are in none either."""
    table = demo_pairs(n, seed=8).sample(frac=1, random_state=2, ignore_index=True)
    table = table.assign(
        **{name: table[name].str[-20:] for name in TEXTS}
    )  # a pair's answers end differently
    longer = [f"{text} " * (1 + (7 * i) % 5) for i, text in enumerate(table["response_b"])]
    return table.assign(response_b=longer, **columns)


def label_file(path) -> dict[str, float]:
    table = pd.read_parquet(path)
    assert list(table.columns) == ["id", *TEXTS, "winner"]
    for pair in table["winner"]:
        assert len(pair) == 2 and pair.sum() == pytest.approx(1)
    return {i: pair[0] for i, pair in zip(table["id"], table["winner"], strict=True)}


def counted(monkeypatch) -> list[int]:
    """The rows of each call of the model from here on."""
    calls, real = [], memory.predict_p_first

    def count(model, rows, *more):
        calls.append(len(rows))
        return real(model, rows, *more)

    monkeypatch.setattr(memory, "predict_p_first", count)
    return calls


def one_step(model, optimizer, rows, p_first, *, lr, row_weights=None, total_weight=None, **options):
    """step.train_step of rows and labels: (loss, gradient norm)."""
    weights = np.ones(len(rows)) if row_weights is None else np.asarray(row_weights)
    total = weights.sum() if total_weight is None else total_weight
    batch = Batch(list(rows), np.asarray(p_first), weights, total, [])
    compute, options = computing(options)
    return train_step(model, optimizer, batch, lr, compute, **options)


def predict(model, rows, **options):
    """step.predict_p_first: (rows,)."""
    compute, options = computing(options)
    return predict_p_first(model, rows, compute, **options)


def computing(options: dict) -> tuple[Compute, dict]:
    """(those of the options that are Compute's, the others)"""
    own = {name: value for name, value in options.items() if name in Compute.__dataclass_fields__}
    return Compute(**own), {name: value for name, value in options.items() if name not in own}


def events(out: Path, saves: bool = True) -> list[dict]:
    """The log without its two measurements of time, and if not `saves` without these."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if line["event"] == "step"]
    assert all(line.pop("tokens_per_second") > 0 and line.pop("seconds", 1) > 0 for line in steps)
    return [line for line in lines if saves or line["event"] != "save"]


def assert_same_run(one: Path, other: Path, saves: bool = True) -> None:
    """Weights, the optimiser's state after the last step, log and predictions: bit for bit."""
    last = find_checkpoints(str(one))[0].name
    for file in ("adapter_model.safetensors", f"{last}/optimizer.safetensors", f"{last}/state.json"):
        assert (one / file).read_bytes() == (other / file).read_bytes(), file
    assert events(one, saves) == events(other, saves)
    tables = [pd.read_parquet(out / "eval.parquet") for out in (one, other)]
    pd.testing.assert_frame_equal(*tables)

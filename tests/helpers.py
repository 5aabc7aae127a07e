"""Small things that several test files build: pairs in a file, a model with an adapter that does something.

write_pairs(path, table): the competition's columns (winner, not label), by the ending of the path
adapted(folder, ...): a PreferenceModel over the base in `folder`, with an adapter whose lora_B is not zero
"""

from pathlib import Path

import pandas as pd
import torch

from minarena.adapter import AdapterConfig, attach_adapter_
from minarena.model import PreferenceModel, load_backbone

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

"""Predict which answer wins, with one adapter or an ensemble over one base.

    python infer.py --adapter runs/ab runs/ba                        the demo's held-out pairs, with accuracy
    python infer.py --adapter runs/ab runs/ba --data test.parquet    submission.csv: id, winner

Each adapter sees the rows in the order it was trained in. The last line on stdout is one JSON object.
"""

import json
import sys
import time
from pathlib import Path

import pandas as pd
import torch

from minarena.config import InferConfig, parse, run
from minarena.data import read_pairs
from minarena.metrics import scores
from minarena.model import PreferenceModel, default_dtype, load_backbone, residual_dtype
from minarena.predict import TrainedAdapter, find_adapter, passes, predict_pairs
from minarena.text import load_tokenizer, repaired
from minarena.tiny import base_folder, demo_pairs


def main(argv: list[str] | None = None) -> dict:
    config = parse(InferConfig, argv, __doc__)
    adapters = [find_adapter(argument) for argument in config.adapter]
    for adapter in adapters:
        if not adapter.record:
            say(
                f"{adapter.folder}: no train_config.json, taken as order {adapter.order} (DIR:ba = otherwise)"
            )
    base = config.model or recorded(adapters, "model")
    for path in filter(None, [config.out, config.probs]):
        writable(path)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = {
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
        "fp32": torch.float32,
        None: default_dtype(device, training=False),
    }
    dtype = names[config.dtype]
    table = repaired(load_rows(config, base))
    with base_folder(base) as folder:
        tokenizer = load_tokenizer(folder)
        matmul = config.matmul or recorded(adapters, "matmul", "dequant")
        backbone = load_backbone(folder, device, dtype, matmul=matmul)
    model = PreferenceModel(backbone, torch.nn.Identity(), residual_dtype(device, dtype))

    start = time.perf_counter()
    p_a = predict_pairs(
        model,
        tokenizer,
        table,
        adapters,
        tta=config.tta,
        weights=config.weights,
        max_length=config.max_length or recorded(adapters, "max_length", 2200),
        token_budget=16384 if config.token_budget == "auto" else config.token_budget,
        dtype=dtype,
    )
    seconds = time.perf_counter() - start
    p = p_a.loc[table["id"]].to_numpy()  # by id, in input order
    write(
        pd.DataFrame({"id": table["id"], "winner": ["model_a" if x > 0.5 else "model_b" for x in p]}),
        config.out,
    )
    if config.probs:
        write(pd.DataFrame({"id": table["id"], "winner_model_a": p, "winner_model_b": 1 - p}), config.probs)

    result = {
        "out": config.out,
        "probs": config.probs,
        "rows": len(table),
        "adapters": config.adapter,
        "seconds": round(seconds, 2),
    }
    result["passes"] = [
        f"{adapters[i].folder} {order}" for i, order, _ in passes(adapters, config.tta, config.weights)
    ]
    labelled = table["label"].notna().to_numpy()
    if labelled.all():
        result |= scores(table["label"].to_numpy(), p)
        for name in ("accuracy", "log_loss"):
            say(f"{name:9} {result[name]:.4f} ± {result[name + '_se'] or float('nan'):.4f}")
    say(f"{len(table):,} rows, passes: {', '.join(result['passes'])}; {seconds:.1f} s -> {config.out}")
    print(json.dumps(result))
    return result


def say(line: str) -> None:
    print(line, file=sys.stderr)


def recorded(adapters: list[TrainedAdapter], name: str, default=None):
    """An option as the adapters were trained; they must agree, for one base serves them all."""
    values = {adapter.folder: adapter.record.get(name, default) for adapter in adapters}
    flag = "--" + name.replace("_", "-")
    if len(set(values.values())) > 1:
        raise ValueError(f"the adapters were trained with different {flag}: {values}: give {flag}")
    value = next(iter(values.values()))
    if value is None:
        raise ValueError(f"{flag} is needed: the adapters have no train_config.json that would tell")
    return value


def writable(path: str) -> None:
    """Before anything slow: the ending must be known and the folder there."""
    if Path(path).suffix not in (".csv", ".parquet"):
        raise ValueError(f"{path}: must end in .csv or .parquet")
    if not Path(path).resolve().parent.is_dir():
        raise ValueError(f"{path}: no such folder")


def load_rows(config: InferConfig, base: str) -> pd.DataFrame:
    if config.data:
        return read_pairs(config.data, config.limit)
    if base != "tiny":
        raise ValueError("--data FILE is needed: only the demo has rows of its own")
    say("The demo's held-out pairs: about topics that the training pairs never mention.")
    table = demo_pairs(600, seed=0xFACED, held_out=True)
    return table.head(config.limit or len(table))


def write(table: pd.DataFrame, path: str) -> None:
    table.to_csv(path, index=False) if path.endswith(".csv") else table.to_parquet(path, index=False)


if __name__ == "__main__":
    run(main)

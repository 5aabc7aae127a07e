"""Predict which answer wins, with one adapter or an ensemble over one base.

    python infer.py --adapter runs/ab runs/ba                        the demo's held-out pairs, with accuracy
    python infer.py --adapter runs/ab runs/ba --data test.parquet    submission.csv: id, winner
    python infer.py --adapter runs/ab --tta all --data more.parquet --pseudo pseudo.parquet    soft labels

Each adapter sees the rows in the order it was trained in. A long file is done in parts: stopped, the same
command goes on. The last line on stdout is one JSON object.
"""

import json
import shutil
import time
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from minarena.config import InferConfig, parse
from minarena.dist import World, this_world
from minarena.ensemble.parts import PART, open_parts
from minarena.ensemble.predict import TrainedAdapter, find_adapter, passes, predict_pairs
from minarena.ensemble.pseudo_labels import check, distilled, unlabelled, write_labels
from minarena.fast.path import take_fast_path_
from minarena.files.base import check_folder, load_base
from minarena.files.durable import file_record, write_whole
from minarena.files.pairs import read_pairs
from minarena.files.repair import repaired
from minarena.metrics import scores
from minarena.model import DTYPES, default_dtype
from minarena.runtime.console import by_language, device_name, plain_bars, plus_minus, run, say
from minarena.runtime.launch import launch
from minarena.tiny import demo_pairs


def main(argv: list[str] | None = None) -> dict:
    config, world = parse(InferConfig, argv, __doc__), this_world()
    plain_bars()
    if config.pseudo or config.distill or config.exclude or config.pseudo_threshold is not None:
        check(config)
    out = config.pseudo or config.out
    for path in filter(None, [out, config.probs]):
        writable(path, [*config.data, *config.exclude], world)
    if out == config.probs:
        raise ValueError(f"--probs {out} is the other output's file, too: give another name")
    if config.distill:
        table, p_a = distilled(config)
        result, parts = {"runs": config.distill, "seconds": 0.0}, None
    else:
        table, p_a, result, parts = predict(config, out, world)
    if world.rank:
        return {}  # rank 0 has the same, and it alone writes
    result = {"out": out, "probs": config.probs, "rows": len(table), **result}

    p = p_a.loc[table["id"]].to_numpy()  # by id, in input order
    if config.pseudo:
        result["labels"] = write_labels(out, table, p_a, config.pseudo_threshold)
    else:
        winner = ["model_a" if x > 0.5 else "model_b" for x in p]
        write_whole(pd.DataFrame({"id": table["id"], "winner": winner}), out)
    if config.probs:
        probs = pd.DataFrame({"id": table["id"], "winner_model_a": p, "winner_model_b": 1 - p})
        write_whole(probs, config.probs)
    if parts:
        shutil.rmtree(parts)
    if table["label"].notna().all():
        result |= scores(table["label"].to_numpy(), p, table["prompt"].to_numpy())
        for name in ("accuracy", "log_loss"):
            if result[name] is not None:
                say(f"{name:9} {plus_minus(result, name)}")
    how = ", ".join(result.get("passes", ["held-out probabilities of the runs"]))
    say(f"{len(table):,} rows, {how}; {result['seconds']:.1f} s -> {out}")
    print(json.dumps(result))
    return result


def predict(config: InferConfig, out: str, world: World) -> tuple[pd.DataFrame, pd.Series, dict, Path | None]:
    """(rows, P(response_a wins) by id, what was done, folder of the parts if there are several)"""
    adapters = [find_adapter(argument) for argument in config.adapter]
    for adapter in adapters:
        if not adapter.record:
            unknown = f"{adapter.folder}: no train_config.json, taken as order {adapter.order}"
            say(f"{unknown} (DIR:ba = otherwise)")
    base = config.model or recorded(adapters, "model")
    if base != "tiny":
        check_folder(base)
    how = {
        "max_length": config.max_length or recorded(adapters, "max_length", 2200),
        "truncation": config.truncation or recorded(adapters, "truncation", "left"),
    }
    matmul = config.matmul or recorded(adapters, "matmul", "dequant")
    device = world.device()
    word = config.dtype or default_dtype(device, training=False)
    dtype = DTYPES[word]
    table = unlabelled(config) if config.pseudo else load_rows(config, base)
    say(
        f"rows      {len(table):,}{by_language(table)}",
        f"passes    {', '.join(done(adapters, config))}",
        f"model     {base}, {word} on {device_name(device)}",
        f"output    {out}",
    )
    parts = None
    if len(table) > PART or world.size > 1:
        made_by = {"adapter": [[adapter.order, weights_record(adapter)] for adapter in adapters]}
        made_by["data"] = [file_record(path)["sha256"] for path in config.data]
        made_by |= {**how, "model": base, "dtype": str(dtype), "matmul": matmul, "fast": config.fast}
        world.require_same_on_all_ranks(made_by)
        parts = open_parts(f"{out}.parts", made_by) if len(table) > PART and not world.rank else None
    model, tokenizer = load_base(base, device, dtype, matmul)
    if config.fast == "on" and device.type == "cuda":
        take_fast_path_(model, dtype)
    texts = repaired(table, ranks=world.local_size)
    start = time.perf_counter()
    p_a = predict_pairs(
        model,
        tokenizer,
        texts,
        adapters,
        tta=config.tta,
        fraction=config.tta_fraction,
        weights=config.weights,
        token_budget=16384 if config.token_budget == "auto" else config.token_budget,
        auto=config.token_budget == "auto",
        dtype=dtype,
        folder=parts,
        world=world,
        **how,
    )
    result = {"adapters": config.adapter, "passes": done(adapters, config)}
    return table, p_a, {**result, "seconds": round(time.perf_counter() - start, 2)}, parts


def done(adapters: list[TrainedAdapter], config: InferConfig) -> list[str]:
    """The passes that were made, in words."""
    plan = {(i, order) for i, order, _ in passes(adapters, config.tta, None)}
    every = [
        (i, order)
        for i, order, _ in passes(adapters, "all" if config.tta == "uncertain" else config.tta, None)
    ]
    share = f" ({config.tta_fraction:.0%} of the rows)"
    return [f"{adapters[i].folder} {order}" + share * ((i, order) not in plan) for i, order in every]


def weights_record(adapter: TrainedAdapter) -> str:
    return file_record(f"{adapter.folder}/adapter_model.safetensors")["sha256"]


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


def writable(path: str, inputs: list[str], world: World) -> None:
    """Before anything slow: the ending must be known and the file one that can be written, and not read."""
    if Path(path).suffix not in (".csv", ".parquet"):
        raise ValueError(f"{path}: must end in .csv or .parquet")
    if Path(path).is_dir():
        raise ValueError(f"{path}: a folder has that name: give another")
    if Path(path).resolve() in [Path(name).resolve() for name in inputs]:
        raise ValueError(f"{path}: is read, and would be replaced: give another name")
    if world.rank:
        return
    aside = Path(f"{path}.unfinished")  # the name under which parts.py will write it
    try:
        aside.touch()
        aside.unlink()
    except OSError as error:
        raise ValueError(f"{path}: cannot be written: {error.strerror}") from error


def load_rows(config: InferConfig, base: str) -> pd.DataFrame:
    if config.data:
        return read_pairs(config.data, config.limit, bar=tqdm)
    if base != "tiny":
        raise ValueError("--data FILE is needed: only the demo has rows of its own")
    say("The demo's held-out pairs: about topics that the training pairs never mention.")
    table = demo_pairs(600, seed=0xFACED, held_out=True)
    return table.head(config.limit or len(table))


if __name__ == "__main__":
    launch(run, main, f"the same command goes on, in a file of more than {PART:,} rows where it stopped")

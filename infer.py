"""Predict which answer wins, with one adapter or an ensemble over one base.

    python infer.py --adapter runs/ab runs/ba                        the demo's held-out pairs, with accuracy
    python infer.py --adapter runs/ab runs/ba --data test.parquet    submission.csv: id, winner
    python infer.py --adapter runs/ab --tta all --data more.parquet --pseudo pseudo.parquet    soft labels
    python infer.py --adapter runs/ab --prompt "Why?" --answers a.txt b.txt    one pair, in both orders
    python infer.py --adapter runs/ab --data -       lines of JSON on stdin -> a line of JSON a row on stdout

Each adapter sees the rows in the order it was trained in. A long file is done in parts: after an interruption
the same command goes on. The last line on stdout is one JSON object (on a terminal with --json only). From
Python: minarena/ensemble/judge.py.
"""

if __name__ == "__main__":  # the imports below take seconds
    from minarena.runtime.interrupt import one_line_on_ctrl_c

    one_line_on_ctrl_c("infer.py")

import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from minarena.config import SEED, InferConfig, parse
from minarena.data import GROUPS, output_ids
from minarena.dist import World, this_world
from minarena.ensemble.adapters import Ensemble, TrainedAdapter, check_base, find_ensemble_
from minarena.ensemble.parts import PART, open_parts
from minarena.ensemble.predict import load_predictor, passes, predict_pairs, say_cut
from minarena.ensemble.pseudo_labels import check_pseudo_options, distilled, unlabelled, write_labels
from minarena.files.durable import TMP_SUFFIX, file_record, write_whole
from minarena.files.formats import lines
from minarena.files.layouts import table_of_lists
from minarena.files.lock import unlock_folder
from minarena.files.pairs import READING, as_typed, read_pairs
from minarena.files.repair import repaired
from minarena.files.sources import data_files, records
from minarena.metrics import ENOUGH, scores
from minarena.model import DTYPES
from minarena.runtime.console import (
    by_language,
    device_name,
    plain_bars,
    plus_minus,
    print_json,
    run_command,
    say,
)
from minarena.runtime.launch import launch
from minarena.text import encode
from minarena.tiny import HELD_OUT_ROWS, demo_pairs


def main(argv: list[str] | None = None) -> dict:
    config, world = parse(InferConfig, argv, __doc__), this_world()
    plain_bars()
    if config.pseudo or config.distill or config.exclude or config.pseudo_threshold is not None:
        check_pseudo_options(config)
    if config.prompt is None and "-" not in config.data and not config.pseudo:
        config.out = config.out or "submission.csv"
    outputs = [path for path in (config.pseudo, config.out, config.probs) if path]
    check_writable(config, outputs, world)
    if config.distill:
        table, p_a = distilled(config)
        result, parts = {"runs": config.distill, "seconds": 0.0}, None
    else:
        found = find_ensemble_(config, world)
        table = unlabelled(config) if config.pseudo else load_rows(config)
        if config.prompt is None:
            describe(found, table, outputs)
        base = check_base(found)
        parts = claim_parts(found, base, table, outputs, world)
        p_a, figures = predict(found, table, parts, world)
        result = {"adapters": config.adapter, "passes": describe_passes(found)} | figures
    if world.rank:
        return {}  # rank 0 has the same and writes it

    result = {"out": config.pseudo or config.out, "probs": config.probs, "rows": len(table), **result}
    p = p_a.loc[table["id"]].to_numpy()  # by id, in input order
    if config.pseudo:
        result["labels"] = write_labels(config.pseudo, table, p_a, config.pseudo_threshold)
    elif config.out:
        winner = ["model_a" if x > 0.5 else "model_b" for x in p]
        write_whole(pd.DataFrame({"id": output_ids(table), "winner": winner}), config.out)
    probs = pd.DataFrame({"id": output_ids(table), "winner_model_a": p, "winner_model_b": 1 - p})
    if "chosen" in table:  # nan where a file has no chosen answers
        probs["p_chosen"] = table["chosen"] * p + (1 - table["chosen"]) * (1 - p)
    if config.probs:
        write_whole(probs, config.probs)
    if parts:
        shutil.rmtree(parts)
        unlock_folder(parts)
    if table["label"].notna().all():
        result |= judged(table, p)
    how = ", ".join(result.get("passes", ["held-out probabilities of the runs"]))
    if config.prompt is None:
        say(f"{len(table):,} rows, {how}; {result['seconds']:.1f} s -> {(outputs or ['stdout'])[0]}")
    if "-" in config.data and not outputs:
        print(probs.to_json(orient="records", lines=True, double_precision=15), end="")
        return result
    return print_json(result, config.json)


def judged(table: pd.DataFrame, p: np.ndarray) -> dict:
    """Accuracy and log loss, of all rows and by group: said, and given for programs.

    Of each column of GROUPS, groups of ENOUGH rows or more count, and their mean, in which a small group
    counts as much as a large one: what RewardBench (Lambert et al. 2024) and RM-Bench report.
    """
    result, groups = scores(table["label"].to_numpy(), p, table["prompt"].to_numpy()), {}
    for name in ("accuracy", "log_loss"):
        if result[name] is not None:
            say(f"{name:9} {plus_minus(result, name)}")
    rows = table.assign(p=p)[(table["label"] != 0.5).to_numpy()]
    if len(rows) < len(table):
        say(f"ties      {len(table) - len(rows):,}, not counted in the accuracy")
    for column in [name for name in GROUPS if name in table]:
        found = {}
        for name, part in rows.groupby(column):
            if len(part) >= ENOUGH:
                figures = scores(*(part[key].to_numpy() for key in ("label", "p", "prompt")))
                found[name] = figures["accuracy"]
                say(f"accuracy  {plus_minus(figures, 'accuracy')}  {column} {name}, {len(part):,} rows")
        if found:
            groups[column] = {"mean": float(np.mean([*found.values()])), "accuracy": found}
            which = f"{len(found)} of {rows[column].nunique()} groups of {column}, of {ENOUGH} rows or more"
            say(f"accuracy  {groups[column]['mean']:.4f}           the mean over {which}")
    return result | ({"groups": groups} if groups else {})


def check_writable(config: InferConfig, outputs: list[str], world: World) -> None:
    """Before anything slow: each output's ending must be known, and the file one that is not read and can be
    written."""
    inputs = [file for name in (*config.data, *config.exclude) for file in data_files(name)]
    for path in outputs:
        if Path(path).suffix not in (".csv", ".parquet"):
            raise ValueError(f"{path}: must end in .csv or .parquet")
        if Path(path).is_dir():
            raise ValueError(f"{path}: a folder has that name: give another")
        if Path(path).resolve() in [Path(name).resolve() for name in (*inputs, *config.answers)]:
            raise ValueError(f"{path}: is read, and would be replaced: give another name")
        if world.rank:
            continue
        tmp = Path(f"{path}.{TMP_SUFFIX}")  # the name under which write_whole begins
        try:
            tmp.touch()
            tmp.unlink()
        except OSError as error:
            raise ValueError(f"{path}: cannot be written: {error.strerror}") from error
    if len({Path(path).resolve() for path in outputs}) < len(outputs):
        raise ValueError(f"--probs {config.probs} is the other output's file, too: give another name")


def load_rows(config: InferConfig) -> pd.DataFrame:
    if config.prompt is not None:
        return table_of_lists([config.prompt], *([answer(path)] for path in config.answers))
    if config.data:
        return read_pairs(config.data, config.limit, bar=tqdm, **as_typed(vars(config)))
    if config.model != "tiny":
        raise ValueError("--data FILE is needed: only the demo has rows of its own")
    say("The demo's held-out pairs: about topics that the training pairs never mention.")
    table = demo_pairs(HELD_OUT_ROWS, SEED, held_out=True)
    return table.head(config.limit or len(table))


def answer(path: str) -> str:
    """The text of a file of --answers, without the last line's end."""
    try:
        with open(path, "rb") as stream:
            return "".join(lines(stream)).removesuffix("\n").removesuffix("\r")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"--answers {path}: {reason}") from error


def describe(found: Ensemble, table: pd.DataFrame, outputs: list[str]) -> None:
    say(
        f"rows      {len(table):,}{by_language(table)}",
        f"passes    {', '.join(describe_passes(found))}",
        f"model     {found.config.model}, {found.config.dtype} on {device_name(found.device)}",
        f"output    {outputs[0] if outputs else 'lines of JSON on stdout'}",
    )


def describe_passes(found: Ensemble) -> list[str]:
    """Every pass over the rows, in words: `runs/ab ab`, `runs/ab ba (40% of the rows)`."""
    config, adapters, words = found.config, found.adapters, []
    on_all_rows = {(i, order) for i, order, _ in passes(adapters, config.tta, None)}
    for i, order, _ in passes(adapters, "all" if config.tta == "uncertain" else config.tta, None):
        some = "" if (i, order) in on_all_rows else f" ({config.tta_fraction:.0%} of the rows)"
        words.append(f"{adapters[i].folder} {order}{some}")
    return words


def claim_parts(
    found: Ensemble, base: dict, table: pd.DataFrame, outputs: list[str], world: World
) -> Path | None:
    """The folder of the parts of a long file, on the rank that writes; None for a short one, and for stdin.

    Raises ValueError where ranks differ, or where the folder holds parts of another command.
    """
    config, decide = found.config, ("max_length", "truncation", "model", "matmul", "fast")
    if (len(table) <= PART or "-" in config.data) and world.size == 1:
        return None
    decides = {name: getattr(config, name) for name in decide}
    decides |= {"dtype": str(DTYPES[config.dtype]), "base": base}
    decides["adapter"] = [[adapter.order, weights_hash(adapter)] for adapter in found.adapters]
    decides["data"] = [record["sha256"] for record in records(config.data)]
    decides |= {"columns": config.columns} if config.columns else {}
    decides |= {"reading": READING} if "chosen" in table else {}
    world.require_same_on_all_ranks(decides)
    return open_parts(f"{outputs[0]}.parts", decides) if len(table) > PART and not world.rank else None


def weights_hash(adapter: TrainedAdapter) -> str:
    return file_record(f"{adapter.folder}/adapter_model.safetensors")["sha256"]


def predict(found: Ensemble, table: pd.DataFrame, parts: Path | None, world: World) -> tuple[pd.Series, dict]:
    """(P(response_a wins) by id, figures: seconds without loading; with --prompt also of both orders)"""
    config, adapters, texts = found.config, found.adapters, repaired(table, ranks=world.local_size)
    one = config.prompt is not None
    base = load_predictor(found, texts, parts=parts, world=world, aloud=not one, kept={} if one else None)
    say_cut(base, texts, adapters, "all" if one else config.tta)
    settings = {"fraction": config.tta_fraction, "weights": config.weights, "known": {}}
    start = time.perf_counter()
    p_a = predict_pairs(base, texts, adapters, config.tta, **settings)
    figures = {"seconds": round(time.perf_counter() - start, 2)}
    if one:
        (ab,), (ba,) = (predict_pairs(base, texts, adapters, order, **settings) for order in ("ab", "ba"))
        tokens = len(encode(base.tokenizer, texts, sys.maxsize)[0])
        cut = max(0, tokens - config.max_length)
        figures |= {"p_a": float(p_a.iloc[0]), "p_a_ab": ab, "p_a_ba": ba, "disagreement": abs(ab - ba)}
        figures |= {"tokens": tokens, "cut": cut}
        orders = f"{ab:.3f} where it is shown first, {ba:.3f} where second, {abs(ab - ba):.3f} apart"
        lost = f"{tokens:,} tokens are cut to {config.max_length:,}" if cut else "nothing is cut"
        say(f"P(the first answer is preferred) {figures['p_a']:.3f}: {orders}; {lost}")
    return p_a, figures


if __name__ == "__main__":
    going_on = f"the same command goes on, in a file of more than {PART:,} rows where it stopped"
    launch(run_command, main, going_on)

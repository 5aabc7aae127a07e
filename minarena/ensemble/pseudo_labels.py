"""Pseudo-labels: probabilities of trained models, as soft labels that train.py --data reads.

    infer.py --adapter DIR... --data UNLABELLED... --pseudo pseudo.parquet     labels for rows that have none
    infer.py --distill RUN... --data train.parquet --pseudo distilled.parquet  labels for the training rows

--distill is self-distillation: each RUN was trained with another --fold of the same --n-splits, so every row
has a probability from a model that never saw it. The soft label keeps what other rows confirm and loses a
label's noise. Reported as good as a teacher five times as large, by the 3rd of the WSDM Cup:
https://www.kaggle.com/competitions/wsdm-cup-multilingual-chatbot-arena/discussion/567584

A label is always joined to its row by id: the recipe's notebook sorted rows by length, wrote the predictions
back by position, and then reported that pseudo-labels did not help.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from minarena.config import InferConfig
from minarena.data import TEXTS, output_ids
from minarena.files.durable import read_record, write_whole
from minarena.files.pairs import READING, as_typed, read_frames, read_pairs
from minarena.files.sources import data_files, records
from minarena.runtime.console import first_line, say


def check_pseudo_options(config: InferConfig) -> None:
    """Raise ValueError, in one line with the remedy, for options that make no sense together."""
    threshold = config.pseudo_threshold
    if not config.pseudo:
        raise ValueError("--pseudo FILE is needed by --distill, --exclude and --pseudo-threshold")
    if not config.data:
        raise ValueError("--pseudo needs --data FILE: the rows to label")
    if config.probs:
        raise ValueError("--pseudo is the output: drop --probs")
    if threshold is not None and not 0.5 <= threshold < 1:
        raise ValueError(f"--pseudo-threshold {threshold}: must be at least 0.5 and below 1")
    if Path(config.pseudo).is_file():
        raise ValueError(f"--pseudo {config.pseudo} exists: give another name, or delete it")


def unlabelled(config: InferConfig) -> pd.DataFrame:
    """The rows of --data to label: no empty texts, no equal answers, no prompts of the --exclude files."""
    table = read_pairs(config.data, config.limit, ties="half", bar=tqdm, **as_typed(vars(config)))
    known = set().union(*map(prompts, config.exclude))
    excluded = table["prompt"].str.strip().isin(known)
    if config.exclude:
        say(f"{excluded.sum():,} rows have a prompt that is in --exclude: left out")
    if excluded.all():
        raise ValueError("--data: no row is left to label: see what was left out, and --exclude")
    return table[~excluded]


def prompts(path: str) -> set[str]:
    """Prompts of a file of any layout, stripped: as we write conversations, and as its own column says."""
    found = set(read_pairs([path])["prompt"].str.strip())
    for frame, _ in (part for file in data_files(path) for part in read_frames(file)):
        found |= {text.strip() for text in frame.get("prompt", []) if isinstance(text, str)}
    return found


def write_labels(path: str, table: pd.DataFrame, p_a: pd.Series, threshold: float | None) -> int:
    """Write id, texts and winner = [p_a, p_b] of the table's rows; returns the number of rows written.

    p_a: has the ids as its index, in any order. threshold: write only rows of more confidence, with hard
    labels.
    """
    p = p_a.loc[table["id"]].to_numpy()  # by id
    if threshold is not None:
        sure = np.maximum(p, 1 - p) > threshold
        table, p = table[sure], (p[sure] > 0.5).astype(float)
    if not len(table):
        raise ValueError(f"--pseudo-threshold {threshold}: no row is that sure: lower it")
    labels = table[["id", *TEXTS]].assign(id=output_ids(table), winner=[[float(x), 1 - float(x)] for x in p])
    write_whole(labels, path)
    return len(labels)


def distilled(config: InferConfig) -> tuple[pd.DataFrame, pd.Series]:
    """(the rows of --data as the runs read them, the mean of the runs' held-out probabilities by id)"""
    runs, tables = zip(*map(finished_run, config.distill), strict=True)
    for run, record in zip(config.distill, runs, strict=True):
        if record["init_adapter"]:  # it may have seen the rows that the fold holds out
            begun = f"began from --init-adapter {record['init_adapter']}"
            raise ValueError(f"--distill {run}: {begun}, which may have seen the rows it held out")
        files = [file["sha256"] for file in record["data_files"]]
        if record["eval_data"] or files != [file["sha256"] for file in records(config.data)]:
            raise ValueError(f"--distill {run}: was not trained on folds of --data {' '.join(config.data)}")
    first = runs[0]
    table = read_pairs(config.data, first["limit"], first["ties"], bar=tqdm, **as_typed(first))
    if "chosen" in table and any(record["reading"] != READING for record in runs):
        raise ValueError("--distill: a run dealt the chosen answers of --data to other sides: train it again")
    held_out = pd.concat(tables)
    label = table.set_index("id")["label"]
    stranger = held_out[held_out["label"] != label.reindex(held_out["id"]).to_numpy()]
    if len(stranger):
        raise ValueError(f"--distill: id {stranger['id'].iloc[0]!r} is not in --data with the same label")
    p_a = held_out.groupby("id")["p_a"].mean()
    missing = table["id"][~table["id"].isin(p_a.index)]
    if len(missing):
        folds = sorted({record["fold"] for record in runs})
        had = f"folds {', '.join(map(str, folds))} of {first['n_splits']}"
        raise ValueError(f"--distill: {len(missing):,} rows were held out by no run ({had} are here)")
    return table, p_a


def finished_run(run: str) -> tuple[dict, pd.DataFrame]:
    """(the keys of its train_config.json that are used here, its eval.parquet)"""
    names = ("data_files", "eval_data", "limit", "ties", "fold", "n_splits")
    # what earlier runs had, whose records lack these keys
    later = {"init_adapter": None, "columns": [], "winner_words": [], "reading": 1}
    try:
        table = pd.read_parquet(f"{run}/eval.parquet", columns=["id", "label", "p_a"])
        record = read_record(Path(run) / "train_config.json")
        return {name: (later | record)[name] for name in (*names, *later)}, table
    except Exception as error:  # pyarrow's, json's and ours: a file there is missing or damaged
        raise ValueError(f"--distill {run}: not a finished run of train.py: {first_line(error)}") from error

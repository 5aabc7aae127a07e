"""The peer: the recipe in Hugging Face's Trainer + PEFT + bitsandbytes, for quality and for speed.

    python benchmarks/peft_trainer.py --model DIR --data train.parquet --eval-data valid.parquet    quality
    python benchmarks/peft_trainer.py --shape 9b --steps 8                                          speed

The peer is given the same rows, in the same order, as train.py: load_pairs, template, tokens and rows_of_step
are minarena's. Everything else is theirs: model, LoRA, LLM.int8 product, loop, schedule, optimiser, autocast,
and the padding of 8 x 2 rows a step to the longest of 8. Two things are repaired in its favour: the loss is
divided by the step's rows, and SDPA runs without cuDNN, whose backward gives NaN with a mask at some widths.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

from benchmarks import random_base as base
from benchmarks.peft_peer import (
    MICRO_BATCHES,
    ROWS_A_STEP,
    load_classifier,
    predict_first,
    run_trainer,
    with_peft,
)
from minarena.batching import real_tokens, rows_of_step, steps_per_epoch
from minarena.config import TrainConfig
from minarena.data import swapped
from minarena.files.repair import repaired
from minarena.files.tokenizer import load_tokenizer
from minarena.metrics import scores
from minarena.runtime.console import run_command
from minarena.text import encode
from train import load_pairs


def main(argv: list[str] | None = None) -> dict:
    options = parse(argv)
    torch.backends.cuda.enable_cudnn_sdp(False)  # https://github.com/pytorch/pytorch/issues/196678
    # index 0 by name: accelerate refuses an 8-bit model on plain "cuda", as if Trainer's were another device
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    result = measure_speed(options, device, dtype) if options.shape else train(options, device, dtype)
    base.print_result(vars(options), result)
    return result


def measure_speed(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict:
    """Figures of --steps optimiser steps on random weights and rows, after --warmup others."""
    attention = options.attn or ("sdpa" if options.shape == "smollm2" else "eager")
    model = base.random_model(options.shape, device, dtype, attention, "AutoModelForSequenceClassification")
    model = with_peft(model, options, pad_id=0)
    steps = options.warmup + options.steps
    # grouped by length: from many rows, as in an epoch; else the very rows of train_speed.py's steps
    count = max(steps * ROWS_A_STEP, 1600) if options.group_by_length else steps * ROWS_A_STEP
    rows = base.random_rows(count, model.config.vocab_size, options.seed, options.max_length)
    labels = np.random.default_rng(options.seed).integers(0, 2, len(rows))
    batches = (
        length_grouped(rows) if options.group_by_length else np.split(np.arange(count), steps * MICRO_BATCHES)
    )
    batches = batches[: steps * MICRO_BATCHES]
    seconds = run_trainer(model, rows, labels, batches, 0, options, device)[1]
    tokens = [
        real_tokens(rows[i] for batch in batches[k : k + MICRO_BATCHES] for i in batch)
        for k in range(0, len(batches), MICRO_BATCHES)
    ]
    result = base.speed_figures(
        tokens[options.warmup :], seconds[options.warmup :], 4 * base.projection_weights(model)
    )
    result |= {
        "fill": base.fill(rows, batches[options.warmup * MICRO_BATCHES :]),
        "peak_gib": base.peak_gib(),
    }
    return result | {"first_step_seconds": round(seconds[0], 2), "attention": attention}


def train(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict:
    """Train on --data as the recipe did; accuracy and log loss on --eval-data in both orders and their
    mean."""
    files = {"data": options.data, "eval_data": options.eval_data, "limit": options.limit}
    pairs, held_out = map(repaired, load_pairs(TrainConfig(**files, order=options.order)))
    if not pairs["label"].isin((0.0, 1.0)).all():
        raise ValueError("--data: soft labels: the peer's loss takes winners")
    tokenizer = load_tokenizer(options.model)
    shown = swapped(pairs) if options.order == "ba" else pairs
    rows = encode(tokenizer, shown, options.max_length)
    eval_rows = [encode(tokenizer, table, options.max_length) for table in (held_out, swapped(held_out))]
    # transformers pools the last id that is not the pad id: one that no row has, for many bases pad with EOS
    used = set(np.unique(np.concatenate([*rows, *eval_rows[0], *eval_rows[1]])).tolist())
    unused = next(i for i in range(len(tokenizer)) if i not in used)
    model, attention = load_classifier(options, device, dtype)
    model = with_peft(model, options, unused)
    labels = 1 - shown["label"].to_numpy().astype(int)  # class 0: the answer shown first wins
    batches = in_order(len(rows), options.epochs, options.seed)
    start = time.perf_counter()
    losses, _ = run_trainer(model, rows, labels, batches, unused, options, device)
    seconds, tokens = time.perf_counter() - start, real_tokens(rows) * options.epochs
    result = {"steps": len(losses), "rows": len(rows), "tokens": tokens, "seconds": round(seconds, 2)}
    result |= {"tokens_per_second": round(tokens / seconds, 1), "fill": base.fill(rows, batches)}
    result |= {
        "peak_gib": base.peak_gib(),
        "last_50_losses": float(np.mean(losses[-50:])),
        "attention": attention,
    }
    p_ab = predict_first(model, eval_rows[0], unused, device, dtype)
    p_ba = 1 - predict_first(model, eval_rows[1], unused, device, dtype)
    predicted = {"ab": p_ab, "ba": p_ba, "mean": (p_ab + p_ba) / 2}
    figures = {name: scores(held_out["label"].to_numpy(), p) for name, p in predicted.items()}
    if options.out:  # as train.py's eval.parquet
        columns = {"p_a": predicted["mean"], "p_a_ab": p_ab, "p_a_ba": p_ba}
        Path(options.out).mkdir(parents=True, exist_ok=True)
        held_out[["id"]].assign(**columns).to_parquet(Path(options.out) / "eval.parquet", index=False)
    result |= {"order": options.order}
    return result | {"eval_rows": len(held_out), "eval": {**figures[options.order], **figures}}


def in_order(rows: int, epochs: int, seed: int) -> list[np.ndarray]:
    """Row numbers of each micro-batch, in train.py's order of steps."""
    steps = range(epochs * steps_per_epoch(rows, ROWS_A_STEP))
    chosen = [rows_of_step(step, rows, ROWS_A_STEP, seed) for step in steps]
    # halves, so that a short last step of an epoch is two micro-batches as well
    return [part for step in chosen for part in np.array_split(step, MICRO_BATCHES) if len(part)]


def length_grouped(rows: list[np.ndarray], seed: int = 0) -> list[np.ndarray]:
    """Micro-batches of rows of like length, Trainer's own way (sorted inside 50 batches), then shuffled."""
    from transformers.trainer_pt_utils import get_length_grouped_indices

    size = ROWS_A_STEP // MICRO_BATCHES
    generator = torch.Generator().manual_seed(seed)
    order = get_length_grouped_indices([len(row) for row in rows], size, generator=generator)
    batches = np.array_split(np.array(order), range(size, len(order), size))
    return [batches[i] for i in np.random.default_rng(seed).permutation(len(batches))]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder of a float base")
    parser.add_argument("--data", nargs="+", help="training files")
    parser.add_argument("--eval-data", help="held-out file")
    parser.add_argument("--out", help="folder for eval.parquet: P(response_a wins) of the held-out rows")
    parser.add_argument("--order", choices=["ab", "ba"], default="ab")
    parser.add_argument("--limit", type=int, help="as train.py's: the first N rows of --data")
    plain = {"epochs": 1, "lr": 2e-4, "warmup-ratio": 0.025, "lora-r": 64, "lora-alpha": 4.0}
    for name, default in (plain | {"lora-dropout": 0.05, "head-dropout": 0.1}).items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help="as train.py's")
    parser.add_argument("--seed", type=lambda word: int(word, 0), default=0xFACED)
    parser.add_argument("--shape", choices=base.SHAPES, help="speed on random weights, no files")
    parser.add_argument("--steps", type=int, default=8, help="timed steps, with --shape")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them, with --shape")
    parser.add_argument("--group-by-length", action="store_true", help="Trainer's grouping, with --shape")
    parser.add_argument("--max-length", type=int, default=2200, help="tokens of the longest row")
    parser.add_argument(
        "--attn", choices=["eager", "sdpa", "flex_attention"], help="default: eager under a soft-cap"
    )
    parser.add_argument("--checkpointing", choices=["on", "off"], default="on", help="the recipe's: on")
    options = parser.parse_args(argv)
    if not options.shape and not (options.model and options.data and options.eval_data):
        parser.error("give --shape, or --model with --data and --eval-data")
    return options


if __name__ == "__main__":
    run_command(main)

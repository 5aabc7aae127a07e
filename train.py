"""Train a preference model: LoRA and a head on a frozen 8-bit base.

    python train.py                 the demo: a tiny random Gemma-2, under a minute on a CPU
    python train.py --swap          its twin, trained on (prompt, answer b, answer a): the same as --order ba
    python train.py --model google/gemma-2-9b-it --data train.parquet --swap

The whole run is `main`. Each pass of its loop is one optimiser step; the arithmetic of a step is in
minarena/step.py. Words used all through: a PAIR is a line of the table; a ROW is a pair as it is shown, token
ids; a STEP updates the weights once, from a BATCH of rows; a SHARE is the part of a batch that one rank
computes, in MICRO-BATCHES that fit the device. A name that ends in _ changes its arguments. The last line on
stdout is one JSON object (on a terminal with --json only); everything meant for people goes to stderr.
"""

if __name__ == "__main__":  # the imports below take seconds
    from minarena.runtime.interrupt import one_line_on_ctrl_c

    one_line_on_ctrl_c("train.py")

import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

import pandas as pd
import torch
from tqdm import tqdm

from minarena.batching import real_tokens, steps_per_epoch
from minarena.config import TrainConfig, parse
from minarena.data import EVAL_COLUMNS, JUDGED_BY, split
from minarena.dist import World, this_world
from minarena.fast.path import take_fast_path_
from minarena.fast.recompute import fit_layers_
from minarena.files.adapter import load_adapter_, read_adapter, require_adapter
from minarena.files.base import check_folder, load_base
from minarena.files.durable import file_record
from minarena.files.pairs import READING, as_typed, read_pairs
from minarena.files.repair import repaired
from minarena.files.run import Run
from minarena.files.sources import records
from minarena.metrics import scores
from minarena.model import DTYPES, AdapterConfig, attach_adapter_, default_dtype
from minarena.optim import lr_at, make_optimizer
from minarena.rows import HeldOut, encode_both_orders, encode_rows
from minarena.runtime.console import (
    describe_data,
    plain_bars,
    print_json,
    print_plan,
    print_results,
    run_command,
    say,
)
from minarena.runtime.launch import launch
from minarena.runtime.memory import peak_bytes, predict_on_all_ranks, retry_on_oom_
from minarena.runtime.signals import catch_stop_signals
from minarena.runtime.warn import (
    check_disjoint,
    refuse_one_sided,
    say_shared_prompts,
    say_unknown_characters,
)
from minarena.step import Compute, make_compute, train_step
from minarena.text import pad_id
from minarena.tiny import DEMO_LR, DEMO_ROWS, HELD_OUT_ROWS, demo_pairs


def main(argv: list[str] | None = None) -> dict:
    config, world = parse(TrainConfig, argv, __doc__), this_world()
    device = resolve_(config, world)
    # ------------------------------------------------------------------------ data, model, optimiser
    pairs, held_out = load_pairs(config)
    run = Run.open(config.out, world, record_of(config, pairs, device, world), config.resume)
    if run.result:  # of a run that was finished already
        return print_json(run.result, config.json)
    describe_data(config, pairs, held_out)
    pairs, held_out = (repaired(table, ranks=world.local_size) for table in (pairs, held_out))
    model, adapter, tokenizer, compute = build(config, device, pairs)
    run.record_computing(model, compute.token_budget)
    say_unknown_characters(tokenizer, pairs, held_out)
    optimizer = make_optimizer(model, config.weight_decay)
    rows, held_out = encode_rows(tokenizer, pairs, config), encode_both_orders(tokenizer, held_out, config)
    del pairs  # its texts are no longer needed: those of 600,000 rows are gigabytes
    steps = config.epochs * steps_per_epoch(rows.pairs, config.batch_size)
    first = run.start_(model, optimizer, adapter, config, compute)  # steps that --resume finds done, or 0
    world.require_same_on_all_ranks(run.record | {"steps done": first})
    # every rank starts from rank 0's parameters, which the optimiser holds as one or two flat vectors
    world.broadcast_(*(vector.data for group in optimizer.param_groups for vector in group["params"]))
    if device.type == "cuda":  # choose the layers that are recomputed in the backward
        fit_layers_(model, compute.token_budget, longest=max(map(len, rows.rows)))
    print_plan(config, model, rows, steps, compute.token_budget)
    options = {name: getattr(config, name) for name in ("max_grad_norm", "label_smoothing")}
    options["world"] = world
    with catch_stop_signals(announce=run.writes) as signals:
        if first < steps and due(first, config.eval_every) and not run.has_eval(first):  # it was cut off
            evaluate_midway(run, first, model, held_out, compute, signals)
        for step in run.progress(first, steps):
            # ---------------------------------------------------------------- one optimiser step
            begin = time.perf_counter()
            batch = rows.of_step(step, config.batch_size, config.seed)  # the same rows on every rank
            share, lr = batch.share(world), lr_at(step, steps, config.lr, config.warmup_ratio)
            masks = (config.seed, step, world.rank)  # dropout's: the same ones when the step is tried again
            # train_step: forward and backward of each micro-batch, all-reduce, clip, AdamW
            one_step = partial(
                train_step, model, optimizer, share, lr, compute, dropout_seed=masks, **options
            )
            with run.saving_on_failure(step, batch.names):  # errors that leave the weights untouched
                # out of GPU memory: halve compute.token_budget (if auto) and try again
                loss, grad_norm = retry_on_oom_(one_step, share.rows, compute)
            seconds = time.perf_counter() - begin
            run.log_step(step + 1, real_tokens(batch.rows), seconds, loss=loss, lr=lr, grad_norm=grad_norm)
            # ---------------------------------------------------------------- once in a while, on all ranks
            if due(step + 1, config.eval_every) and step + 1 < steps:
                evaluate_midway(run, step + 1, model, held_out, compute, signals)
            stop = world.first_signal(signals)  # its number, or 0: all ranks stop after the same step
            if stop or step + 1 == steps or due(step + 1, config.save_every):
                run.save(step + 1)
            if stop:
                run.exit_stopped(stop, steps)
    figures, table = evaluate(model, held_out, compute, world)
    if not run.writes:
        return {}  # rank 0 has the same figures and writes them
    run.log("eval", steps, **figures)
    run.finish(table, model, adapter, config.model)
    result = result_of(run, config, steps, rows.pairs, figures, device)
    print_results(config, result, len(table))
    return print_json(result, config.json)


def resolve_(config: TrainConfig, world: World) -> torch.device:
    """Fill in, in place, the options that depend on others or on the device; returns the device."""
    plain_bars()
    device = world.device()
    config.out = config.out or f"runs/{config.order}"
    config.dtype = config.dtype or default_dtype(device, training=True)
    check_folder(config.model)
    if config.model == "tiny":
        what = "Your rows, but" if config.data else "This is the demo:"
        say(f"{what} a tiny random Gemma-2. --model and --data train a real one.")
        if config.lr is None:
            config.lr = DEMO_LR
            say(f"lr {DEMO_LR} is the demo's own (2e-4 teaches a random base nothing); a typed --lr wins.")
    if config.lr is None:
        config.lr = 2e-4
    if config.init_adapter:  # its rank, alpha, frozen layers and head are what is trained, and recorded
        require_adapter(config.init_adapter, "--init-adapter")
        given = read_adapter(config.init_adapter)[0]
        config.lora_r, config.lora_alpha = given.r, given.alpha
        config.freeze_layers, config.head = given.freeze_layers, given.head
    return device


def record_of(config: TrainConfig, pairs: pd.DataFrame, device: torch.device, world: World) -> dict:
    """What train_config.json says of the run: all options, the data files with hashes, rows, device, ranks.
    (Run adds versions, the commit, and whether the fast or the reference path ran.)"""
    files = [*config.data, config.eval_data] if config.eval_data else config.data
    record = asdict(config) | {"data_files": records(files), "rows": len(pairs)}
    record |= {"reading": READING} if "chosen" in pairs else {}
    if config.init_adapter:
        start = file_record(f"{config.init_adapter}/adapter_model.safetensors")
        record["init_adapter_sha256"] = start["sha256"]
    return record | {"device": device.type, "world_size": world.size}


def load_pairs(config: TrainConfig) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(training rows, held-out rows), both with labels; ValueError says why rows cannot be trained on."""
    if not config.data:
        pairs = demo_pairs(DEMO_ROWS, config.seed).head(config.limit or DEMO_ROWS)
        return pairs, demo_pairs(HELD_OUT_ROWS, config.seed, held_out=True)
    pairs = read_pairs(config.data, config.limit, config.ties, tqdm, **as_typed(vars(config)))
    if config.pseudo_weight != 1 and "pseudo" not in pairs:
        raise ValueError(f"--pseudo-weight {config.pseudo_weight}: no file of --data has pseudo-labels")
    if config.eval_data:
        # without --limit and --ties: figures stay comparable
        held_out = read_pairs([config.eval_data], bar=tqdm, **as_typed(vars(config)))
        check_disjoint(pairs, held_out, config.eval_data)
    else:
        pairs, held_out = split(pairs, config.n_splits, config.fold, config.split_by)
    for table, name in ((pairs, "--data"), (held_out, "the held-out part")):
        if not len(table):
            remedy = "see what was left out, --n-splits, --fold, --limit, --ties; or give --eval-data"
            raise ValueError(f"{name} has no rows: {remedy}")
        unknown = table["id"][table["label"].isna()]
        if len(unknown):
            raise ValueError(f"{name}: no winner for id {unknown.iloc[0]!r}: training needs a column winner")
    refuse_one_sided(pairs, config.order)
    say_shared_prompts(pairs, held_out)
    return pairs, held_out


def build(config: TrainConfig, device: torch.device, pairs: pd.DataFrame):
    """(model with a fresh or given adapter, adapter settings, tokenizer, computing settings)"""
    dtype = DTYPES[config.dtype]
    model, tokenizer = load_base(config, device, pairs)
    if config.fast == "on" and device.type == "cuda":
        take_fast_path_(model, dtype)
    compute = make_compute(config.token_budget, device, dtype, pad_id(tokenizer), training=True)
    dropouts = {"dropout": config.lora_dropout, "head_dropout": config.head_dropout}
    if config.init_adapter:
        return model, load_adapter_(model, config.init_adapter, **dropouts), tokenizer, compute
    shape = {"r": config.lora_r, "alpha": config.lora_alpha, "freeze_layers": config.freeze_layers}
    adapter = AdapterConfig(**shape, head=config.head, **dropouts)
    attach_adapter_(model, adapter, config.seed)
    return model, adapter, tokenizer, compute


def due(step: int, every: int | None) -> bool:
    """Whether `step` (from 1) is a multiple of `every`; None: never."""
    return bool(every) and step % every == 0


def evaluate(
    model, held_out: HeldOut, compute: Compute, world: World, stop: Sequence = ()
) -> tuple[dict, pd.DataFrame | None]:
    """(scores of order ab, of ba, and of the mean of both probabilities; the table of eval.parquet)

    All are about the table's response_a. compute: train_step's, so its token budget as well.

    stop: as soon as it is not empty, on any rank, the evaluation is cut off: ({}, None).
    """
    names, p_first = held_out.table["id"].tolist(), {}
    for order, rows in held_out.rows.items():
        label = f"evaluate {order}"
        p_first[order] = predict_on_all_ranks(model, rows, names, compute, world, label, stop)
        if p_first[order] is None:
            return {}, None
    p_ab, p_ba = p_first["ab"], 1 - p_first["ba"]
    table = held_out.table[["id", "label"]].assign(p_a_ab=p_ab, p_a_ba=p_ba, p_a=(p_ab + p_ba) / 2)
    label, prompt = table["label"].to_numpy(), held_out.table["prompt"].to_numpy()
    figures = {name: scores(label, table[column].to_numpy(), prompt) for name, column in EVAL_COLUMNS.items()}
    return figures, table


def evaluate_midway(
    run: Run, step: int, model, held_out: HeldOut, compute: Compute, signals: Sequence
) -> None:
    """Evaluate after `step` steps and log it. A stop signal cuts it off, so that the step is saved at once;
    --resume then begins with it."""
    with run.saving_on_failure(step):
        figures, _ = evaluate(model, held_out, compute, run.world, signals)
    if figures:
        run.log("eval", step, **figures)


def result_of(run: Run, config: TrainConfig, steps: int, rows: int, figures: dict, device) -> dict:
    """What train.py prints for programs; tokens and seconds are of this process, not of steps before
    --resume."""
    speed = round(run.tokens / max(run.seconds, 1e-9), 1)
    result = {"out": config.out, "order": config.order, "steps": steps, "rows": rows, "tokens": run.tokens}
    result |= {"seconds": round(run.seconds, 2), "tokens_per_second": speed}
    peak = peak_bytes(device)
    peak = None if peak is None else round(peak / 2**30, 3)
    result |= {"peak_memory_gib": peak, "resumed_after": run.first}
    return result | {"eval": {**figures[JUDGED_BY[config.order]], **figures}}


if __name__ == "__main__":
    launch(run_command, main, "--resume goes on from the newest checkpoint, if there is one")

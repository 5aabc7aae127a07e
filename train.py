"""Train a preference model: LoRA and a head on a frozen 8-bit base.

    python train.py                 the demo: a tiny random Gemma-2, under a minute on a CPU
    python train.py --swap          its twin, trained on (prompt, answer b, answer a)
    python train.py --model google/gemma-2-9b-it --data train.parquet --swap

The whole run is `main`; its middle is one optimiser step, the arithmetic of which is in minarena/step.py.
The last line on stdout is one JSON object; everything meant for people goes to stderr.
"""

import json
import resource
import time
from dataclasses import asdict
from functools import partial

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from minarena.batching import balance_by_tokens, rows_of_step, steps_per_epoch
from minarena.config import TrainConfig, parse
from minarena.data import row_weights, split, swapped
from minarena.dist import World, this_world
from minarena.fast.path import take_fast_path_
from minarena.fast.recompute import fit_layers_
from minarena.files.adapter import load_adapter_, read_adapter
from minarena.files.base import check_folder, load_base
from minarena.files.checkpoint import create_run_folder, log_event, save_checkpoint, save_results
from minarena.files.durable import file_record
from minarena.files.pairs import read_pairs
from minarena.files.repair import repaired
from minarena.metrics import scores
from minarena.model import DTYPES, AdapterConfig, attach_adapter_, default_dtype
from minarena.optim import lr_at, make_optimizer
from minarena.runtime.console import describe_data, plain_bars, print_plan, print_results, run, say
from minarena.runtime.launch import launch
from minarena.runtime.memory import predict_on_all_ranks, retry_on_oom_
from minarena.runtime.signals import catch_stop_signals
from minarena.runtime.track import also_to
from minarena.step import predict_p_first, real_tokens, train_step
from minarena.text import encode, pad_id
from minarena.tiny import DEMO_LR, demo_pairs


def main(argv: list[str] | None = None) -> dict:
    config = parse(TrainConfig, argv, __doc__)
    plain_bars()
    world = this_world()
    device = world.device()
    resolve(config, device)
    pairs, held_out = load_pairs(config)
    files = [file_record(path) for path in [*config.data, *filter(None, [config.eval_data])]]
    record = asdict(config) | {"data_files": files, "rows": len(pairs)}
    record |= {"device": device.type, "world_size": world.size}
    if config.resume:
        from minarena.files.resume import check_same_options, finished_result, load_checkpoint_

        begun = check_same_options(config.out, record)
        if result := finished_result(config.out):
            print(json.dumps(result))
            return result
    elif world.rank == 0:
        create_run_folder(config.out, record)
    describe_data(config, pairs, held_out)

    pairs, held_out = (repaired(table, ranks=world.local_size) for table in (pairs, held_out))
    model, adapter, tokenizer, dtype = build(config, device)
    path = "fast" if model.fast else "reference"  # known only now, whatever --fast asked for
    if not config.resume and world.rank == 0:
        create_run_folder(config.out, record | {"path": path})
    elif config.resume and begun.get("path", path) != path:
        raise ValueError(f"--resume: the run was begun on the {begun['path']} path, this is the {path} one")
    optimizer = make_optimizer(model, config.weight_decay)
    # Row i of the table is rows[i]; with --order both its mirror image is rows[n + i].
    shown = {"ab": [pairs], "ba": [swapped(pairs)], "both": [pairs, swapped(pairs)]}[config.order]
    rows = [row for table in shown for row in encode(tokenizer, table, config.max_length, config.truncation)]
    labels = np.concatenate([table["label"].to_numpy() for table in shown])
    weights = np.concatenate([row_weights(table, config.pseudo_weight) for table in shown])
    eval_shown = (held_out, swapped(held_out))
    eval_rows = [encode(tokenizer, table, config.max_length, config.truncation) for table in eval_shown]
    budget = {"auto": 8192 if device.type == "cuda" else 4096}.get(config.token_budget, config.token_budget)
    computing = {"pad_id": pad_id(tokenizer), "dtype": dtype, "token_budget": budget}
    auto = config.token_budget == "auto"
    how = {"max_grad_norm": config.max_grad_norm, "label_smoothing": config.label_smoothing} | computing
    how["world"] = world

    pairs, shown = pairs[["id"]], None  # texts are no longer needed, and of 600,000 rows they are gigabytes
    n, steps = len(pairs), config.epochs * steps_per_epoch(len(pairs), config.batch_size)
    done = load_checkpoint_(config.out, model, optimizer, writes=world.rank == 0) if config.resume else 0
    world.require_same_on_all_ranks(record | {"steps done": done})
    world.broadcast_(*(vector.data for group in optimizer.param_groups for vector in group["params"]))
    if device.type == "cuda":
        fit_layers_(model, budget, longest=max(map(len, rows)))
    print_plan(config, model, rows, steps, budget)
    log = partial(log_event, config.out)
    if config.log_to and world.rank == 0:
        log = also_to(config.log_to, log, config.out, asdict(config), done)
    parts = {"model": model, "optimizer": optimizer, "config": adapter, "base": config.model}
    save = partial(save_checkpoint, config.out, **parts)
    if world.rank:
        log = save = lambda *_, **__: None  # rank 0 alone writes
    tokens, saved, start = 0, done, time.perf_counter()
    bar = tqdm(range(done, steps), "train", initial=done, total=steps, unit="step", disable=None)
    with catch_stop_signals(heard=world.rank == 0) as signals:
        for step in bar:
            # -------------------------------------------------------- one optimiser step
            step_start = time.perf_counter()
            drawn = rows_of_step(step, n, config.batch_size, config.seed)
            chosen = np.concatenate([drawn, drawn + n]) if config.order == "both" else drawn
            share = chosen[balance_by_tokens([len(rows[i]) for i in chosen], world.size)[world.rank]]
            step_rows = [rows[i] for i in share]
            lr = lr_at(step, steps, config.lr, config.warmup_ratio)
            weighed = {"row_weights": weights[share], "total_weight": weights[chosen].sum()}
            attempt = partial(train_step, model, optimizer, step_rows, labels[share], lr=lr, **weighed, **how)
            drawn_from = (config.seed, step, world.rank)
            try:
                loss, grad_norm = retry_on_oom_(attempt, step_rows, computing, auto, drawn_from)
            except (FloatingPointError, MemoryError) as error:  # both leave the weights as they were
                if step > saved:
                    save(step)
                if isinstance(error, FloatingPointError):
                    world.all_gather(None)  # every rank has it, from the sum: until rank 0 has saved
                ids = pairs["id"].iloc[drawn].tolist()
                where = f"step {step + 1}, rows {ids}"
                raise type(error)(f"{where}: {error}; --resume goes on after step {step}") from error
            # -------------------------------------------------------- its record, and now and then more
            step_tokens = real_tokens(rows[i] for i in chosen)
            tokens += step_tokens
            speed = step_tokens / (time.perf_counter() - step_start)
            log("step", step + 1, loss=loss, lr=lr, grad_norm=grad_norm, tokens_per_second=round(speed, 1))
            mean_speed = tokens / (time.perf_counter() - start)
            bar.set_postfix_str(now := f"loss {loss:.4f}, lr {lr:.1e}, {mean_speed:,.0f} tokens/s")
            if bar.disable and (step + 1) % -(-steps // 20) == 0:  # no terminal: twenty lines, not a bar
                say(f"step {step + 1:,} of {steps:,}: {now}")
            if step + 1 < steps and config.eval_every and (step + 1) % config.eval_every == 0:
                try:
                    log("eval", step + 1, **evaluate(model, held_out, eval_rows, computing, auto, world)[0])
                except (FloatingPointError, MemoryError):
                    save(step + 1)
                    raise
            stop = max(world.all_gather(signals[:1]))  # all after the same step
            if stop or step + 1 == steps or (step + 1) % config.save_every == 0:
                save(saved := step + 1)
            if stop:
                bar.close()
                say(f"Stopped: {saved} of {steps} steps are saved; the same command with --resume goes on.")
                raise SystemExit(128 + stop[0])

    seconds = time.perf_counter() - start
    figures, table = evaluate(model, held_out, eval_rows, computing, auto, world)
    if world.rank:
        return {}  # rank 0 has the same, and it alone writes
    log("eval", steps, **figures)
    save_results(config.out, table, model, adapter, config.model)
    result = {"out": config.out, "order": config.order, "steps": steps, "rows": n, "tokens": tokens}
    result |= {"seconds": round(seconds, 2), "tokens_per_second": round(tokens / max(seconds, 1e-9), 1)}
    # after --resume the tokens and seconds are of the steps after the checkpoint
    result |= {"peak_memory_gib": round(peak_bytes(device) / 2**30, 3), "resumed_after": done}
    result["eval"] = {**figures["mean" if config.order == "both" else config.order], **figures}
    print_results(config, result, len(held_out))
    print(json.dumps(result))
    return result


def resolve(config: TrainConfig, device: torch.device) -> None:
    """Fill in, in place, what depends on other options or the device, for the record."""
    config.out = config.out or f"runs/{config.order}"
    config.dtype = config.dtype or default_dtype(device, training=True)
    if config.model != "tiny":
        check_folder(config.model)
    else:
        what = "Your rows, but" if config.data else "This is the demo:"
        say(f"{what} a tiny random Gemma-2. --model and --data train a real one.")
        if config.lr is None:
            config.lr = DEMO_LR
            say(f"lr {DEMO_LR} is the demo's own (2e-4 teaches a random base nothing); a typed --lr wins.")
    config.lr = config.lr or 2e-4
    if config.init_adapter:  # the record tells what was trained, not the options' defaults
        given = read_adapter(config.init_adapter)[0]
        config.lora_r, config.lora_alpha = given.r, given.alpha
        config.freeze_layers, config.head = given.freeze_layers, given.head


def load_pairs(config: TrainConfig) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(training rows, held-out rows), both with labels; ValueError says why rows cannot be trained on."""
    if not config.data:  # 2,400 rows are 150 steps
        pairs, held_out = demo_pairs(2400, config.seed), demo_pairs(600, config.seed, held_out=True)
        return pairs.head(config.limit or len(pairs)), held_out
    pairs = read_pairs(config.data, config.limit, config.ties, tqdm)
    if config.pseudo_weight != 1 and "pseudo" not in pairs:
        raise ValueError(f"--pseudo-weight {config.pseudo_weight}: no file of --data has pseudo-labels")
    if config.eval_data:
        held_out = read_pairs([config.eval_data], bar=tqdm)  # all its rows: what is measured stays the same
        shared = sorted(set(pairs["id"]) & set(held_out["id"]))
        if shared:
            raise ValueError(f"--eval-data {config.eval_data}: id {shared[0]!r} is in --data, too")
    else:
        pairs, held_out = split(pairs, config.n_splits, config.fold)
    for table, name in ((pairs, "--data"), (held_out, "the held-out part")):
        if not len(table):
            remedy = "see what was left out, --n-splits, --fold, --limit, --ties; or give --eval-data"
            raise ValueError(f"{name} has no rows: {remedy}")
        unknown = table["id"][table["label"].isna()]
        if len(unknown):
            raise ValueError(f"{name}: no winner for id {unknown.iloc[0]!r}: training needs a column winner")
    return pairs, held_out


def build(config: TrainConfig, device: torch.device):
    """(model with a fresh or given adapter, adapter settings, tokenizer, compute dtype)"""
    dtype = DTYPES[config.dtype]
    model, tokenizer = load_base(config.model, device, dtype, config.matmul)
    if config.fast == "on" and device.type == "cuda":
        take_fast_path_(model, dtype)
    dropouts = {"dropout": config.lora_dropout, "head_dropout": config.head_dropout}
    if config.init_adapter:
        return model, load_adapter_(model, config.init_adapter, **dropouts), tokenizer, dtype
    adapter = AdapterConfig(
        r=config.lora_r,
        alpha=config.lora_alpha,
        freeze_layers=config.freeze_layers,
        head=config.head,
        **dropouts,
    )
    attach_adapter_(model, adapter, config.seed)
    return model, adapter, tokenizer, dtype


def evaluate(
    model, held_out: pd.DataFrame, eval_rows: list, computing: dict, auto: bool, world: World
) -> tuple[dict, pd.DataFrame]:
    """(scores of ab, ba and their mean, the table of eval.parquet). All are about the table's response_a."""
    p_first = []
    for shown, order in zip(eval_rows, ("ab", "ba"), strict=True):
        predict = partial(predict_p_first, model, label=f"evaluate {order}", **computing)
        p_first.append(predict_on_all_ranks(predict, shown, held_out["id"], computing, auto, world))
    p_ab, p_ba = p_first[0], 1 - p_first[1]
    table = held_out[["id", "label"]].assign(p_a_ab=p_ab, p_a_ba=p_ba, p_a=(p_ab + p_ba) / 2)
    columns = {"ab": "p_a_ab", "ba": "p_a_ba", "mean": "p_a"}
    label, prompt = held_out["label"].to_numpy(), held_out["prompt"].to_numpy()
    return {name: scores(label, table[column].to_numpy(), prompt) for name, column in columns.items()}, table


def peak_bytes(device: torch.device) -> int:
    """Most memory held at a time: on a GPU by its tensors, on a CPU by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    launch(run, main, "--resume goes on from the newest checkpoint, if there is one")

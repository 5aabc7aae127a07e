"""Training speed of the product's own path on random weights: no file is read, nothing is learnt.

    python benchmarks/train_speed.py --shape 9b           one GPU of 80 GB
    python benchmarks/train_speed.py --shape tiny         a look at the script, on a CPU
    torchrun --nproc_per_node 2 benchmarks/train_speed.py --shape 9b --batch-size 32      figures of all ranks
    python benchmarks/train_speed.py --shape 9b --shared-memory 99 --gpu-memory 22     as on a card of 24 GB

Everything timed is minarena's: PreferenceModel, LoRA and head, micro-batches, fit_layers_, train_step
(forward, backward, clip, optimiser). Tokens are real ones; padding counts as time, not as tokens.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

from benchmarks import random_base as base
from minarena.batching import real_tokens
from minarena.dist import this_world
from minarena.fast.path import take_fast_path_
from minarena.fast.recompute import fit_layers_
from minarena.files.outliers import outlier_columns, use_columns_
from minarena.int8 import use_dequantized_
from minarena.model import (
    DTYPES,
    AdapterConfig,
    PreferenceModel,
    attach_adapter_,
    default_dtype,
    residual_dtype,
)
from minarena.optim import make_optimizer, trainable
from minarena.rows import Batch
from minarena.runtime.launch import launch
from minarena.step import Compute, cut_micro_batches, train_step

SEED = 0xFACED


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    world = this_world()
    device, exchanged = world.device(), base.count_exchanged_()
    base.be_smaller_card_(options)
    dtype = DTYPES[default_dtype(device, training=True)]
    start = time.perf_counter()
    model = preference_model(options.shape, device, dtype, options.matmul, options.layers)
    dropout, head_dropout = (0.05, 0.1) if options.dropout == "on" else (0.0, 0.0)
    attach_adapter_(model, AdapterConfig(dropout=dropout, head_dropout=head_dropout), SEED)
    if options.fast == "on":
        take_fast_path_(model, dtype)
    optimizer = make_optimizer(model, 0.0)
    base.wait()
    made = time.perf_counter() - start
    recompute_(model, options)

    count = (options.warmup + options.steps + 1) * options.batch_size  # rows; one step more for --profile
    rows = base.random_rows(count, model.model.config.vocab_size, SEED, options.max_length)
    labels = np.random.default_rng(SEED).integers(0, 2, count).astype(float)

    losses, compute = [], Compute(dtype, token_budget=options.token_budget)

    def step(number: int) -> tuple[int, float]:
        """(real tokens, seconds) of optimiser step `number`"""
        chosen = slice(number * options.batch_size, (number + 1) * options.batch_size)
        ones = np.ones(len(rows[chosen]))
        batch = Batch(rows[chosen], labels[chosen], ones, ones.sum(), []).share(world)
        base.wait()
        world.all_gather(None)
        start = time.perf_counter()
        masks = (SEED, number, world.rank)
        loss, _ = train_step(model, optimizer, batch, options.lr, compute, dropout_seed=masks, world=world)
        base.wait()
        seconds = time.perf_counter() - start
        losses.append(loss)
        print(f"step {number}: {real_tokens(rows[chosen])} tokens, {seconds:.3f} s", file=sys.stderr)
        return real_tokens(rows[chosen]), seconds

    warmup = [step(i) for i in range(options.warmup)]
    exchanged.clear()
    timed = [step(i) for i in range(options.warmup, options.warmup + options.steps)]
    bytes_a_step = sum(exchanged) // options.steps
    cut = []  # the micro-batches of the timed steps, as train_step makes them in one process
    for i in range(options.warmup, options.warmup + options.steps):
        first = i * options.batch_size
        cut += [
            b + first
            for b in cut_micro_batches(model, rows[first : first + options.batch_size], options.token_budget)
        ]
    result = base.speed_figures(*zip(*timed, strict=True), 4 * base.projection_weights(model))
    result |= {
        "fill": base.fill(rows, cut, bool(model.fast)),
        "micro_batches_a_step": round(len(cut) / options.steps, 2),
    }
    result |= {"peak_gib": base.peak_gib(), "first_step_seconds": round(warmup[0][1], 2)}
    result |= {
        "fast": bool(model.fast),
        "recomputed_layers": model.recomputed,
        "making_seconds": round(made, 2),
    }
    result |= {"trainable": sum(p.numel() for p in trainable(model))}
    result |= {"ranks": world.size, "bytes_summed_a_step": bytes_a_step}
    if options.losses:
        Path(options.losses).write_text(json.dumps(losses))
    if options.profile:
        write_profile(options.profile, lambda: step(options.warmup + options.steps))
    base.print_result(vars(options), result)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=base.SHAPES, default="tiny")
    parser.add_argument("--steps", type=int, default=8, help="timed steps")
    parser.add_argument("--warmup", type=int, default=3, help="steps before; the first one is reported")
    parser.add_argument("--batch-size", type=int, default=16, help="rows a step")
    parser.add_argument("--max-length", type=int, default=2200, help="tokens of the longest row")
    parser.add_argument("--token-budget", type=int, default=8192, help="tokens a micro-batch, with padding")
    parser.add_argument("--matmul", choices=["dequant", "int8", "llm-int8"], default="dequant")
    parser.add_argument("--fast", choices=["on", "off"], default="on", help="the fast path or the reference")
    parser.add_argument(
        "--recompute", choices=["auto", "all", "none"], default="auto", help="layers in the backward"
    )
    parser.add_argument(
        "--dropout", choices=["on", "off"], default="on", help="the recipe's .05 and .1, or none"
    )
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--losses", metavar="FILE", help="write each step's loss, as a JSON list")
    base.add_card_options(parser)
    parser.add_argument("--profile", metavar="FILE", help="profile one more step: its 40 dearest kernels")
    options = parser.parse_args(argv)
    if options.warmup < 1 or options.steps < 1:
        parser.error("--warmup and --steps must be 1 or more")
    return options


def recompute_(model: PreferenceModel, options: argparse.Namespace) -> None:
    """Layers that are computed again in the backward: train.py's choice, or all, or none."""
    if options.recompute == "auto" and torch.cuda.is_available():
        fit_layers_(model, options.token_budget, options.max_length)
    if options.recompute == "all":
        model.recomputed = model.model.config.num_hidden_layers
        if not model.fast:
            model.model.gradient_checkpointing_enable({"use_reentrant": False})


def preference_model(
    shape: str, device: torch.device, dtype: torch.dtype, matmul: str, layers: int | None = None
) -> PreferenceModel:
    """PreferenceModel over a random base, as load_backbone would make it; its head is a placeholder."""
    # load_backbone's rule: eager where there is a soft-cap
    attention = "sdpa" if shape == "smollm2" else "eager"
    changes = {"num_hidden_layers": layers} if layers else {}
    backbone = base.random_model(shape, device, dtype, attention, "AutoModel", **changes)
    if matmul != "llm-int8":
        use_dequantized_(backbone)
    if matmul == "int8":  # of random rows, as the base is random
        rows = base.random_rows(8, backbone.config.vocab_size, SEED, 256)
        use_columns_(backbone, outlier_columns(backbone, rows))
    return PreferenceModel(backbone, torch.nn.Identity(), residual_dtype(device, dtype))


def write_profile(path: str, run) -> None:
    """Profile one call of `run`; write the 40 kernels (on a CPU: operations) that take most time."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()  # what the CPU does meanwhile would take minutes to count
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        run()
        base.wait()
    kind = "device" if on_gpu else "cpu"
    events = sorted(profiler.key_averages(), key=lambda e: -getattr(e, f"self_{kind}_time_total"))
    times = [getattr(event, f"self_{kind}_time_total") / 1000 for event in events]
    lines = [f"{t:10.2f} ms {e.count:7d} x {e.key[:120]}" for t, e in zip(times, events, strict=True)]
    Path(path).write_text(f"{sum(times):10.2f} ms in all\n" + "\n".join(lines[:40]) + "\n")


if __name__ == "__main__":
    launch(main)

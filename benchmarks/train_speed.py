"""Training speed of the product's own path on random weights: no file is read, nothing is learnt.

    python benchmarks/train_speed.py --shape 9b           one GPU of 80 GB
    python benchmarks/train_speed.py --shape tiny         a look at the script, on a CPU

Everything timed is minarena's: PreferenceModel, LoRA and head, micro_batches, checkpoint_layers_, train_step
(forward, backward, clip, optimiser). Tokens are real ones; padding counts as time, not as tokens.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

from benchmarks import random_base as base
from minarena.adapter import AdapterConfig, attach_adapter_
from minarena.batching import micro_batches
from minarena.int8 import use_dequantized_
from minarena.model import PreferenceModel, checkpoint_layers_, default_dtype, residual_dtype
from minarena.step import make_optimizer, real_tokens, seed_dropout, train_step, trainable

SEED = 0xFACED


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = default_dtype(device, training=True)
    model = preference_model(options.shape, device, dtype, options.matmul)
    attach_adapter_(model, AdapterConfig(dropout=0.05, head_dropout=0.1), SEED)
    optimizer = make_optimizer(model, 0.0)
    checkpointed = options.checkpointing == "on"
    if options.checkpointing == "auto":
        checkpointed = checkpoint_layers_(model.model, options.token_budget, options.max_length)
    elif checkpointed:
        model.model.gradient_checkpointing_enable({"use_reentrant": False})

    count = (options.warmup + options.steps + 1) * options.batch_size  # rows; one step more for --profile
    rows = base.random_rows(count, model.model.config.vocab_size, SEED, options.max_length)
    labels = np.random.default_rng(SEED).integers(0, 2, count).astype(float)

    def step(number: int) -> tuple[int, float]:
        """(real tokens, seconds) of optimiser step `number`"""
        chosen = slice(number * options.batch_size, (number + 1) * options.batch_size)
        seed_dropout(SEED, number)
        base.wait()
        start = time.perf_counter()
        computing = {"token_budget": options.token_budget, "pad_id": 0, "dtype": dtype}
        train_step(model, optimizer, rows[chosen], labels[chosen], lr=2e-4, **computing)
        base.wait()
        seconds = time.perf_counter() - start
        print(f"step {number}: {real_tokens(rows[chosen])} tokens, {seconds:.3f} s", file=sys.stderr)
        return real_tokens(rows[chosen]), seconds

    warmup = [step(i) for i in range(options.warmup)]
    timed = [step(i) for i in range(options.warmup, options.warmup + options.steps)]
    batches = []  # of the timed steps, as train_step cuts them
    for i in range(options.warmup, options.warmup + options.steps):
        first = i * options.batch_size
        lengths = [len(row) for row in rows[first : first + options.batch_size]]
        batches += [batch + first for batch in micro_batches(lengths, options.token_budget)]
    result = base.speed_figures(*zip(*timed, strict=True), 4 * base.projection_weights(model))
    result |= {
        "fill": base.fill(rows, batches),
        "micro_batches_a_step": round(len(batches) / options.steps, 2),
    }
    result |= {"peak_gib": base.peak_gib(), "first_step_seconds": round(warmup[0][1], 2)}
    result |= {"checkpointed": checkpointed, "trainable": sum(p.numel() for p in trainable(model))}
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
    parser.add_argument("--matmul", choices=["dequant", "llm-int8"], default="dequant")
    parser.add_argument("--checkpointing", choices=["auto", "on", "off"], default="auto")
    parser.add_argument("--profile", metavar="FILE", help="profile one more step: its 25 dearest operations")
    options = parser.parse_args(argv)
    if options.warmup < 1 or options.steps < 1:
        parser.error("--warmup and --steps must be 1 or more")
    return options


def preference_model(shape: str, device: torch.device, dtype: torch.dtype, matmul: str) -> PreferenceModel:
    """PreferenceModel over a random base, as load_backbone would make it; its head is a placeholder."""
    attention = (
        "sdpa" if shape == "smollm2" else "eager"
    )  # load_backbone's rule: eager where there is a soft-cap
    backbone = base.random_model(shape, device, dtype, attention, "AutoModel")
    if matmul == "dequant":
        use_dequantized_(backbone)
    return PreferenceModel(backbone, torch.nn.Identity(), residual_dtype(device, dtype))


def write_profile(path: str, run) -> None:
    """Profile one call of `run`; write its 25 dearest operations by their own time on the device."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as profiler:
        run()
    key = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=70)
    Path(path).write_text(table)


if __name__ == "__main__":
    main()

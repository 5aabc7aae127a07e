"""Inference speed of the product's own path on random weights: an ensemble of two adapters over one base.

    python benchmarks/infer_speed.py --shape 9b           one GPU of 80 GB
    python benchmarks/infer_speed.py --shape tiny         a look at the script, on a CPU
    torchrun --nproc_per_node 2 benchmarks/infer_speed.py --shape 9b      figures of all ranks

A pass is one adapter over all rows, with predict_p_first, which sorts them by length. Passes take turns: an
adapter on the rows, then its twin on the same rows as it would see the swapped pairs (equally long). The time
to put an adapter onto the base is not in the passes' seconds; it is reported beside them.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


from benchmarks import random_base as base
from benchmarks.train_speed import SEED, preference_model, write_profile
from minarena.batching import real_tokens
from minarena.dist import this_world
from minarena.fast.path import take_fast_path_
from minarena.model import DTYPES, AdapterConfig, attach_adapter_, default_dtype
from minarena.runtime.launch import launch
from minarena.runtime.memory import predict_on_all_ranks
from minarena.step import Compute, cut_micro_batches, predict_p_first


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    world = this_world()
    device = world.device()
    base.be_smaller_card_(options)
    dtype = DTYPES[options.dtype or default_dtype(device, training=False)]
    model = preference_model(options.shape, device, dtype, options.matmul)
    if options.fast == "on":
        take_fast_path_(model, dtype)
    rows = base.random_rows(options.rows, model.model.config.vocab_size, SEED, options.max_length)
    compute = Compute(dtype, token_budget=options.token_budget)

    def adapter_pass(number: int, rows: list, label: str | None = None) -> tuple[int, float, float]:
        """(real tokens, seconds of the pass, seconds to attach) of one adapter over `rows`"""
        start = time.perf_counter()
        attach_adapter_(model, AdapterConfig(), SEED + number % 2)
        base.wait()
        world.all_gather(None)
        attached = time.perf_counter()
        predict_on_all_ranks(model, rows, range(len(rows)), compute, world, label)
        base.wait()
        return real_tokens(rows), time.perf_counter() - attached, attached - start

    first_seconds = adapter_pass(0, rows[:32])[1]
    adapter_pass(0, rows)  # every shape that will be timed has been seen once
    timed = [adapter_pass(i, rows, label=f"pass {i + 1}") for i in range(options.passes)]
    tokens, seconds, attaching = zip(*timed, strict=True)
    result = base.speed_figures(tokens, seconds, 2 * base.projection_weights(model))
    result |= {
        "rows_per_second": round(len(rows) * len(seconds) / sum(seconds), 2),
        "pairs_per_second_two_passes": round(len(rows) * len(seconds) / sum(seconds) / 2, 2),
        "fill": base.fill(rows, cut_micro_batches(model, rows, options.token_budget), bool(model.fast)),
        "fast": bool(model.fast),
        "ranks": world.size,
        "peak_gib": base.peak_gib(),
        "first_32_rows_seconds": round(first_seconds, 2),
        "attach_seconds": round(sum(attaching) / len(attaching), 2),
    }
    if options.profile:
        write_profile(options.profile, lambda: predict_p_first(model, rows[:64], compute))
    base.print_result(vars(options), result)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=base.SHAPES, default="tiny")
    parser.add_argument("--rows", type=int, default=320, help="rows a pass")
    parser.add_argument("--passes", type=int, default=4, help="timed passes; even: the twins take turns")
    parser.add_argument("--max-length", type=int, default=2200, help="tokens of the longest row")
    parser.add_argument("--token-budget", type=int, default=16384, help="tokens a micro-batch, with padding")
    parser.add_argument("--matmul", choices=["dequant", "int8", "llm-int8"], default="dequant")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], help="default: infer.py's, by device")
    parser.add_argument("--fast", choices=["on", "off"], default="on", help="the fast path or the reference")
    base.add_card_options(parser)
    parser.add_argument("--profile", metavar="FILE", help="profile 64 more rows: the 40 dearest kernels")
    return parser.parse_args(argv)


if __name__ == "__main__":
    launch(main)

"""What a person reads on stderr: the first screen of a run, its last table, and why a command ended.

Everything is printed as soon as it is known: what the data are, before a model is loaded. Plain lines without
colours, the same in a terminal, a file and a notebook. Where stderr is no terminal, bars are off and the
scripts print a line now and then instead. What it does not do: print results for programs, which is stdout's
last line.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from minarena.batching import real_tokens
from minarena.config import TrainConfig
from minarena.optim import trainable
from minarena.rows import Rows


def say(*lines: str) -> None:
    """Print for people, on stderr: stdout's last line is the command's JSON object. Any line may quote the
    data: no character of it moves a terminal's cursor or colours it."""
    for line in "\n".join(lines).split("\n"):
        print(printable(line), file=sys.stderr)


def print_json(result: dict, asked: bool) -> dict:
    """Print stdout's last line, for programs; on a terminal only where --json asks for it. Returns result."""
    if asked or not sys.stdout.isatty():
        print(json.dumps(result))
    return result


def printable(text: str) -> str:
    """Any text as one line that a terminal shows as text: `?` for line ends, escapes, turned directions."""
    return "".join(c if c.isprintable() else "?" for c in text)


def first_line(error: Exception) -> str:
    """The first line of a library's error, or its kind where it says nothing, as printable text."""
    line, *more = (str(error).strip() or type(error).__name__).splitlines()
    if line.endswith(":") and more:
        line += " " + more[0].strip()
    return printable(line)  # some quote the bytes of a damaged file


def run_command(main: Callable, again: str = "nothing was written") -> None:
    """Call a command's main; an error that a user can cause (ValueError, OSError, bad numbers) ends in one
    line.

    again: what Ctrl-C's line says about going on.
    """
    name = sys.argv[0].rpartition("/")[2]
    try:
        return main()
    except KeyboardInterrupt:
        say(f"\n{name}: stopped; {again}")
        end = 130
    except (ValueError, OSError, FloatingPointError, RuntimeError, MemoryError) as error:
        # on a CPU torch raises a plain RuntimeError
        out_of_memory = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if isinstance(error, RuntimeError) and not out_of_memory:
            raise  # a mistake of ours: the traceback is needed
        end = f"{name}: {first_line(error) if out_of_memory else printable(str(error))}"
    # raised outside `except`, so the traceback is freed and open progress bars close
    raise SystemExit(end)


def plain_bars() -> None:
    """Switch transformers' own bars off where stderr is no terminal."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def by_language(table: pd.DataFrame) -> str:
    """` (301 English, 200 Chinese, 99 in 12 others)`; nothing where no language is known."""
    counts = table.get("language", pd.Series(dtype=str)).value_counts()
    named = [f"{count:,} {printable(str(language))}" for language, count in counts[:6].items()]
    if len(counts) > 6:
        named.append(f"{counts[6:].sum():,} in {len(counts) - 6} others")
    return f" ({', '.join(named)})" if named else ""


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return "CPU, 1 thread" if threads == 1 else f"CPU, {threads} threads"


def describe_data(config: TrainConfig, pairs: pd.DataFrame, held_out: pd.DataFrame) -> None:
    say(
        f"rows      {len(pairs):,} in order {config.order}{by_language(pairs)}",
        f"held out  {len(held_out):,}, evaluated in both orders{by_language(held_out)}",
        f"output    {config.out}",
    )


def held_bytes(model: nn.Module) -> tuple[int, int]:
    """(numbers in the base, bytes of weights, gradients and AdamW's state), whatever the rows."""
    device, trained = next(model.parameters()).device, sum(p.numel() for p in trainable(model))
    # two kinds are not counted: the fast path's fused weights, views of the same memory, and outlier columns
    apart = (".columns", ".rounded", ".outliers")
    buffers = [t for name, t in model.named_buffers() if ".fused." not in name and not name.endswith(apart)]
    tensors = [*model.parameters(), *buffers]
    moments = 2 if device.type == "cuda" else 8  # bytes a parameter of AdamW's two moments
    held = sum(t.numel() * t.element_size() for t in tensors) + trained * (4 + moments)
    return sum(t.numel() for t in tensors) - trained, held


def print_plan(config: TrainConfig, model: nn.Module, rows: Rows, steps: int, budget: int) -> None:
    """What is trained, in how many steps of what size, and what memory it takes whatever the rows."""
    device, trained = next(model.parameters()).device, sum(p.numel() for p in trainable(model))
    size, held = held_bytes(model)
    longest = max(map(len, rows.rows))
    most, cut = sum(len(row) == config.max_length for row in rows.rows), []
    if config.truncation == "middle":
        cut = [
            f"cut       the middle of each part of a row that is over --max-length {config.max_length} tokens"
        ]
    elif most:
        left = f"{most:,} rows as long as --max-length {config.max_length}, so perhaps without their start"
        cut = [f"cut       {left}"]
    path = "fast" if model.fast else "reference"
    say(
        f"model     {config.model}, {size / 1e6:,.1f} million parameters",
        f"computed  in {config.dtype} on {device_name(device)}, {path} path",
        f"trained   {trained:,} parameters",
        f"memory    {held / 2**30:.2g} GiB for weights, gradients and AdamW; a micro-batch comes on top",
        f"tokens    {real_tokens(rows.rows):,}, longest row {longest:,}",
        *cut,
        f"steps     {steps:,} of {config.batch_size} rows in micro-batches of at most {budget:,} tokens",
    )
    if model.recomputed:
        say(f"layers    {model.recomputed} recomputed in the backward (checkpointing), to fit into the GPU")


def plus_minus(figures: dict, name: str) -> str:
    """`0.8117 ± 0.0250`: a figure of metrics.scores and its standard error, if that is known."""
    error = figures.get(name + "_se")
    return f"{figures[name]:.4f}" + ("" if error is None else f" ± {error:.4f}")


def print_results(config: TrainConfig, result: dict, held_out: int) -> None:
    """The last table of a run; held_out: rows."""
    say(f"\n{held_out} held-out rows    accuracy          log loss")
    for name in ("ab", "ba", "mean"):
        figures = result["eval"][name]
        cells = [plus_minus(figures, k) for k in ("accuracy", "log_loss") if figures[k] is not None]
        trained = "   (the order trained)" if name == config.order else ""
        say(f"  order {name:13}  {'   '.join(cells)}{trained}")
    if held_out < 200:
        say("Fewer than 200 held-out rows: the standard errors (±) say how little these figures tell.")
    speed, peak = f"{result['tokens_per_second']:,.0f} tokens/s", result["peak_memory_gib"]
    speed += "" if peak is None else f", at most {peak:.2f} GiB"
    before = result["resumed_after"]  # what came before --resume was not timed here
    steps = f"{result['steps'] - before:,} steps"
    if before:
        steps += f" (after {before:,} before --resume)"
    say(f"{steps} in {result['seconds']:,.0f} s: {speed}")
    say(*what_next(config))


def what_next(config: TrainConfig) -> list[str]:
    """Two lines on what to do after a run; the demo's lead to the README's next commands."""
    twin = None if config.data else {"runs/ab": "runs/ba", "runs/ba": "runs/ab"}.get(config.out)
    runs = "runs/ab runs/ba" if twin else config.out
    steps = [f"python infer.py --adapter {runs}" + (" --data FILE" if config.data else "")]
    if twin and not Path(twin, "adapter_config.json").exists():  # a finished run has one
        other = "python train.py" + (" --swap" if twin == "runs/ba" else "")
        steps.insert(0, f"{other}    (its twin in the other order)")
    elif config.data and config.order != "both":
        steps.append("train.py --order both, which did best in our table (README.md)")
    else:
        steps.append(f"python -m minarena.report {runs}")
    return [f"Next: {steps[0]}", f"Then: {steps[1]}"]

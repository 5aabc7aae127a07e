"""The options of the three commands, as dataclasses: a field is an option, its text is what `--help` shows.

    config = parse(TrainConfig, ["--swap", "--lr", "1e-4"])      a mistake ends in one line, with status 2

A default is the recipe's (the silver-medal run, see the README's sources) unless its text says otherwise.
argparse is built from the fields, so an option exists in one place only. What it does not do: read files,
look at the hardware (None and "auto" are resolved where the answer is known), or accept abbreviations.
"""

import argparse
import difflib
import math
import re
import sys
import typing
from dataclasses import MISSING, dataclass, field, fields
from importlib.util import find_spec
from typing import Literal

from minarena.data import GROUPS

SEED = 0xFACED  # the recipe's
AS_JSON = "print the result as a line of JSON on a terminal, too (elsewhere it always is)"


def option(default, text: str, group: str = "", may_change: bool = False):
    """A dataclass field with its `--help` text.

    group: opens a new section of the help at this field. may_change: --resume takes another value, because
    the option does not decide the result.
    """
    metadata = {"text": text, "group": group, "may_change": may_change}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class TrainConfig:
    """Everything that decides the result of a training run; written whole to train_config.json."""

    model: str = option("tiny", "base: folder or hub id, float or 8-bit; tiny = a generated Gemma-2", "what")
    data: list[str] = option([], "training files of any known layout; none: generated demo pairs")
    eval_data: str | None = option(None, "file of held-out rows; none: part --fold of --n-splits")
    out: str | None = option(None, "folder of this run (default: runs/ and the order)", may_change=True)
    order: Literal["ab", "ba", "both"] = option("ab", "how a row is shown; both = twice in the same step")
    ties: Literal["drop", "half"] = option("drop", "rows of ties: left out, or labelled one half")
    pseudo_weight: float = option(1.0, "weight in the loss of rows labelled with a pair of probabilities")
    limit: int | None = option(None, "use the first N rows only")
    columns: list[str] = option([], "KEY=NAME ..: what a column is, if its name does not tell (a=answer_1)")
    winner_words: list[str] = option([], "KEY=WORD ..: what the column winner says for a, b, tie (a=1 b=2)")
    split_by: Literal["row", "prompt"] = option("row", "prompt: rows of a prompt are held out together")
    n_splits: int = option(1000, "held out: rows whose index modulo N equals --fold (48,439 rows: 49)")
    fold: int = option(0, "which of the --n-splits parts is held out")

    max_length: int = option(2200, "tokens a row, BOS and EOS included", "rows")
    truncation: Literal["left", "middle"] = option("left", "a long row loses its start, or parts' middle")
    batch_size: int = option(16, "rows an optimiser step, over all GPUs (the recipe's 8 x 2 accumulated)")
    # Other micro-batches draw other dropout masks; with dropout off the result is the same up to rounding.
    token_budget: int | Literal["auto"] = option(
        "auto", "tokens of a micro-batch, padding included", may_change=True
    )

    # None is 2e-4, the recipe's; only the tiny demo model has another (tiny.py says why). A typed value wins.
    lr: float | None = option(None, "peak learning rate (default: 2e-4; tiny: 5e-3)", "optimiser")
    epochs: int = option(1, "passes over the rows")
    warmup_ratio: float = option(0.025, "share of the steps in which lr rises from 0; then it falls to 0")
    weight_decay: float = option(0.0, "AdamW's decoupled decay of the matrices; biases have none")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this L2 norm; 0 = never")
    label_smoothing: float = option(0.0, "share of each label that is spread evenly over both answers")

    lora_r: int = option(64, "rank of the LoRA matrices on the seven projections", "model")
    # 4 with r 64 is not a typo. LoRA's product counts alpha / r = 1/16, the new head has no such factor: with
    # one lr for both, the pretrained backbone moves gently while the random head learns at full speed.
    lora_alpha: float = option(4.0, "LoRA's product counts alpha / r = 1/16: the head learns faster")
    lora_dropout: float = option(0.05, "dropout on LoRA's input")
    freeze_layers: int = option(0, "the first N layers get no LoRA")
    head: Literal["mlp", "linear"] = option("mlp", "two linears with GELU between (the recipe's), or one")
    head_dropout: float = option(0.1, "dropout before each linear of the mlp head")
    init_adapter: str | None = option(None, "start from this adapter, with its rank, alpha and head")
    dtype: Literal["bf16", "fp32"] | None = option(None, "compute dtype (default: bf16 on a GPU that has it)")
    matmul: Literal["dequant", "int8", "llm-int8"] = option(
        "dequant", "product: weights dequantized, int8 by int8 (an H100: faster), or the recipe's"
    )
    fast: Literal["on", "off"] = option("on", "the fast path, where the GPU can run it, or the reference")

    eval_every: int | None = option(None, "steps between evaluations (default: at the end)", "running", True)
    save_every: int = option(1000, "steps between checkpoints", may_change=True)
    resume: bool = option(False, "go on from the newest checkpoint in --out", may_change=True)
    log_to: Literal["wandb", "tensorboard"] | None = option(None, "log there, too", may_change=True)
    seed: int = option(SEED, "of the order of rows, the initial weights and the dropout masks")
    json: bool = option(False, AS_JSON, may_change=True)


@dataclass
class InferConfig:
    """Options of infer.py. None = as the adapters were trained, from their train_config.json."""

    adapter: list[str] = option([], "adapter folders; DIR:ab or DIR:ba overrides its trained order", "what")
    data: list[str] = option([], "files to predict, - = JSON lines of stdin; none, with tiny: the demo pairs")
    prompt: str | None = option(None, "instead of --data: judge the two answers to this text")
    answers: list[str] = option([], "with --prompt: two text files, the answers a and b")
    model: str | None = option(None, "base: folder or hub id (default: the adapters' own)")
    tta: Literal["none", "uncertain", "all"] = option("none", "all = every adapter on both orders, averaged")
    tta_fraction: float = option(0.4, "uncertain = as all, but for this share of the rows, those nearest 0.5")
    weights: list[float] = option([], "one weight an adapter (default: equal)")
    limit: int | None = option(None, "the first N rows only")
    columns: list[str] = option([], "KEY=NAME ..: what a column is, if its name does not tell (a=answer_1)")
    winner_words: list[str] = option([], "KEY=WORD ..: what the column winner says for a, b, tie (a=1 b=2)")
    out: str | None = option(None, "id, winner of each row of --data FILE (default: submission.csv)", "files")
    probs: str | None = option(None, "file of id, winner_model_a, winner_model_b (.csv, .parquet)")
    pseudo: str | None = option(None, "instead of --out: a training file with winner = [p_a, p_b]")
    pseudo_threshold: float | None = option(None, "only labels above this confidence, made 0 or 1 (say .95)")
    exclude: list[str] = option([], "no pseudo-labels for prompts that stand in these files")
    distill: list[str] = option([], "pseudo-labels of --data from these runs' held-out parts, not --adapter")
    max_length: int | None = option(None, "tokens a row (default: as trained)", "computing")
    truncation: Literal["left", "middle"] | None = option(None, "cut of longer rows (default: as trained)")
    token_budget: int | Literal["auto"] = option("auto", "tokens of a micro-batch, with its padding if any")
    dtype: Literal["bf16", "fp16", "fp32"] | None = option(None, "compute dtype (default: by device)")
    matmul: Literal["dequant", "int8", "llm-int8"] | None = option(None, "product (default: as trained)")
    fast: Literal["on", "off"] = option("on", "the fast path, where the GPU can run it, or the reference")
    json: bool = option(False, AS_JSON)


@dataclass
class QuantizeConfig:
    """Options of quantize.py."""

    model: str = option("tiny", "base: folder or hub id, float or, to merge, 8-bit; tiny = generated", "what")
    adapter: str | None = option(None, "an earlier LoRA (ours, PEFT's) to merge, or a run to make a judge of")
    out: str = option("", "folder to write; it must not exist")
    labels: int = option(2, "rows of the bias-free head: the base's own if it has as many, else a new one")
    float: bool = option(False, "write a judge, a run with a linear head, in the base's dtype, not in 8-bit")
    seed: int = option(SEED, "of a new head's weights")
    json: bool = option(False, AS_JSON)


AT_LEAST = {"limit": 1, "n_splits": 2, "fold": 0, "max_length": 8, "batch_size": 1, "token_budget": 1}
AT_LEAST |= {"epochs": 1, "weight_decay": 0, "max_grad_norm": 0, "lora_r": 1, "freeze_layers": 0, "seed": 0}
AT_LEAST |= {"eval_every": 1, "save_every": 1, "labels": 1}
KEYS = {"columns": ["prompt", "system", "a", "b", "winner"], "winner_words": ["a", "b", "tie"]}
KEYS["columns"] += ["chosen", "rejected", "score_a", "score_b", "id", "language", *GROUPS]
FRACTIONS = ("tta_fraction", "warmup_ratio", "label_smoothing", "lora_dropout", "head_dropout")
# Values for an adapter whose record lacks the key: those in force before the key existed
UNRECORDED = {"order": "ab", "max_length": 2200, "truncation": "left", "matmul": "dequant"}


def choices(kind: type, name: str) -> tuple:
    """The legal values of an option that is one of several words; () of any other."""
    hint = typing.get_type_hints(kind)[name]
    arms = [hint, *typing.get_args(hint)]
    return next((typing.get_args(arm) for arm in arms if typing.get_origin(arm) is Literal), ())


def parse(kind: type, argv: list[str] | None = None, about: str | None = None):
    """Command line -> an instance of the dataclass `kind`, checked; a mistake ends in one line, status 2."""
    if argv is None:
        argv = [] if "ipykernel" in sys.argv[0] else sys.argv[1:]  # a notebook's own words are not ours
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=about, formatter_class=raw, allow_abbrev=False)
    try:
        return options_of(kind, argv, parser)
    except ValueError as error:
        print(f"{parser.prog}: {error} (see --help)", file=sys.stderr)
        raise SystemExit(2) from None


def options_of(kind: type, argv: list[str], parser: argparse.ArgumentParser | None = None):
    """The same for Python: a mistake is a ValueError of one line."""
    parser = parser or argparse.ArgumentParser(allow_abbrev=False, add_help=False)

    def stop(message: str):
        raise ValueError(message)

    parser.error = stop  # argparse's own prints two screens of usage before the reason
    add_options(parser, kind)
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        names = ["--" + f.name.replace("_", "-") for f in fields(kind)]
        names += ["--swap"] if "--order" in names else []
        close = difflib.get_close_matches(unknown[0].partition("=")[0], names, n=1)
        stop(f"unknown option {unknown[0]}" + (f": did you mean {close[0]}?" if close else ""))
    typed = vars(known)  # defaults are suppressed: only what was typed
    orders = re.findall(r"--order[ =](\w+)", " ".join(argv))
    if "--swap" in argv and set(orders) - {"ba"}:
        stop(f"--swap means --order ba: drop it or --order {orders[0]}")
    if problem := contradiction(kind(**typed), typed):
        stop(problem)
    return kind(**typed)


def add_options(parser: argparse.ArgumentParser, kind: type) -> None:
    """One argparse option for each dataclass field, with its default in the help."""
    section, hints = parser, typing.get_type_hints(kind)
    for f in fields(kind):
        if f.metadata["group"]:
            section = parser.add_argument_group(f.metadata["group"])
        text = f.metadata["text"]
        if hints[f.name] is not bool and f.default not in (None, "", MISSING):
            text += f" (default: {hex(f.default) if f.name == 'seed' else f.default})"
        keywords = {"help": text, "default": argparse.SUPPRESS} | value_keywords(hints[f.name])
        needed = f.default is MISSING and f.default_factory is MISSING  # such a field is typed without a name
        section.add_argument(f.name if needed else "--" + f.name.replace("_", "-"), **keywords)
        if f.name == "order":
            same = {"dest": "order", "action": "store_const", "const": "ba", "default": argparse.SUPPRESS}
            section.add_argument("--swap", help="the mirrored twin: the same as --order ba", **same)


def value_keywords(hint) -> dict:
    """argparse's type, choices, nargs and metavar for a field's annotation."""
    if hint is bool:
        return {"action": "store_true"}
    arms = [arm for arm in typing.get_args(hint) if arm is not type(None)] or [hint]  # X | None -> X
    if typing.get_origin(hint) is list:
        return value_keywords(arms[0]) | {"nargs": "+", "action": "extend"}  # typed twice: both count
    if typing.get_origin(hint) is Literal:
        return {"choices": arms}
    if int in arms:
        return {"type": integer_or_auto if len(arms) > 1 else integer, "metavar": "N"}
    if hint != arms[0]:
        return value_keywords(arms[0])
    return {"type": hint, "metavar": "X" if hint is float else "NAME"}


def integer(word: str) -> int:
    return int(word, 0)  # base 0 reads 0xFACED, too, which is how the random seed is written


def integer_or_auto(word: str) -> int | str:
    return word if word == "auto" else integer(word)


def contradiction(config, typed: dict) -> str:
    """What is wrong with the values, as one line that names option and remedy; "" when nothing is."""
    for name, value in vars(config).items():
        flag = f"--{name.replace('_', '-')} {value}"
        if name in AT_LEAST and isinstance(value, int | float) and not AT_LEAST[name] <= value < 2**63:
            return f"{flag}: must be {AT_LEAST[name]} or more" + (", below 2**63" if value >= 2**63 else "")
        for word in value if name in KEYS else ():
            key, _, said = word.partition("=")
            if key not in KEYS[name] or not said:
                typed_as = flag.split()[0]
                return f"{typed_as} {word}: must be KEY=NAME, KEY one of {', '.join(KEYS[name])}"
        if name in FRACTIONS and not 0 <= value < 1:
            return f"{flag}: must be at least 0 and below 1"
        if name in ("lr", "lora_alpha", "pseudo_weight") and value is not None and not 0 < value < math.inf:
            return f"{flag}: must be above 0"
    if isinstance(config, TrainConfig):
        return train_contradiction(config, typed)
    if isinstance(config, InferConfig):
        return infer_contradiction(config, typed)
    if isinstance(config, QuantizeConfig) and not config.out:
        return "--out DIR is needed: the folder to write"
    if isinstance(config, QuantizeConfig) and config.float and not config.adapter:
        return "--float writes a judge: give its --adapter RUN, or drop --float"
    return ""


def infer_contradiction(config: InferConfig, typed: dict) -> str:
    if not (config.adapter or config.distill):
        return "--adapter DIR is needed: a folder that train.py wrote"
    runs_own = {"adapter", "limit", "exclude", "weights", "columns", "winner_words", "tta", "token_budget"}
    runs_own = (runs_own | {"model", "max_length", "truncation", "dtype", "matmul", "fast"}) & typed.keys()
    if config.distill and runs_own:
        return f"--distill takes the runs' own probabilities: drop --{min(runs_own).replace('_', '-')}"
    if config.pseudo and "out" in typed:
        return "--pseudo is the output: drop --out"
    if "tta_fraction" in typed and config.tta != "uncertain":
        return "--tta-fraction is for --tta uncertain: add that, or drop it"
    weights, count = config.weights, len(config.adapter)
    if weights and (len(weights) != count or min(weights) < 0 or not 0 < sum(weights) < math.inf):
        return f"--weights: give {count} numbers of 0 or more, one for each --adapter, one above 0"
    if len(config.answers) != (2 if "prompt" in typed else 0):
        return "--prompt TEXT and --answers FILE_A FILE_B go together"
    others = {"data", "limit", "columns", "winner_words", "pseudo", "exclude", "distill"} & typed.keys()
    if "prompt" in typed and others:
        return f"--prompt and --answers are the row to judge: drop --{min(others).replace('_', '-')}"
    return ""


def train_contradiction(config: TrainConfig, typed: dict) -> str:
    if config.fold >= config.n_splits:
        return f"--fold {config.fold}: must be below --n-splits {config.n_splits}"
    parting = {"fold", "n_splits", "split_by"} & typed.keys()
    of_files = parting | {"eval_data", "columns", "winner_words", "ties", "pseudo_weight"} & typed.keys()
    if of_files and not config.data:
        return f"--{min(of_files).replace('_', '-')} needs --data FILE: the demo pairs are ready as they are"
    if config.eval_data and parting:
        return "--eval-data is the held-out part: drop --fold, --n-splits and --split-by"
    if config.model != "tiny" and not config.data:
        return f"--model {config.model} needs --data FILE: the generated pairs are for --model tiny"
    fixed = [name for name in ("lora_r", "lora_alpha", "freeze_layers", "head") if name in typed]
    if config.init_adapter and fixed:
        return f"--init-adapter brings a rank, alpha, head of its own: drop --{fixed[0].replace('_', '-')}"
    if config.log_to and find_spec(config.log_to) is None:
        return f"--log-to {config.log_to}: not installed: pip install {config.log_to}"
    if config.head == "linear" and "head_dropout" in typed:
        return "--head linear has no dropout: drop --head-dropout"
    return ""

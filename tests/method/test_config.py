"""The options of the three commands: they parse, they explain themselves, and they refuse in one line.

config = parse(TrainConfig, ["--swap", "--lr", "1e-4"])
config.order -> "ba";  config.lr -> 1e-4;  everything else is the default

A mistake prints one line on stderr that names the option and the remedy, and ends with status 2.
The tables below were written from the design's list of options, not from the dataclasses.
"""

import dataclasses
import math
import re

import children
import numpy as np
import pytest

from minarena.config import InferConfig, QuantizeConfig, TrainConfig, parse
from minarena.runtime.console import run_command

# option: (default, words typed, value)
TRAIN = {
    "model": ("tiny", "--model base --data x.csv", "base"),
    "data": ([], "--data a.csv b.parquet", ["a.csv", "b.parquet"]),
    "eval_data": (None, "--data a.csv --eval-data v.csv", "v.csv"),
    "out": (None, "--out somewhere", "somewhere"),
    "order": ("ab", "--order both", "both"),
    "ties": ("drop", "--data a.csv --ties half", "half"),
    "pseudo_weight": (1.0, "--data a.csv --pseudo-weight 0.5", 0.5),
    "limit": (None, "--limit 5", 5),
    "columns": ([], "--data a.csv --columns a=x b=y", ["a=x", "b=y"]),
    "winner_words": ([], "--data a.csv --winner-words a=1 b=2", ["a=1", "b=2"]),
    "split_by": ("row", "--data a.csv --split-by prompt", "prompt"),
    "n_splits": (1000, "--data a.csv --n-splits 5", 5),
    "fold": (0, "--data a.csv --fold 3", 3),
    "max_length": (2200, "--max-length 64", 64),
    "truncation": ("left", "--truncation middle", "middle"),
    "batch_size": (16, "--batch-size 4", 4),
    "token_budget": ("auto", "--token-budget 4096", 4096),
    "lr": (None, "--lr 1e-4", 1e-4),
    "epochs": (1, "--epochs 2", 2),
    "warmup_ratio": (0.025, "--warmup-ratio 0.1", 0.1),
    "weight_decay": (0.0, "--weight-decay 0.01", 0.01),
    "max_grad_norm": (1.0, "--max-grad-norm 0", 0.0),
    "label_smoothing": (0.0, "--label-smoothing 0.1", 0.1),
    "lora_r": (64, "--lora-r 8", 8),
    "lora_alpha": (4.0, "--lora-alpha 16", 16.0),
    "lora_dropout": (0.05, "--lora-dropout 0", 0.0),
    "freeze_layers": (0, "--freeze-layers 16", 16),
    "head": ("mlp", "--head linear", "linear"),
    "head_dropout": (0.1, "--head-dropout 0", 0.0),
    "init_adapter": (None, "--init-adapter old", "old"),
    "dtype": (None, "--dtype fp32", "fp32"),
    "matmul": ("dequant", "--matmul llm-int8", "llm-int8"),
    "fast": ("on", "--fast off", "off"),
    "eval_every": (None, "--eval-every 10", 10),
    "save_every": (1000, "--save-every 10", 10),
    "resume": (False, "--resume", True),
    "log_to": (None, "--log-to tensorboard", "tensorboard"),
    "seed": (0xFACED, "--seed 0xBEEF", 0xBEEF),
    "json": (False, "--json", True),
}
A = "--adapter runs/ab "
INFER = {
    "adapter": (["runs/ab"], "--adapter x y:ba", ["x", "y:ba"]),
    "data": ([], A + "--data a.csv b.csv", ["a.csv", "b.csv"]),
    "prompt": (None, A + "--prompt Why? --answers a.txt b.txt", "Why?"),
    "answers": ([], A + "--prompt Why? --answers a.txt b.txt", ["a.txt", "b.txt"]),
    "model": (None, A + "--model base", "base"),
    "tta": ("none", A + "--tta all", "all"),
    "tta_fraction": (0.4, A + "--tta uncertain --tta-fraction 0.3", 0.3),
    "weights": ([], "--adapter x y --weights 1 2", [1.0, 2.0]),
    "limit": (None, A + "--limit 7", 7),
    "columns": ([], A + "--columns a=x b=y", ["a=x", "b=y"]),
    "winner_words": ([], A + "--winner-words a=1 b=2", ["a=1", "b=2"]),
    "out": (None, A + "--out s.parquet", "s.parquet"),
    "probs": (None, A + "--probs p.csv", "p.csv"),
    "pseudo": (None, A + "--pseudo p.parquet", "p.parquet"),
    "pseudo_threshold": (None, A + "--pseudo-threshold 0.95", 0.95),
    "exclude": ([], A + "--exclude a.csv b.csv", ["a.csv", "b.csv"]),
    "distill": ([], "--distill f0 f1", ["f0", "f1"]),
    "max_length": (None, A + "--max-length 99", 99),
    "truncation": (None, A + "--truncation middle", "middle"),
    "token_budget": ("auto", A + "--token-budget auto", "auto"),
    "dtype": (None, A + "--dtype fp16", "fp16"),
    "matmul": (None, A + "--matmul llm-int8", "llm-int8"),
    "fast": ("on", A + "--fast off", "off"),
    "json": (False, A + "--json", True),
}
QUANTIZE = {
    "model": ("tiny", "--out q --model base", "base"),
    "out": ("q", "--out folder", "folder"),
    "adapter": (None, "--out q --adapter earlier", "earlier"),
    "labels": (2, "--out q --labels 3", 3),
    "float": (False, "--out q --adapter earlier --float", True),
    "seed": (0xFACED, "--out q --seed 7", 7),
    "json": (False, "--out q --json", True),
}
LEAST = {TrainConfig: [], InferConfig: A.split(), QuantizeConfig: ["--out", "q"]}  # what must be typed
LEAST_NAMES = {TrainConfig: set(), InferConfig: {"adapter"}, QuantizeConfig: {"out"}}
TABLES = [(TrainConfig, TRAIN), (InferConfig, INFER), (QuantizeConfig, QUANTIZE)]


def refused(kind, words: str, capsys) -> str:
    """The one line that a wrong command line ends with; its status is 2."""
    with pytest.raises(SystemExit) as end:
        parse(kind, words.split())
    said = capsys.readouterr()
    assert end.value.code == 2 and not said.out
    lines = said.err.splitlines()
    assert len(lines) == 1 and len(lines[0]) < 300, said.err
    return lines[0]


@pytest.mark.parametrize(("kind", "table"), TABLES)
def test_every_option_parses_to_its_value_and_leaves_the_others_alone(kind, table):
    defaults = {name: default for name, (default, _, _) in table.items()}
    assert dataclasses.asdict(parse(kind, LEAST[kind])) == defaults
    for name, (_, words, value) in table.items():
        config = dataclasses.asdict(parse(kind, words.split()))
        assert config[name] == value and type(config[name]) is type(value), words
        typed = {word.strip("-").replace("-", "_") for word in words.split() if word.startswith("--")}
        untouched = defaults.keys() - typed - LEAST_NAMES[kind]
        assert {n: config[n] for n in untouched} == {n: defaults[n] for n in untouched}, words


def test_swap_is_order_ba():
    assert parse(TrainConfig, ["--swap"]).order == "ba"
    assert parse(TrainConfig, ["--swap", "--order", "ba"]).order == "ba"
    for words in (["--order", "ab", "--swap"], ["--swap", "--order=both"]):  # the last word does not win
        with pytest.raises(SystemExit):
            parse(TrainConfig, words)


@pytest.mark.parametrize(("kind", "table"), TABLES)
def test_help_names_every_option_with_its_default_in_groups(kind, table, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as end:
        parse(kind, ["--help"], "What the command does.")
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "What the command does." in text and max(map(len, text.splitlines())) <= 100
    groups = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert len(groups) > 1  # argparse's own "options:" and ours
    explained = {" ".join(part.split()) for part in re.split(r"\n(?=  -|\S)", text) if part[:4] == "  --"}
    assert len(explained) == len(table) + (kind is TrainConfig)  # --swap is another word for --order ba
    for name, (default, _, _) in table.items():
        [own] = [part for part in explained if part.startswith("--" + name.replace("_", "-") + " ")]
        assert len(own) > 25, own
        if isinstance(default, str | int | float) and not isinstance(default, bool) and default != "q":
            assert f"(default: {hex(default) if name == 'seed' else default})" in own


@pytest.mark.parametrize(
    ("kind", "words", "named"),
    [
        (TrainConfig, "--lora-rank 8", "--lora-rank"),
        (TrainConfig, "--learning-rate 1", "--learning-rate"),
        (TrainConfig, "--batch-sise 8", "did you mean --batch-size"),
        (TrainConfig, "--batch 8", "--batch"),  # no abbreviations: a new option would change their meaning
        (TrainConfig, "train.parquet", "train.parquet"),
        (TrainConfig, "--lr", "--lr"),
        (TrainConfig, "--lr fast", "--lr"),
        (TrainConfig, "--epochs 1.5", "--epochs"),
        (TrainConfig, "--order ba ab", "ab"),
        (TrainConfig, "--order aab", "choose from"),
        (TrainConfig, "--head tree", "choose from"),
        (TrainConfig, "--token-budget some", "--token-budget"),
        (InferConfig, "--adapter x --swap", "--swap"),
        (QuantizeConfig, "--out q --lora-r 8", "--lora-r"),
    ],
)
def test_an_unknown_option_or_value_ends_in_one_line_that_names_it(kind, words, named, capsys):
    assert named in refused(kind, words, capsys)


NUMBERS = {
    "--pseudo-weight": "0 -1 nan inf",
    "--limit": "0",
    "--n-splits": "1 1000000000000000000000000000000",
    "--fold": "-1",
    "--max-length": "7",
    "--batch-size": "0",
    "--token-budget": "0",
    "--lr": "0 -1 nan inf",
    "--epochs": "0",
    "--warmup-ratio": "-0.1 1 nan",
    "--weight-decay": "-1 nan inf",
    "--max-grad-norm": "-1 nan",
    "--label-smoothing": "-0.1 1 nan",
    "--lora-r": "0",
    "--lora-alpha": "0 nan inf",
    "--lora-dropout": "1 -0.1",
    "--freeze-layers": "-1",
    "--head-dropout": "1",
    "--eval-every": "0",
    "--save-every": "0",
    "--seed": "-1 18446744073709551616",
}


@pytest.mark.parametrize("option", NUMBERS)
def test_a_number_out_of_range_is_named_with_its_bound(option, capsys):
    for value in NUMBERS[option].split():
        line = refused(TrainConfig, f"{option} {value}", capsys)
        assert option in line and "must be" in line


# Options that mean nothing beside the demo's own pairs, and beside the probabilities of finished runs
READ_FROM_FILES = ["--fold 1", "--split-by prompt", "--columns a=x", "--winner-words a=1", "--ties half"]
READ_FROM_FILES += ["--pseudo-weight .5"]
OF_THE_RUNS = [
    "--adapter x",
    "--weights 1 2",
    "--tta all",
    "--max-length 99",
    "--model base",
    "--matmul int8",
]
OF_THE_RUNS += ["--dtype fp32", "--truncation left", "--columns a=x", "--limit 3", "--exclude y.csv"]


@pytest.mark.parametrize(
    ("kind", "words", "names"),
    [
        (TrainConfig, "--swap --order ab", ["--swap", "--order ab"]),
        (TrainConfig, "--swap --order both", ["--swap", "--order both"]),
        (TrainConfig, "--fold 5 --n-splits 5 --data x.csv", ["--fold", "--n-splits"]),
        (TrainConfig, "--data x.csv --eval-data v.csv --fold 1", ["--eval-data", "--fold"]),
        (TrainConfig, "--data x.csv --eval-data v.csv --n-splits 9", ["--eval-data", "--n-splits"]),
        (TrainConfig, "--model google/gemma-2-9b-it", ["--model google/gemma-2-9b-it", "--data"]),
        (TrainConfig, "--eval-data v.csv", ["--eval-data", "--data"]),
        (InferConfig, "", ["--adapter"]),
        (InferConfig, "--adapter x y --weights 1", ["--weights", "--adapter"]),
        (InferConfig, "--adapter x y --weights 1 -1", ["--weights"]),
        (InferConfig, "--adapter x y --weights 0 0", ["--weights"]),
        (InferConfig, "--adapter x y --weights 1 nan", ["--weights"]),
        (InferConfig, "--adapter x --pseudo p.parquet --out s.csv", ["--pseudo", "--out"]),
        (InferConfig, "--adapter x --tta all --tta-fraction 0.3", ["--tta-fraction", "--tta uncertain"]),
        *((TrainConfig, words, [words.split()[0], "--data"]) for words in READ_FROM_FILES),
        (TrainConfig, "--head linear --head-dropout 0.5", ["--head linear", "--head-dropout"]),
        *(
            (InferConfig, f"--distill f0 f1 {words}", ["--distill", words.split()[0]])
            for words in OF_THE_RUNS
        ),
        (QuantizeConfig, "", ["--out"]),
        (QuantizeConfig, "--out q --float", ["--float", "--adapter"]),
    ],
)
def test_contradictions_end_in_one_line_that_names_both_sides(kind, words, names, capsys):
    line = refused(kind, words, capsys)
    assert all(name in line for name in names), line


def test_swap_is_suggested_where_there_is_an_order_alone(capsys):
    assert "did you mean --swap?" in refused(TrainConfig, "--swaped", capsys)
    assert "did you mean" not in refused(InferConfig, "--adapter x --swap", capsys)


def test_a_list_option_that_is_typed_twice_keeps_both():
    assert parse(TrainConfig, ["--data", "a.csv", "--data", "b.csv", "c.csv"]).data == [
        "a.csv",
        "b.csv",
        "c.csv",
    ]


def test_what_an_initial_adapter_fixes_cannot_be_typed_as_well(capsys):
    for option in ("--lora-r 8", "--lora-alpha 2", "--head linear", "--freeze-layers 1"):
        line = refused(TrainConfig, f"--init-adapter old {option}", capsys)
        assert "--init-adapter" in line and option.split()[0] in line


def test_no_command_line_ends_in_a_traceback():
    """2,000 random ones: each is a configuration or status 2."""
    rng = np.random.default_rng(0)
    values = ["", "0", "-1", "nan", "1e999", "auto", "ab", "--", "-", "=", "x" * 99, "٣", "0x", "1_0", "é"]
    accepted = 0
    for _ in range(2000):
        kind, table = TABLES[rng.integers(3)]
        words = []
        for name in rng.choice(list(table), size=rng.integers(1, 4)):
            words += ["--" + name.replace("_", "-"), *rng.choice(values, size=rng.integers(0, 3))]
        try:
            config = parse(kind, words)
        except SystemExit as end:
            assert end.code == 2, words
        else:
            accepted += 1
            numbers = [v for v in vars(config).values() if isinstance(v, float)]
            assert all(math.isfinite(number) for number in numbers), words
    assert accepted > 20


def test_errors_of_the_user_become_one_line_and_a_bug_keeps_its_traceback(capsys):
    def main_that_raises(error):
        def main():
            raise error

        return main

    for error in (ValueError("--out x: y"), FileNotFoundError(2, "none", "x.csv"), FloatingPointError("nan")):
        with pytest.raises(SystemExit) as end:
            run_command(main_that_raises(error))
        assert str(error) in str(end.value.code) and "\n" not in end.value.code
    with pytest.raises(KeyError):
        run_command(main_that_raises(KeyError("ours")))


def test_a_wrong_option_stops_the_command_itself_with_status_2():
    code, said = children.run("train", ["--swap", "--order", "ab"])
    assert code == 2 and len(said.splitlines()) == 1 and "--swap means --order ba" in said

"""What a person sees: the first screen, a line now and then where there is no terminal, the last table.

by_language(table)         ` (301 English, 200 Chinese, 99 in 12 others)`
train.py --log-to NAME     the numbers of log.jsonl, in TensorBoard or Weights & Biases, too

Compared with: counts by hand, what the demo really wrote into a file, and log.jsonl itself, which TensorBoard
reads back with its own reader; Weights & Biases is played by a class of two lines.
"""

import importlib.machinery
import io
import json
import sys
import types

import pandas as pd
import pytest
import torch
from helpers import write_pairs
from tqdm import tqdm

import quantize
import train
from minarena.config import TrainConfig, parse
from minarena.runtime.console import by_language, print_results, run_command
from minarena.tiny import demo_pairs


def test_languages_are_counted_the_rare_ones_together_and_none_is_nothing():
    table = pd.DataFrame({"language": [*"aaaabbbccd", *"efghij", *"ccccc"]})
    assert by_language(table) == " (7 c, 4 a, 3 b, 1 d, 1 e, 1 f, 4 in 4 others)"
    assert by_language(table.head(7)) == " (4 a, 3 b)"
    assert by_language(table.drop(columns="language")) == by_language(table.head(0)) == ""


def test_without_a_terminal_there_are_lines_and_no_bars(demo):
    """The demo wrote into files: no bar, no control code."""
    said = demo[1]
    for name in ("ab", "ba", "infer"):
        _, stderr = said[name]
        assert "%|" not in stderr and "\x1b" not in stderr  # a bar has a %| wherever it is (\r is read as \n)
    lines = [line for line in said["ba"][1].splitlines() if not line.startswith("import time:")]
    steps = [line for line in lines if line.startswith("step ")]
    assert len(steps) == 18 and steps[0].startswith("step 8 of 150: loss ")
    first, _, last = (
        ("\n".join(lines)).partition(steps[0])[0],
        None,
        "\n".join(lines[lines.index(steps[-1]) :]),
    )
    for shown in (
        "rows      2,400 in order ba (",
        "held out  600",
        "output    runs/ba",
        "model     tiny, 0.1 million",
    ):
        assert shown in first, shown
    for shown in (
        "trained   133,218 parameters",
        "memory    ",
        "tokens    438,167",
        "steps     150 of 16 rows",
    ):
        assert shown in first, shown
    counts = demo_pairs(2400, 0xFACED)["language"].value_counts()
    assert all(f"{count} {language}" in first for language, count in counts.items())
    assert first.index("output    ") < first.index("model     ")  # before a base is loaded
    assert "order ba             " in last and "150 steps in " in last
    assert "python infer.py --adapter runs/ab runs/ba\n" in last + "\n"
    for shown in (
        "rows      600 (",
        "passes    runs/ab ab, runs/ba ba",
        "model     tiny, fp32 on CPU",
        "output    ",
    ):
        assert shown in said["infer"][1], shown
    assert "runs/ba ba: 600 rows done" in said["infer"][1]


def test_the_first_screen_of_quantize_says_what_goes_where(tiny, tmp_path, capsys):
    result = quantize.main(["--model", tiny, "--out", str(tmp_path / "q8")])
    said = capsys.readouterr().err
    assert f"model     {tiny}, 0.1 million parameters" in said and "a matrix at a time on CPU" in said
    assert f"output    {tmp_path}/q8, {result['bytes'] / 1e9:.2f} GB" in said and "\r" not in said


def test_a_bar_that_is_open_ends_its_line_before_the_error():
    stream = io.StringIO()

    def main():
        bar = tqdm(total=10, file=stream)
        bar.update(3)
        raise ValueError("row 3 is bad")

    with pytest.raises(SystemExit, match="row 3 is bad"):
        run_command(main)
    assert stream.getvalue().endswith("\n")


@pytest.fixture
def words(tiny, tmp_path) -> list[str]:
    """Three steps and an evaluation in between."""
    data = write_pairs(tmp_path / "pairs.parquet", demo_pairs(16, seed=1))
    valid = write_pairs(tmp_path / "valid.parquet", demo_pairs(4, seed=2, held_out=True))
    sizes = "--max-length 100 --batch-size 6 --eval-every 2 --lora-r 4"
    return f"--model {tiny} --data {data} --eval-data {valid} {sizes} --out {tmp_path}/run".split()


def numbers_of_the_log(path) -> dict[tuple[str, int], float]:
    """(name, step) -> value, by hand from log.jsonl"""
    found = {}
    for line in path.read_text().splitlines():
        event = json.loads(line)
        kind, step = event.pop("event"), event.pop("step")
        for name, value in event.items():
            inner = value if isinstance(value, dict) else {"": value}
            for key, number in inner.items():
                found["/".join(filter(None, [kind, name, key])), step] = number
    return found


def test_tensorboard_reads_back_the_numbers_of_the_log(words, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train.main([*words, "--log-to", "tensorboard"])
    events = accumulator.EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    scalars = [(tag, event) for tag in events.Tags()["scalars"] for event in events.Scalars(tag)]
    found = {(tag, event.step): event.value for tag, event in scalars}
    expected = numbers_of_the_log(tmp_path / "run" / "log.jsonl")
    assert len(expected) > 20 and found == pytest.approx(expected, rel=1e-5)


def test_wandb_is_sent_the_numbers_of_the_log(words, tmp_path, monkeypatch):
    begun, sent = [], {}

    class Begun:
        def log(self, figures, step):
            sent.update({(name, step): value for name, value in figures.items()})

    wandb = types.ModuleType("wandb")
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    wandb.init = lambda **settings: begun.append(settings) or Begun()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    train.main([*words, "--log-to", "wandb"])
    assert sent == numbers_of_the_log(tmp_path / "run" / "log.jsonl")
    assert begun[0]["name"] == f"{tmp_path}/run" and begun[0]["config"]["batch_size"] == 6

    def refuses(**_):
        raise RuntimeError("api_key not configured\nuse wandb login")

    wandb.init = refuses
    with pytest.raises(ValueError, match=r"^--log-to wandb: api_key not configured$"):
        train.main([*words[:-1], f"{tmp_path}/other", "--log-to", "wandb"])


@pytest.mark.parametrize("library", ["wandb", "tensorboard"])
def test_a_library_that_is_not_there_is_named_before_anything_else(library, capsys, monkeypatch):
    monkeypatch.setattr("minarena.config.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        parse(TrainConfig, ["--log-to", library])
    assert f"--log-to {library}: not installed: pip install {library}" in capsys.readouterr().err


def test_where_no_system_counts_memory_the_last_lines_say_nothing_of_it(capsys):
    scored = dict.fromkeys(("accuracy", "log_loss"), 0.5)
    result = {"eval": dict.fromkeys(("ab", "ba", "mean"), scored), "tokens_per_second": 9.0, "seconds": 1.0}
    print_results(TrainConfig(), result | {"steps": 3, "resumed_after": 0, "peak_memory_gib": None}, 7)
    said = capsys.readouterr().err
    assert "3 steps in 1 s: 9 tokens/s" in said and "GiB" not in said


def test_full_memory_of_a_cpu_ends_in_one_line():
    def main():
        torch.empty(2**60, dtype=torch.uint8)

    with pytest.raises(SystemExit) as end:
        run_command(main)
    assert "can't allocate memory" in end.value.code and "\n" not in end.value.code

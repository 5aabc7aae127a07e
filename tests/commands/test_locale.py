"""What the machine's locale and a stranger's texts do to the commands: nothing.

LC_ALL=C PYTHONUTF8=0 python train.py ...      Python then takes every text file for ASCII, unless told
by_language(table), say(...), first_line(error): text of the data on its way to a terminal

Compared with: the same command in this process, which runs in UTF-8. The four commands share one process,
because their imports are most of their time.
"""

import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY
from helpers import write_pairs

import infer
from minarena.report import __main__ as report
from minarena.runtime.console import by_language, run_command, say
from minarena.tiny import demo_pairs

HOSTILE = "Español\x1b[2J\u202e"  # clears the screen, turns the text round
PROGRAM = """
import locale, runpy, sys
assert locale.getpreferredencoding(False) in ("ANSI_X3.4-1968", "US-ASCII", "ascii"), "another locale"
commands = "\\0".join(sys.argv[1:]).split("\\0then\\0")
for script, *words in (command.split("\\0") for command in commands):
    sys.argv = [script, *words]
    run = runpy.run_path if script.endswith(".py") else runpy.run_module
    run(script, run_name="__main__")
"""


def test_the_four_commands_run_in_a_locale_that_knows_ascii_only(tiny, tmp_path):
    pairs = demo_pairs(8, seed=1).assign(language=HOSTILE)
    pairs["prompt"] = [f"Größe № {number}: 中文 🍕?" for number in range(8)]
    data = write_pairs(tmp_path / "Paare-é.csv", pairs)
    run, page, probs = tmp_path / "run", tmp_path / "page.html", tmp_path / "p.csv"
    sizes = "--lora-r 4 --n-splits 2 --max-length 100"
    outs = f"--out {tmp_path}/s.csv --probs {probs}"
    commands = [
        f"{REPOSITORY}/quantize.py --model {tiny} --out {tmp_path}/q8",
        f"{REPOSITORY}/train.py --model {tmp_path}/q8 --data {data} {sizes} --out {run}",
        f"{REPOSITORY}/infer.py --adapter {run} --data {data} {outs}",
        f"minarena.report {run} --out {page}",
    ]
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", PROGRAM, *" then ".join(commands).split()]
    environment |= {"PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(command, env=environment, capture_output=True)
    said = ended.stderr.decode()
    assert ended.returncode == 0, said[-2000:]
    assert len(ended.stdout.splitlines()) == 4 and "\x1b" not in said and "\r" not in said
    in_ascii = page.read_text(encoding="utf-8")
    report.main([str(run), "--out", str(page)])
    assert "Größe № " in in_ascii and in_ascii == page.read_text(encoding="utf-8")
    in_ascii = pd.read_csv(probs)["winner_model_a"]
    infer.main(f"--adapter {run} --data {data} {outs}".split())
    np.testing.assert_allclose(in_ascii, pd.read_csv(probs)["winner_model_a"], rtol=0, atol=1e-6)


def test_a_text_of_the_data_reaches_a_terminal_as_text(tmp_path, capsys):
    assert by_language(pd.DataFrame({"language": [HOSTILE]})) == " (1 Español?[2J?)"
    say(f"{HOSTILE} layout", "a line\nand another")
    assert capsys.readouterr().err == "Español?[2J? layout\na line\nand another\n"

    def main():
        raise ValueError(f"{HOSTILE}.csv: no such file")

    with pytest.raises(SystemExit) as end:
        run_command(main)
    assert end.value.code.endswith(": Español?[2J?.csv: no such file")


@pytest.mark.parametrize("place", ["file", "adapter"])
def test_names_with_escapes_are_said_as_text(place, runs, tmp_path, capsys):
    pairs = demo_pairs(3, seed=1)
    name, adapter = "rows.csv", runs[0]
    if place == "file":
        name = "rows\x1b[2J.csv"
    if place == "adapter":
        adapter = str(tmp_path / "run\x1b[2J")
        os.symlink(runs[0], adapter)
    words = ["--adapter", adapter, "--data", write_pairs(tmp_path / name, pairs)]
    try:
        run_command(lambda: infer.main([*words, "--out", str(tmp_path / "s.csv")]))
    except SystemExit as end:
        say(end.code)
    said = capsys.readouterr().err
    assert "[2J" in said and "\x1b" not in said and "\u202e" not in said

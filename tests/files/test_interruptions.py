"""Killed, stopped, on a full disk, with damaged files: a run goes on as if none of that had happened.

    kill -9                   then the same command with --resume
    SIGTERM, Ctrl-C           the step is finished and saved; exit status 143, 130; a second stops at once

Compared with: the same run without the interruption, bit for bit (weights, optimiser state, log, held-out
probabilities). The interrupted ones are children that really die, and really have no room to write.
"""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import children
import pytest
import torch
from helpers import adapted, assert_same_run, events
from test_checkpoint import cut_after

import train
from minarena.files.checkpoint import find_checkpoints, save_checkpoint
from minarena.files.resume import load_checkpoint_
from minarena.optim import make_optimizer, trainable


@pytest.fixture(scope="module")
def words(tiny, pairs_file) -> list[str]:
    """Twelve steps of seven rows, the last of an epoch of six, dropout on; a checkpoint every third step."""
    text = f"--model {tiny} --data {pairs_file} --limit 24 --n-splits 6 --batch-size 7 --epochs 4 --lr 5e-3"
    return [*text.split(), *["--lora-r", "4", "--save-every", "3", "--eval-every", "5", "--max-length", "90"]]


@pytest.fixture(scope="module")
def straight(words, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("straight") / "run"
    assert train.main([*words, "--out", str(out)])["steps"] == 12
    return out


@pytest.fixture(scope="module")
def nearly(words, tmp_path_factory) -> Path:
    """The run after its tenth step: what is left are two steps, one save and the end."""
    out = tmp_path_factory.mktemp("nearly") / "run"
    with pytest.MonkeyPatch.context() as patch:
        cut_after(10, [*words, "--out", str(out)], patch)
    assert [path.name for path in find_checkpoints(str(out))] == ["checkpoint-9", "checkpoint-6"]
    return out


def resumed(words: list[str], out: Path) -> None:
    """Go on to the end, if it is not there yet."""
    if not (out / "adapter_config.json").exists():
        go_on = ["--resume"] * (out / "train_config.json").exists()
        train.main([*words, "--out", str(out), *go_on])


# ---------------------------------------------------------------------------------------------- kill -9


def test_twenty_kills_at_random_moments_lose_nothing(words, straight, tmp_path):
    """Each child goes on with what the last one left; a finished run begins anew. Every other kill comes
    after the child's first step, however slow the machine is."""
    draw, kills, out = random.Random(7), 0, tmp_path / "0"
    for warm in ("warm", "measured"):  # the first also starts the server
        start = time.perf_counter()
        assert children.run("train", [*words, "--out", str(tmp_path / warm)])[0] == 0
        whole = time.perf_counter() - start  # seconds of a child that is not killed
    for number in range(1, 100):
        more, log = ["--resume"] * (out / "train_config.json").exists(), out / "log.jsonl"
        before = log.exists() and log.stat().st_mtime_ns
        child = children.begin("train", [*words, "--out", str(out), *more], tmp_path / "said")
        while number % 2 and child.is_alive() and before == (log.exists() and log.stat().st_mtime_ns):
            time.sleep(0.001)
        child.join(draw.uniform(0, whole / 4 if number % 2 else 0.8 * whole))
        child.kill()
        child.join()
        kills += child.exitcode == -signal.SIGKILL
        assert child.exitcode in (0, -signal.SIGKILL), (tmp_path / "said").read_text()
        if (out / "adapter_config.json").exists():
            assert_same_run(straight, out)
            out = tmp_path / str(number)
        if kills == 20:
            break
    assert kills == 20
    resumed(words, out)
    assert_same_run(straight, out)


def test_a_kill_at_each_flush_and_rename_loses_nothing(words, straight, nearly, tmp_path):
    """Of the whole end of a run: the log is cut, checkpoint-12 saved, the results are put in place."""
    died = 0
    for number in range(1, 100):
        out = tmp_path / str(number)
        shutil.copytree(nearly, out)
        more = [*words, "--out", str(out), "--resume"]
        code, said = children.run("train", more, children.kill_at, number)
        assert code in (0, -signal.SIGKILL), said
        died += code != 0
        for path in find_checkpoints(str(out)):  # what has the name is whole
            assert {"state.json", "checksums.json"} <= {file.name for file in path.iterdir()}
        resumed(words, out)
        assert_same_run(straight, out)
        if code == 0:
            break
    assert died == number - 1 == 3 + 9 + 10


def test_a_kill_at_each_write_of_the_first_second_leaves_a_folder_that_can_be_used(words, straight, tmp_path):
    for number in (1, 2, 3, 4):
        out = tmp_path / str(number)
        code, _ = children.run("train", [*words, "--out", str(out)], children.kill_at, number)
        assert code == -signal.SIGKILL
        resumed(words, out)
        assert_same_run(straight, out)


# ---------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("number", [1, 8, 9, 12])
def test_a_signal_finishes_the_step_saves_it_and_says_how_to_go_on(
    words, straight, tmp_path, sent, status, number
):
    out = tmp_path / "run"
    more = [*words, "--out", str(out)]
    code, said = children.run("train", more, children.signal_in_step, number, sent)
    assert code == status and "Traceback" not in said
    assert f"{number} of 12 steps are saved; the same command with --resume goes on" in said
    assert events(out)[-1] == {"event": "save", "step": number}
    assert find_checkpoints(str(out))[0].name == f"checkpoint-{number}"
    resumed(words, out)
    assert_same_run(straight, out, saves=False)


def test_a_second_ctrl_c_stops_at_once_and_a_second_sigterm_does_not(words, straight, tmp_path):
    for name, sent, expected in (
        ("c", (signal.SIGINT, signal.SIGINT), -signal.SIGINT),
        ("term-c", (signal.SIGTERM, signal.SIGINT), -signal.SIGINT),
        ("term", (signal.SIGTERM, signal.SIGTERM), 143),
    ):
        out = tmp_path / name
        more = [*words, "--out", str(out)]
        code, said = children.run("train", more, children.signal_in_step, 8, *sent)
        assert code == expected and "Traceback" not in said
        assert "Stopping after this step, which is saved first; Ctrl-C stops at once." in said
        newest = find_checkpoints(str(out))[0].name
        assert newest == ("checkpoint-8" if code == 143 else "checkpoint-6")
        resumed(words, out)
        assert_same_run(straight, out, saves=False)


def test_after_a_run_the_signals_do_what_they_did_before(words, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train.main([*words, "--out", str(tmp_path / "run")])
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


# -------------------------------------------------------------------------------------------- full disks


@pytest.mark.parametrize(
    ("limit", "named"),
    [(60_000, "checkpoint-3"), (30_000, "checkpoint-3"), (2_500, "log.jsonl"), (400, "train_config.json")],
)
def test_a_full_disk_is_said_in_one_line_and_the_run_can_be_resumed(words, straight, tmp_path, limit, named):
    """The optimiser's state, the adapter, the log, the record: each once the first that has no room."""
    out = tmp_path / "run"
    more = ["--save-every", "100", "--eval-every", "1"] * (named == "log.jsonl")
    code, said = children.run("train", [*words, "--out", str(out), *more], children.small_files, limit)
    assert code == 1 and "Traceback" not in said
    last = said.splitlines()[-1]
    assert last.startswith(f"train.py: {out}/{named}: not written: ") and "File too large" in last
    assert last.endswith(
        "; what was whole before still is, and the same command goes on (train.py: with --resume)"
    )
    assert not list(out.glob("*unfinished*"))
    resumed(words, out)
    assert_same_run(straight, out)


def full():
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("number", range(1, 23, 2))
def test_a_disk_that_is_full_at_any_flush_or_rename_costs_no_checkpoint(
    words, straight, nearly, tmp_path, monkeypatch, number
):
    out = tmp_path / "run"
    shutil.copytree(nearly, out)
    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"run.*not written: .*No space left"):
        for name in ("fsync", "rename", "replace"):
            patch.setattr(os, name, getattr(os, name))  # so that they are put back
        children.at_write(number, full)
        train.main([*words, "--out", str(out), "--resume"])
    assert not list(out.glob("*unfinished*"))
    assert len(find_checkpoints(str(out))) >= 2
    resumed(words, out)
    assert_same_run(straight, out)


# ---------------------------------------------------------------------------------------- damaged files


def flipped(path: Path, at: int, bit: int) -> None:
    whole = bytearray(path.read_bytes())
    whole[at] ^= 1 << bit
    path.write_bytes(whole)


def test_one_flipped_bit_anywhere_in_a_checkpoint_is_noticed_and_the_one_before_is_taken(
    tiny, tmp_path, capsys
):
    """Every third byte of the JSON files, a hundred drawn ones of each file of tensors; also cut short."""
    model, config = adapted(tiny)
    optimizer = make_optimizer(model, 0.0)
    for parameter in trainable(model):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # now it has a state
    for step in (3, 6):
        save_checkpoint(str(tmp_path), step, model, optimizer, config, tiny)
    draw, newest = random.Random(3), tmp_path / "checkpoint-6"
    capsys.readouterr()
    for path in sorted(newest.iterdir()):
        whole = path.read_bytes()
        places = range(0, len(whole), 3) if path.suffix == ".json" else draw.sample(range(len(whole)), 100)
        damages = [("flip", at) for at in places] + [("cut", draw.randrange(len(whole))) for _ in range(5)]
        for kind, at in damages:
            if kind == "flip":
                flipped(path, at, draw.randrange(8))
            else:
                path.write_bytes(whole[:at])
            assert load_checkpoint_(str(tmp_path), model, optimizer)[0] == 3, (path.name, kind, at)
            first = capsys.readouterr().err.splitlines()[0]
            assert first.startswith(f"{newest} is damaged: "), (path.name, kind, at)
            assert path.name in first or path.name == "checksums.json", first
            path.write_bytes(whole)
    assert load_checkpoint_(str(tmp_path), model, optimizer)[0] == 6


def test_damaged_newer_checkpoints_cost_no_good_one_when_the_run_goes_on(words, straight, nearly, tmp_path):
    """Three are there after a crash between a save and its tidying up; the two newer ones are damaged."""
    out = tmp_path / "run"
    shutil.copytree(nearly, out)
    shutil.copytree(out / "checkpoint-9", out / "checkpoint-11")
    for number in (9, 11):
        flipped(out / f"checkpoint-{number}" / "optimizer.safetensors", 5000, 0)
    code, _ = children.run("train", [*words, "--out", str(out), "--resume"], children.signal_in_step, 1, 15)
    assert code == 143 and (out / "checkpoint-7").exists() and (out / "checkpoint-6").exists()
    resumed(words, out)
    assert_same_run(straight, out, saves=False)


@pytest.mark.parametrize("zeros", [0, 7])  # a power cut can leave some
@pytest.mark.parametrize(("event", "cut"), [("save", 1), ("save", 20), ("eval", 30), ("eval", None)])
def test_a_log_whose_last_line_was_cut_off_is_read_up_to_there(
    words, straight, nearly, tmp_path, event, cut, zeros
):
    """checkpoint-9 is there and the line that says so is torn; or an evaluation is, behind one of the objects
    in it, where it looks like a line's end."""
    out = tmp_path / "run"
    shutil.copytree(nearly, out)
    lines = (out / "log.jsonl").read_text().splitlines(keepends=True)
    if event == "save":
        torn = lines.index('{"event": "save", "step": 9}\n')
        text = "".join(lines[:torn]) + lines[torn][:cut]
    else:
        line = next(line for line in lines if '"eval"' in line).replace('"step": 5', '"step": 10')
        text = "".join(lines) + line[: cut or line.index("}") + 1]
    (out / "log.jsonl").write_bytes(text.encode() + bytes(zeros))
    resumed(words, out)
    assert_same_run(straight, out)


def test_a_log_that_lost_a_step_is_said_to_be_damaged(words, straight, nearly, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(nearly, out)
    lines = (out / "log.jsonl").read_text().splitlines()
    (out / "log.jsonl").write_text("\n".join(["[" * 10**5, *lines[1:]]) + "\n")  # nested too deeply
    resumed(words, out)
    assert f"{out}/log.jsonl is damaged: of the 9 steps that were done it has 8" in capsys.readouterr().err
    assert events(out) == events(straight)[1:]

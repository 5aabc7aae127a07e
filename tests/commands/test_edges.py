"""What strangers' habits broke at the edges of train.py and infer.py, and does no more.

Two commands in one folder, a signal during an evaluation, a halved budget that a resumed run must know, calls
from a thread, half of torchrun's environment, outputs under two names of one file, fractions that round to
nothing. Compared with: the same run without the habit, or the line that is said.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import children
import pandas as pd
import pytest
import torch
from conftest import REPOSITORY
from helpers import assert_same_run, events, write_pairs

import infer
import train
from minarena.config import TrainConfig, parse
from minarena.dist import this_world
from minarena.files import run as run_files
from minarena.files.lock import lock_folder, unlock_folder
from minarena.model import PreferenceModel
from minarena.runtime import memory
from minarena.runtime.signals import catch_stop_signals
from minarena.tiny import demo_pairs, write_tiny
from minarena.truncation import truncate_middle


@pytest.fixture(scope="module")
def words(tiny, pairs_file) -> list[str]:
    """Six steps of four rows; evaluations after steps 2 and 4."""
    text = f"--model {tiny} --data {pairs_file} --limit 30 --n-splits 5 --batch-size 4 --lr 5e-3 --lora-r 4"
    return [*text.split(), "--eval-every", "2", "--max-length", "90"]


# ------------------------------------------------------------------------------------------ one folder


def hold(folder: str) -> subprocess.Popen:
    """Another process that holds the folder until it is killed; it knows nothing of minarena. Its lock is a
    shared one, which only a lock that is not shared cannot join."""
    program = f"import fcntl, os; handle = os.open({folder!r}, os.O_RDONLY)"
    program += "; fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB); print('held', flush=True); input()"
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-c", program], **pipes, text=True, encoding="utf-8")
    assert process.stdout.readline() == "held\n", process.stderr.read()
    return process


def kill(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()


def test_two_commands_cannot_hold_one_folder_and_any_death_releases_it(
    words, runs, pairs_file, tmp_path, small_parts
):
    out, parts = tmp_path / "run", tmp_path / "s.csv.parts"
    out.mkdir(), parts.mkdir()
    predict = ["--adapter", *runs, "--data", pairs_file, "--out", str(tmp_path / "s.csv")]
    commands = {out: lambda: train.main([*words, "--out", str(out)]), parts: lambda: infer.main(predict)}
    for folder, command in commands.items():
        other = hold(str(folder))
        with pytest.raises(ValueError, match=f"{folder} is in use by another command: wait for its end"):
            command()
        assert not list(folder.iterdir())
        kill(other)
        command()
        kill(hold(str(out)))  # it is free again
    assert events(out)[-1]["event"] == "eval"
    lock_folder(out)
    with pytest.raises(AssertionError, match="BlockingIOError"):
        hold(str(out))
    unlock_folder(out)


def test_a_folder_that_cannot_be_locked_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    lock_folder(tmp_path)
    unlock_folder(tmp_path)
    assert "cannot be locked here: take care that no other command uses it" in capsys.readouterr().err


def test_one_file_under_two_names_is_not_taken_for_two_outputs(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"--probs \./a\.csv is the other output's file, too"):
        infer.main(["--adapter", *runs, "--out", "a.csv", "--probs", "./a.csv"])


# ------------------------------------------------------------------------- signals, memory, going on


def test_a_signal_during_an_evaluation_saves_the_step_and_the_resumed_run_evaluates_it(
    words, tmp_path, monkeypatch
):
    straight, out = tmp_path / "straight", tmp_path / "run"
    train.main([*words, "--out", str(straight)])
    real, calls = memory.predict_p_first, []

    def signalled(*arguments):
        calls.append(1)
        if len(calls) == 3:  # the second evaluation's first order: after step 4
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(memory, "predict_p_first", signalled)
        train.main([*words, "--out", str(out)])
    assert end.value.code == 143 and len(calls) == 3  # the other order was not begun
    assert [(e["event"], e["step"]) for e in events(out)][-2:] == [("step", 4), ("save", 4)]
    train.main([*words, "--out", str(out), "--resume"])
    assert_same_run(straight, out, saves=False)


def test_a_run_that_was_killed_in_its_last_evaluation_evaluates_once(words, tmp_path, monkeypatch):
    """The last step is one of --eval-every: the evaluation of that step is the run's last one."""
    straight, out = tmp_path / "straight", tmp_path / "run"
    words = [*words, "--eval-every", "3"]
    train.main([*words, "--out", str(straight)])

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_files.Run, "finish", killed)
        train.main([*words, "--out", str(out)])
    log = out / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
    log.write_text("".join(lines[:-1]), encoding="utf-8")  # killed before it was logged
    train.main([*words, "--out", str(out), "--resume"])
    assert_same_run(straight, out, saves=False)


def test_an_ignored_ctrl_c_stays_ignored_after_a_first_signal(monkeypatch):
    """A job in the background is saved in peace, whatever is typed at its terminal."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with catch_stop_signals(announce=False) as numbers:
            signal.raise_signal(signal.SIGTERM)
            assert numbers == [signal.SIGTERM] and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_halved_budget_is_recorded_and_a_resumed_run_begins_with_it(words, tmp_path, monkeypatch):
    """With dropout on the budget decides the masks: the resumed run must not begin with the first one."""
    straight, out, real = tmp_path / "straight", tmp_path / "run", PreferenceModel.forward

    def forward(self, ids, mask):
        if ids.numel() > 200 and self.training:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, ids, mask)

    with monkeypatch.context() as patch:
        patch.setattr(PreferenceModel, "forward", forward)
        train.main([*words, "--out", str(straight), "--save-every", "3"])
    record = json.loads((straight / "train_config.json").read_text())
    assert record["token_budget"] == "auto" and record["token_budget_used"] in (128, 256)
    steps = train.train_step

    def three_steps(*arguments, **keywords):
        if (out / "checkpoint-3").exists():
            raise KeyboardInterrupt
        return steps(*arguments, **keywords)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PreferenceModel, "forward", forward)
        patch.setattr(train, "train_step", three_steps)
        train.main([*words, "--out", str(out), "--save-every", "3"])
    train.main([*words, "--out", str(out), "--save-every", "3", "--resume"])  # memory is plenty now
    assert_same_run(straight, out)


# ------------------------------------------------------------------------------------ calls from Python


def test_training_and_two_inferences_run_in_threads(words, runs, tmp_path):
    """Python allows signal handlers in the main thread only; and the demo's weights are drawn one at a
    time."""
    ended = []

    def in_thread(command, arguments):
        thread = threading.Thread(target=lambda: ended.append(command(arguments)))
        thread.start()
        return thread

    in_thread(train.main, [*words, "--out", str(tmp_path / "run")]).join()
    assert ended[0]["steps"] == 6
    alone = Path(write_tiny(str(tmp_path / "alone"))) / "model.safetensors"
    for _ in range(3):
        folders = [tmp_path / f"{len(ended)}-{i}" for i in range(3)]
        threads = [in_thread(write_tiny, str(folder)) for folder in folders if not folder.mkdir()]
        for thread in threads:
            thread.join()
        assert all((folder / "model.safetensors").read_bytes() == alone.read_bytes() for folder in folders)


def test_a_notebook_kernels_own_words_are_not_options(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/x/ipykernel_launcher.py", "-f", "/x/kernel.json"])
    assert parse(TrainConfig) == TrainConfig()


COMMANDS = {"train.py": [], "infer.py": [], "quantize.py": [], "minarena.report": ["-m"]}


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_while_libraries_are_imported_ends_in_one_line(name, tmp_path):
    for library in ("pandas", "torch"):  # in the place of the real ones
        (tmp_path / f"{library}.py").write_text("raise KeyboardInterrupt")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
    command = [sys.executable, *COMMANDS[name], name if COMMANDS[name] else str(REPOSITORY / name)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert (ended.returncode, ended.stderr) == (130, f"\n{name}: stopped; nothing was written\n")


@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"])
def test_half_of_torchruns_environment_is_named_in_one_line(missing, monkeypatch):
    for name in {"RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE"} - {missing}:
        monkeypatch.setenv(name, "1")
    with pytest.raises(ValueError, match=f"WORLD_SIZE is set, but {missing} is None: start it with torchrun"):
        this_world()


def test_a_command_with_half_of_torchruns_environment_ends_in_one_line():
    code, said = children.run("train", [], children.with_environment, {"WORLD_SIZE": "2"})
    assert code == 1 and len(said.splitlines()) == 1
    assert said.startswith("train.py: WORLD_SIZE is set, but RANK is None")


def test_the_peak_of_memory_is_in_bytes_on_macos_and_unknown_on_windows(monkeypatch):
    cpu = torch.device("cpu")
    linux = memory.peak_bytes(cpu)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert linux / 1024 == pytest.approx(memory.peak_bytes(cpu), rel=0.1)
    monkeypatch.setitem(sys.modules, "resource", None)
    assert memory.peak_bytes(cpu) is None


# ------------------------------------------------------------------------------------------- results


def test_a_fraction_of_few_rows_that_rounds_to_none_repeats_none(runs, tmp_path):
    data = write_pairs(tmp_path / "one.parquet", demo_pairs(1, seed=5))
    probs = {}
    for name, words in (("none", []), ("uncertain", ["--tta", "uncertain", "--tta-fraction", "0.4"])):
        out = ["--out", str(tmp_path / "s.csv"), "--probs", str(tmp_path / f"{name}.csv")]
        infer.main(["--adapter", *runs, "--data", data, *out, *words])
        probs[name] = pd.read_csv(tmp_path / f"{name}.csv")
    pd.testing.assert_frame_equal(probs["none"], probs["uncertain"])


def test_a_mark_that_grows_when_its_number_changes_keeps_the_row_within_the_room():
    """A tokenizer that merges some digits: the mark of a smaller number can have two tokens more."""
    mark = lambda n: [9] * (2 + (80 - n) % 3)  # noqa: E731
    ids, offsets = list(range(100, 180)), [(i, i + 1) for i in range(80)]
    for room in range(40, 80):  # below that the row is refused
        cut = truncate_middle(ids, offsets, [(0, 20), (25, 50), (55, 80)], room, mark)
        assert len(cut) <= room and 9 in cut


def test_a_first_character_of_several_tokens_is_kept_whole_or_not_at_all():
    ids = list(range(100, 200))
    offsets = [(0, 1)] * 12 + [(i - 11, i - 10) for i in range(12, 88)] + [(77, 78)] * 12  # 12 tokens each
    cut = truncate_middle(ids, offsets, [(0, 78), (78, 78), (78, 78)], 18, lambda n: [0])
    assert [i for i in cut if 100 <= i < 112] in ([], ids[:12])
    assert [i for i in cut if i >= 188] in ([], ids[88:])

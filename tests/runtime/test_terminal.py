"""What stands on stdout: the line of JSON for a program, for a terminal with --json only (on a real pty).

print_json(result, asked), plus_minus(figures, name), device_name(device), what_next(config)
"""

import contextlib
import json
import os
import pty
import select

import torch

import quantize
from minarena.config import TrainConfig
from minarena.runtime.console import device_name, plus_minus, print_json, what_next

ERROR = {"accuracy": 0.5, "accuracy_se": 0.25, "log_loss": 0.7, "log_loss_se": None}


@contextlib.contextmanager
def terminal():
    """Inside, stdout is a terminal; gives a function that tells what was written to it. It is no fixture:
    pytest puts its own stdout back after setup."""
    leader, follower = pty.openpty()
    with open(follower, "w", encoding="utf-8") as stdout:

        def written() -> str:
            stdout.flush()
            found = b""
            while select.select([leader], [], [], 0.2)[0]:  # the kernel hands it on a moment later
                found += os.read(leader, 100_000)
            return found.decode()

        with contextlib.redirect_stdout(stdout):
            yield written
    os.close(leader)


def test_on_a_terminal_the_json_line_comes_only_if_asked():
    with terminal() as written:
        assert print_json({"a": 1}, asked=False) == {"a": 1} and written() == ""
        print_json({"a": 1}, asked=True)
        assert json.loads(written()) == {"a": 1}


def test_a_command_on_a_terminal(tiny, tmp_path):
    with terminal() as written:
        result = quantize.main(["--model", tiny, "--out", str(tmp_path / "a")])
        assert result["out"] and written() == ""
        result = quantize.main(["--model", tiny, "--out", str(tmp_path / "b"), "--json"])
        assert json.loads(written()) == result


def test_a_program_that_pipes_gets_the_line_unasked(capsys):
    print_json({"a": 1}, asked=False)
    assert json.loads(capsys.readouterr().out) == {"a": 1}


def test_an_unknown_error_is_not_written_and_one_thread_is_one(monkeypatch):
    assert [plus_minus(ERROR, name) for name in ("accuracy", "log_loss")] == ["0.5000 ± 0.2500", "0.7000"]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert device_name(torch.device("cpu")) == "CPU, 1 thread"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert device_name(torch.device("cpu")) == "CPU, 2 threads"


def test_the_last_lines_of_train_lead_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    both = "python infer.py --adapter runs/ab runs/ba"
    demo = TrainConfig(out="runs/ba", order="ba")
    assert what_next(demo)[0].startswith("Next: python train.py  ") and what_next(demo)[1] == f"Then: {both}"
    assert "python train.py --swap" in what_next(TrainConfig(out="runs/ab"))[0]
    (tmp_path / "runs" / "ab").mkdir(parents=True)
    (tmp_path / "runs" / "ab" / "adapter_config.json").touch()
    assert what_next(demo) == [f"Next: {both}", "Then: python -m minarena.report runs/ab runs/ba"]
    real = TrainConfig(data=["x.csv"], out="runs/ab", model="base")
    assert what_next(real)[0] == "Next: python infer.py --adapter runs/ab --data FILE"
    assert "--order both" in what_next(real)[1]
    real.order = "both"
    assert what_next(real)[1] == "Then: python -m minarena.report runs/ab"

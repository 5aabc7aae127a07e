"""Several processes under torchrun: the same result as one, and one end for all.

    torchrun --nproc_per_node 2 train.py ...      or, here, children with the variables that torchrun sets

Compared with: the same command as one process (dropout off: losses, weights and probabilities up to
rounding); shares dealt by hand; runs in which one rank fails, is killed, or gets a signal that the others do
not get.
"""

import json
import os
import signal
import time
from pathlib import Path

import children
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import REPOSITORY
from helpers import events, rows_of_all_lengths, write_pairs
from safetensors.torch import load_file

import infer
import train
from minarena.batching import balance_by_tokens
from minarena.dist import SINGLE_PROCESS, World, this_world
from minarena.files.checkpoint import find_checkpoints
from minarena.runtime import memory
from minarena.step import Compute, seed_dropout


@pytest.fixture(scope="module")
def words(tiny, pairs_file) -> list[str]:
    """Six steps of seven rows (the last of an epoch: six) without dropout; the held-out rows are four."""
    text = f"--model {tiny} --data {pairs_file} --limit 24 --n-splits 6 --batch-size 7 --epochs 2 --lr 5e-3"
    return [
        *text.split(),
        *["--lora-r", "4", "--max-length", "90", "--lora-dropout", "0", "--head-dropout", "0"],
    ]


@pytest.fixture(scope="module")
def alone(words, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    train.main([*words, "--out", str(out), "--eval-every", "3"])
    return out


def assert_same_up_to_rounding(one: Path, other: Path) -> None:
    first, second = (
        [event for event in events(out, saves=False) if event["event"] == "step"] for out in (one, other)
    )
    assert [event["step"] for event in first] == [event["step"] for event in second]
    for name in ("loss", "grad_norm"):
        values = [[event[name] for event in run] for run in (first, second)]
        np.testing.assert_allclose(*values, rtol=1e-4, atol=1e-6)
    tensors = [load_file(out / "adapter_model.safetensors") for out in (one, other)]
    for name, tensor in tensors[0].items():
        torch.testing.assert_close(tensor, tensors[1][name], rtol=0, atol=2e-4, msg=name)
    tables = [pd.read_parquet(out / "eval.parquet") for out in (one, other)]
    pd.testing.assert_frame_equal(*tables, rtol=0, atol=1e-4)


def train_ranks(size: int, words: list[str], out: Path, faults: dict | None = None, codes=None) -> list[str]:
    """What each rank said; the exit codes must be 0, or `codes`."""
    out.parent.mkdir(exist_ok=True)
    ended = children.run_ranks(size, "train", [*words, "--out", str(out)], out.parent, faults)
    assert [code for code, _ in ended] == (codes or [0] * size), ended
    return [said for _, said in ended]


# ----------------------------------------------------------------------------------------- the same result


@pytest.mark.parametrize(("size", "batch"), [(2, 7), (3, 2)], ids=["unequal shares", "fewer rows than ranks"])
def test_several_ranks_train_what_one_process_trains(words, alone, tmp_path, size, batch):
    """Each starts from other weights, and rank 0's count."""
    words, out = [*words, "--batch-size", str(batch), "--eval-every", "3"], tmp_path / "run"
    if batch != 7:
        alone = tmp_path / "alone"
        train.main([*words, "--out", str(alone)])
    faults = dict.fromkeys(range(1, size), (children.other_start,))
    said = train_ranks(size, words, out, faults)
    assert_same_up_to_rounding(alone, out)
    assert json.loads(said[0].splitlines()[-1])["tokens"] > 0
    assert not any(said[1:])  # only rank 0 is heard
    assert json.loads((out / "train_config.json").read_text())["world_size"] == size
    evaluations = [[e for e in events(run) if e["event"] == "eval"] for run in (alone, out)]
    assert [event["step"] for event in evaluations[0]] == [event["step"] for event in evaluations[1]]


def test_a_rank_without_memory_does_its_own_share_in_smaller_pieces(words, alone, tmp_path):
    said = train_ranks(2, words, tmp_path / "run", {0: (children.little_memory, 100)})
    assert "from here on, with --token-budget 128" in said[0]
    assert_same_up_to_rounding(alone, tmp_path / "run")


def test_a_run_goes_on_with_another_number_of_ranks(words, alone, tmp_path):
    """One of two gets SIGTERM: both stop after the same step. Then one process, a signal again, then two."""
    out = tmp_path / "run"
    fault = {1: (children.signal_in_step, 2, signal.SIGTERM)}
    said = train_ranks(2, words, out, fault, [143, 143])
    assert "2 of 6 steps are saved; the same command with --resume goes on" in said[0] and not said[1]
    more = [*words, "--out", str(out), "--resume"]
    assert children.run("train", more, children.signal_in_step, 2, signal.SIGTERM)[0] == 143
    assert find_checkpoints(str(out))[0].name == "checkpoint-4"
    train_ranks(2, [*words, "--resume"], out)
    assert_same_up_to_rounding(alone, out)


@pytest.mark.parametrize("tta", ["none", "uncertain"])
def test_two_ranks_predict_what_one_process_predicts(runs, tmp_path, small_parts, tta):
    """In parts of five rows, of which the first are done already when the ranks begin."""
    data = write_pairs(tmp_path / "rows.parquet", rows_of_all_lengths())
    words = ["--adapter", *runs, "--data", data, "--tta", tta, "--out", str(tmp_path / "s.csv"), "--probs"]
    infer.main([*words, str(tmp_path / "one.parquet")])
    one = (tmp_path / "s.csv").read_text()
    code, _ = children.run("infer", [*words, str(tmp_path / "two.parquet")], children.signal_in_part, 3, 9)
    assert code == -signal.SIGKILL
    faults = dict.fromkeys((0, 1), (children.small_parts,))
    ended = children.run_ranks(2, "infer", [*words, str(tmp_path / "two.parquet")], tmp_path, faults)
    assert [code for code, _ in ended] == [0, 0] and not ended[1][1], ended
    assert "2 parts are done already" in ended[0][1]
    pd.testing.assert_frame_equal(
        *(pd.read_parquet(tmp_path / f"{name}.parquet") for name in ("one", "two")), rtol=0, atol=1e-6
    )
    assert (tmp_path / "s.csv").read_text() == one and not (tmp_path / "s.csv.parts").exists()


def test_rows_are_dealt_by_tokens_each_to_one_pile():
    assert [pile.tolist() for pile in balance_by_tokens([5, 9, 4, 3, 3], 2)] == [
        [1, 3],
        [0, 2, 4],
    ]  # by hand: 12 and 12
    assert [pile.tolist() for pile in balance_by_tokens([4, 6], 3)] == [[1], [0], []]
    lengths = np.random.default_rng(0).integers(32, 2200, 1000)
    piles = balance_by_tokens(lengths, 8)
    assert sorted(np.concatenate(piles)) == list(range(1000))
    loads = [lengths[pile].sum() for pile in piles]
    assert max(loads) - min(loads) <= lengths.min() + 32  # the last rows to be dealt are the shortest


def test_each_rank_draws_masks_of_its_own():
    draws = []
    for rank in (0, 1, 0):
        seed_dropout(1, 7, rank)
        draws.append(torch.rand(3).tolist())
    assert draws[0] == draws[2] != draws[1]


def test_a_row_that_no_rank_predicted_is_an_error_that_names_it(monkeypatch):
    monkeypatch.setattr(World, "all_gather", lambda self, value: [value])  # as if nothing came from rank 1
    monkeypatch.setattr(memory, "predict_p_first", lambda model, mine, *_: np.full(len(mine), 0.5))
    names, rows = ["x", "y", "z"], [np.arange(n) for n in (5, 4, 3)]
    with pytest.raises(ValueError, match="no prediction for 2 of 3 rows: id 'y'"):
        memory.predict_on_all_ranks(None, rows, names, Compute(), World(0, 2))
    found = memory.predict_on_all_ranks(None, rows, names, Compute(), SINGLE_PROCESS)
    assert found.tolist() == [0.5] * 3


# ------------------------------------------------------------------------------------------ one end for all


def test_a_rank_that_fails_ends_the_others_wherever_they_are_with_its_own_error(words, tmp_path):
    """One waits for the sum, one sleeps as if its GPU did; a sum over NCCL waits like that."""
    faults = {1: (children.in_step, 3, children.fail, "rank 1 has a reason")}
    faults[2] = (children.in_step, 3, time.sleep, 600)
    said = train_ranks(3, words, tmp_path / "run", faults, [1, 1, 1])
    assert said[1] == "train.py: rank 1 has a reason\n" and not said[2]
    assert "reason" not in said[0] and "Traceback" not in said[0] and "has gone" not in said[0]


def test_an_error_of_all_ranks_is_said_once(words, tmp_path):
    said = train_ranks(2, ["--model", words[1], "--data", "nothing.csv"], tmp_path / "run", None, [1, 1])
    assert "".join(said) == "train.py: nothing.csv: no such file\n"


def test_an_option_that_does_not_exist_is_said_once(words, tmp_path):
    faults = {rank: (children.end_together, str(tmp_path), rank, 2) for rank in (0, 1)}
    said = train_ranks(2, [*words, "--bogus"], tmp_path / "run", faults, [2, 2])
    assert said[0].startswith("train.py: unknown option --bogus") and not said[1]


@pytest.mark.parametrize("rank", [0, 1])
def test_an_option_of_one_rank_that_does_not_exist_ends_all(words, tmp_path, rank):
    ends = [1, 1]
    ends[rank] = 2
    said = train_ranks(2, words, tmp_path / "run", {rank: (children.other_words, "--bogus", "20")}, ends)
    assert said[rank].count("unknown option --bogus") == 1 and "has gone" not in "".join(said)


def test_help_for_one_rank_ends_all(words, tmp_path):
    said = train_ranks(2, words, tmp_path / "run", {1: (children.other_words, "--help", "20")}, [1, 0])
    assert "--help 20" in said[1]


def test_a_signal_waits_for_a_save_that_takes_long(words, tmp_path):
    faults = dict.fromkeys((0, 1), (children.stopped_slowly, 3))
    train_ranks(2, words, tmp_path / "run", faults, [143, 143])
    assert [path.name for path in find_checkpoints(str(tmp_path / "run"))] == ["checkpoint-3"]


def test_ranks_with_other_options_or_data_are_told_so(words, tmp_path):
    said = train_ranks(2, words, tmp_path / "run", {1: (children.other_words, "--limit", "20")}, [1, 1])
    assert "limit is 20 on rank 1, and 24 on rank 0: all machines need the same command" in said[1]
    assert "Traceback" not in "".join(said)


def test_a_bad_number_of_one_rank_stops_all_before_their_step_which_is_saved(words, alone, tmp_path):
    """In the third step of rank 1 (a micro-batch each), before which two are done."""
    out = tmp_path / "run"
    faults = {0: (children.slow_save,), 1: (children.bad_number, 3)}
    said = train_ranks(2, words, out, faults, [1, 1])
    assert "".join(said).count("loss nan, gradient norm nan; --resume goes on after step 2") == 1
    assert [path.name for path in find_checkpoints(str(out))] == ["checkpoint-2"]
    train.main([*words, "--out", str(out), "--resume"])
    assert_same_up_to_rounding(alone, out)


def test_quantizing_is_refused_to_several_processes(tmp_path):
    ended = children.run_ranks(2, "quantize", ["--out", str(tmp_path / "q")], tmp_path)
    said = "quantize.py: it runs as one process: start it with python, not with torchrun\n"
    assert [code for code, _ in ended] == [1, 1] and "".join(words for _, words in ended) == said


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="--nproc_per_node 2: GPUs on this machine: 1"):
        World(1, 2, 1, 2).device()


def test_a_world_is_what_torchrun_said_and_without_it_nothing_happens(monkeypatch):
    assert this_world() == SINGLE_PROCESS == World(0, 1, 0, 1)
    tensor = torch.tensor([3.0])
    SINGLE_PROCESS.all_reduce_(tensor)
    SINGLE_PROCESS.broadcast_(tensor)
    assert tensor == 3 and SINGLE_PROCESS.all_gather("x") == ["x"] and not torch.distributed.is_initialized()
    for name, value in {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    assert this_world() == World(rank=5, size=8, local_rank=1, local_size=4)
    assert this_world().device() == torch.device("cpu")


# ------------------------------------------------------------------------------------------ torchrun itself


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_torchrun_ends_when_a_rank_is_killed_and_saves_when_it_is_asked_to_stop(words, alone, tmp_path, sent):
    """SIGKILL comes to rank 1, SIGTERM to torchrun, which passes it on. The ranks are interpreters of their
    own; torchrun is a forked child, which saves the time of its imports."""
    out, torchrun = tmp_path / "run", tmp_path / "torchrun.py"
    torchrun.write_text("from torch.distributed.run import main\nmain()\n")  # all that torchrun's file says
    command = ["--standalone", "--nproc_per_node", "2", str(REPOSITORY / "train.py"), *words]
    command += ["--epochs", "400", "--out", str(out)]
    process = children.begin(str(torchrun.with_suffix("")), command, tmp_path / "said")
    while not (out / "log.jsonl").exists() and process.is_alive():
        time.sleep(0.05)
    assert process.is_alive(), (tmp_path / "said").read_text()
    ranks = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    number = {pid: Path(f"/proc/{pid}/environ").read_bytes().partition(b"\0RANK=")[2][:1] for pid in ranks}
    os.kill(process.pid if sent == signal.SIGTERM else next(p for p in ranks if number[p] == b"1"), sent)
    try:
        process.join(600)  # seconds: torchrun itself gives its ranks 30
        assert process.exitcode
    finally:
        process.kill()
    said = (tmp_path / "said").read_text()
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert ("rank 1 has gone: killed?" in said) == (sent == signal.SIGKILL)
    assert bool(find_checkpoints(str(out))) == (sent == signal.SIGTERM) == ("steps are saved" in said)

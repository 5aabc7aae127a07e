"""A run that was cut off goes on as if it had not been.

    python train.py ... --save-every 2            writes OUT/checkpoint-2, checkpoint-4, ...; two are kept
    python train.py ... --save-every 2 --resume   goes on from the newest good one

Compared with: the same run without the interruption, bit for bit (adapter, log, probabilities), on a CPU.
"""

import json
import os
from pathlib import Path

import bitsandbytes as bnb
import pandas as pd
import pytest
import torch
from helpers import adapted, assert_same_run, events
from safetensors.torch import load_file
from sklearn.metrics import log_loss

import train
from minarena.fast.path import FastPath
from minarena.files import run
from minarena.files.checkpoint import find_checkpoints, save_checkpoint
from minarena.files.resume import load_checkpoint_
from minarena.optim import make_optimizer, trainable


class CutOff(BaseException):
    """As abrupt as Ctrl-C or a power cut: nothing in train.py catches it."""


@pytest.fixture(scope="module")
def words(tiny, pairs_file) -> list[str]:
    """Seven steps of five rows and a remainder, two epochs, dropout on, a checkpoint every second step."""
    text = f"--model {tiny} --data {pairs_file} --limit 24 --n-splits 6 --batch-size 6 --epochs 2 --lr 5e-3"
    return [*text.split(), *["--lora-r", "4", "--save-every", "2", "--eval-every", "3", "--max-length", "90"]]


@pytest.fixture(scope="module")
def straight(words, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("straight") / "run"
    assert train.main([*words, "--out", str(out)])["steps"] == 8
    return out


def stop():
    raise CutOff


def cut_after(steps: int, words: list[str], monkeypatch) -> None:
    """Run train.py and cut it off in the step after `steps` of them."""
    step, left = train.train_step, iter(range(steps))

    def step_or_stop(*arguments, **keywords):
        return step(*arguments, **keywords) if next(left, None) is not None else stop()

    with monkeypatch.context() as patch, pytest.raises(CutOff):
        patch.setattr(train, "train_step", step_or_stop)
        train.main(words)


@pytest.fixture
def cut_off(words, tmp_path, monkeypatch) -> Path:
    """The same run, cut off in its sixth step: checkpoint-2 and checkpoint-4 are there."""
    cut_after(5, [*words, "--out", str(tmp_path / "run")], monkeypatch)
    assert [path.name for path in find_checkpoints(str(tmp_path / "run"))] == ["checkpoint-4", "checkpoint-2"]
    return tmp_path / "run"


def test_a_run_that_was_cut_off_and_resumed_is_the_straight_run_bit_for_bit(words, straight, cut_off):
    started = load_file(cut_off / "checkpoint-4" / "adapter_model.safetensors")
    assert train.main([*words, "--out", str(cut_off), "--resume"])["steps"] == 8
    assert_same_run(straight, cut_off)
    steps = [event["step"] for event in events(straight) if event["event"] == "step"]
    assert steps == list(range(1, 9))
    saved = load_file(straight / "adapter_model.safetensors")
    assert any(not torch.equal(saved[name], started[name]) for name in saved)  # it did go on


def test_the_same_words_give_the_same_run(words, straight, tmp_path):
    train.main([*words, "--out", str(tmp_path / "run")])
    assert_same_run(straight, tmp_path / "run")


def test_a_run_can_be_cut_off_twice(words, straight, cut_off, monkeypatch):
    cut_after(3, [*words, "--out", str(cut_off), "--resume"], monkeypatch)
    train.main([*words, "--out", str(cut_off), "--resume"])
    assert_same_run(straight, cut_off)


@pytest.mark.parametrize(
    ("name", "keep"),
    [
        ("optimizer.safetensors", 0.5),
        ("optimizer.safetensors", None),
        ("adapter_model.safetensors", 0.9),
        ("adapter_config.json", 0.5),
        ("state.json", 0.5),
        ("state.json", 0.0),
    ],
)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_taken(
    words, straight, cut_off, name, keep, capsys
):
    path = cut_off / "checkpoint-4" / name
    if keep is None:
        path.unlink()
    else:
        whole = path.read_bytes()
        path.write_bytes(whole[: int(len(whole) * keep)])
    train.main([*words, "--out", str(cut_off), "--resume"])
    said = capsys.readouterr()
    assert "checkpoint-4 is damaged" in said.err and "checkpoint-2 is damaged" not in said.err
    assert len(said.out.splitlines()) == 1 and json.loads(said.out)["steps"] == 8
    assert_same_run(straight, cut_off)


def test_when_every_checkpoint_is_damaged_the_run_stops_and_names_them(words, cut_off):
    for number in (2, 4):
        (cut_off / f"checkpoint-{number}" / "state.json").write_text("")
    before = (cut_off / "log.jsonl").read_text()
    with pytest.raises(ValueError, match=r"--resume: no usable checkpoint .*checkpoint-4 .*checkpoint-2 "):
        train.main([*words, "--out", str(cut_off), "--resume"])
    assert (cut_off / "log.jsonl").read_text() == before


def test_a_finished_run_is_never_overwritten_and_resuming_it_says_its_result(
    words, straight, monkeypatch, capsys
):
    before = {path: path.read_bytes() for path in straight.rglob("*") if path.is_file()}
    monkeypatch.setattr(train, "build", None)  # no work is done
    with pytest.raises(ValueError, match=f"--out {straight} holds a finished run: give another --out"):
        train.main([*words, "--out", str(straight)])
    result = train.main([*words, "--out", str(straight), "--resume"])
    said = capsys.readouterr()
    assert f"{straight} is finished, nothing is left to do" in said.err
    assert json.loads(said.out) == result and (result["steps"], result["rows"]) == (8, 20)
    table = pd.read_parquet(straight / "eval.parquet")
    assert result["eval"]["log_loss"] == pytest.approx(log_loss(table["label"], table["p_a_ab"]))
    assert result["eval"]["mean"]["log_loss"] == pytest.approx(log_loss(table["label"], table["p_a"]))
    with pytest.raises(ValueError, match="--resume: epochs was 2, now it is 3"):
        train.main([*words, "--out", str(straight), "--resume", "--epochs", "3"])
    assert {path: path.read_bytes() for path in straight.rglob("*") if path.is_file()} == before


def test_tokens_and_seconds_of_a_resumed_run_are_said_to_be_of_its_own_steps(words, cut_off, capsys):
    result = train.main([*words, "--out", str(cut_off), "--resume"])
    assert (result["steps"], result["resumed_after"]) == (8, 4)
    assert result["tokens"] == 20 * 90  # the second epoch's: 20 rows, each cut to 90
    assert result["tokens_per_second"] == pytest.approx(result["tokens"] / result["seconds"], rel=0.05)
    assert "4 steps (after 4 before --resume) in " in capsys.readouterr().err


def test_an_unfinished_run_is_not_overwritten_and_the_remedy_is_said(words, cut_off):
    with pytest.raises(ValueError, match=f"--out {cut_off} holds an unfinished run: --resume goes on"):
        train.main([*words, "--out", str(cut_off)])
    (cut_off / "log.jsonl").unlink()  # the checkpoints are enough
    with pytest.raises(ValueError, match="holds an unfinished run"):
        train.main([*words, "--out", str(cut_off)])


def test_a_run_that_was_cut_off_before_its_first_checkpoint_begins_again(
    words, straight, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"
    cut_after(1, [*words, "--out", str(out)], monkeypatch)
    assert not find_checkpoints(str(out)) and (out / "log.jsonl").read_text()
    with pytest.raises(ValueError, match="holds an unfinished run: --resume goes on"):
        train.main([*words, "--out", str(out)])
    with pytest.raises(ValueError, match=r"--resume: seed was .*, now it is 1"):
        train.main([*words, "--out", str(out), "--seed", "1", "--resume"])
    train.main([*words, "--out", str(out), "--resume"])
    assert f"{out} has no checkpoint yet" in capsys.readouterr().err
    assert_same_run(straight, out)


def test_a_start_that_failed_before_its_first_step_stands_in_nobodys_way(words, straight, tmp_path):
    out = ["--out", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="at or above layer 2"):
        train.main([*words, *out, "--freeze-layers", "2"])
    train.main([*words, *out])
    assert_same_run(straight, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "train_config.json").read_text())["freeze_layers"] == 0


def test_resuming_without_the_record_of_the_run_names_the_file(words, cut_off):
    for text in ("{", None):
        path = cut_off / "train_config.json"
        path.write_text(text) if text else path.unlink()
        with pytest.raises(ValueError, match=r"train_config\.json is damaged"):
            train.main([*words, "--out", str(cut_off), "--resume"])


def test_resuming_where_there_is_no_run_is_refused(words, tmp_path):
    with pytest.raises(ValueError, match="--resume: no run in"):
        train.main([*words, "--out", str(tmp_path / "none"), "--resume"])
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("--lr 1e-3", "lr was 0.005, now it is 0.001"),
        ("--batch-size 4", "batch_size"),
        ("--seed 5", "seed"),
        ("--order ba", "order"),
        ("--lora-r 8", "lora_r"),
        ("--epochs 3", "epochs"),
        ("--max-length 80", "max_length"),
        ("--label-smoothing 0.1", "label_smoothing"),
        ("--limit 23", "limit"),
    ],
)
def test_resuming_with_another_option_is_refused_by_its_name(words, cut_off, option, named):
    with pytest.raises(ValueError, match=f"--resume: {named}.*: a resumed run keeps its options"):
        train.main([*words, *option.split(), "--out", str(cut_off), "--resume"])


def test_resuming_with_another_file_under_the_same_name_is_refused(words, cut_off, pairs_file):
    whole = Path(pairs_file).read_bytes()
    table = pd.read_parquet(pairs_file)
    try:
        table.assign(prompt="?").to_parquet(pairs_file, index=False)
        with pytest.raises(ValueError, match="--resume: data_files was"):
            train.main([*words, "--out", str(cut_off), "--resume"])
    finally:
        Path(pairs_file).write_bytes(whole)


def test_what_does_not_decide_the_result_may_change_while_resuming(words, straight, cut_off):
    more = ["--eval-every", "100", "--save-every", "1", "--token-budget", "4096"]  # 4096 is a CPU's "auto"
    train.main([*words, *more, "--out", str(cut_off), "--resume"])
    first, second = (load_file(out / "adapter_model.safetensors") for out in (straight, cut_off))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_checkpoint_is_an_adapter_of_its_own(tiny, cut_off, straight):
    """infer.py --adapter RUN/checkpoint-N: the same two files, PEFT's format."""
    files = {path.name for path in (cut_off / "checkpoint-4").iterdir()}
    assert files == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "optimizer.safetensors",
        "state.json",
        "checksums.json",
    }
    kept = sorted(path.name for path in find_checkpoints(str(straight)))
    assert kept == ["checkpoint-6", "checkpoint-8"]  # the newest two; the last step is one of them


def test_an_evaluation_that_fails_at_the_end_costs_no_step(words, straight, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(CutOff):
        patch.setattr(run, "save_results", lambda *_: stop())
        train.main([*words, "--out", str(out)])
    train.main([*words, "--out", str(out), "--resume"])
    assert_same_run(straight, out)


def test_a_last_line_that_was_cut_off_is_dropped(words, straight, cut_off):
    with open(cut_off / "log.jsonl", "a") as file:
        file.write('{"event": "step", "step": 6, "lo')
    train.main([*words, "--out", str(cut_off), "--resume"])
    assert_same_run(straight, cut_off)


def test_an_unfinished_write_is_no_checkpoint(tiny, tmp_path, monkeypatch):
    """Cut off while writing: what lies there does not have the final name, and the next write succeeds."""
    model, config = adapted(tiny)
    optimizer = make_optimizer(model, 0.0)
    with monkeypatch.context() as patch, pytest.raises(CutOff):
        patch.setattr(os, "fsync", lambda _: stop())
        save_checkpoint(str(tmp_path), 3, model, optimizer, config, tiny)
    assert not find_checkpoints(str(tmp_path))
    save_checkpoint(str(tmp_path), 3, model, optimizer, config, tiny)
    assert load_checkpoint_(str(tmp_path), model, optimizer)[0] == 3
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-3", "log.jsonl"}


def test_adamw8bit_goes_on_from_a_checkpoint_bit_for_bit(tiny, tmp_path):
    """The GPU's optimiser, on a CPU. The gradients are given, so that only its state could differ."""

    def steps(model, optimizer, numbers) -> None:
        for number in numbers:
            generator = torch.Generator().manual_seed(number)
            for p in trainable(model):
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()

    model, config = adapted(tiny, r=64)  # matrices of 4,096 elements and more have 8-bit state, others fp32
    straight = bnb.optim.AdamW8bit(trainable(model), lr=1e-2, weight_decay=0.0)
    steps(model, straight, range(3))
    save_checkpoint(str(tmp_path), 3, model, straight, config, tiny)
    other, _ = adapted(tiny, r=64)
    resumed = bnb.optim.AdamW8bit(trainable(other), lr=1e-2, weight_decay=0.0)
    assert load_checkpoint_(str(tmp_path), other, resumed)[0] == 3
    before = [p.detach().clone() for p in trainable(other)]
    steps(model, straight, range(3, 6))
    steps(other, resumed, range(3, 6))
    for mine, theirs, old in zip(trainable(other), trainable(model), before, strict=True):
        assert torch.equal(mine, theirs) and not torch.equal(mine, old)
    kinds = {v.dtype for state in straight.state.values() for v in state.values() if torch.is_tensor(v)}
    assert kinds >= {torch.uint8, torch.float32}  # both kinds of state were in it


def test_weights_of_another_shape_are_no_usable_checkpoint(tiny, tmp_path):
    model, config = adapted(tiny)
    save_checkpoint(str(tmp_path), 3, model, make_optimizer(model, 0.0), config, tiny)
    other, _ = adapted(tiny, r=3)
    with pytest.raises(ValueError, match="no usable checkpoint"):
        load_checkpoint_(str(tmp_path), other, make_optimizer(other, 0.0))


def test_the_record_holds_every_resolved_option_the_files_and_the_versions(straight, pairs_file):
    record = json.loads((straight / "train_config.json").read_text())
    assert (record["order"], record["lr"], record["dtype"], record["seed"]) == ("ab", 5e-3, "fp32", 0xFACED)
    assert record["rows"] == 20 and record["data_files"][0]["file"] == pairs_file
    assert {"python", "torch", "transformers", "bitsandbytes"} <= record["versions"].keys()
    assert "commit" in record


def test_the_record_says_which_path_ran_and_a_run_is_resumed_on_the_same_one(words, cut_off, monkeypatch):
    path = cut_off / "train_config.json"
    record = json.loads(path.read_text())
    assert (record["fast"], record["path"]) == ("on", "reference")  # there is no GPU here
    path.write_text(json.dumps(record | {"path": "fast"}))
    with pytest.raises(ValueError, match="begun on the fast path, this is the reference one"):
        train.main([*words, "--out", str(cut_off), "--resume"])
    path.write_text(json.dumps(record))
    real, claimed = train.build, []

    def on_the_fast_path(*arguments):
        model, *rest = real(*arguments)
        model.fast = FastPath(None, None)
        return model, *rest

    monkeypatch.setattr(train, "build", on_the_fast_path)
    monkeypatch.setattr(run, "write_record", lambda out, record: claimed.append(record.get("path")))
    monkeypatch.setattr(train, "make_optimizer", lambda *_: stop())
    with pytest.raises(CutOff):
        train.main([*words, "--out", str(cut_off / "other")])
    assert claimed == [None, "fast"]


def test_a_run_that_was_cut_off_while_its_base_loaded_records_all_when_it_is_resumed(
    words, tmp_path, monkeypatch
):
    out, real = tmp_path / "run", train.build
    monkeypatch.setattr(train, "build", lambda *_: stop())
    with pytest.raises(CutOff):
        train.main([*words, "--out", str(out)])
    before = json.loads((out / "train_config.json").read_text())
    assert "path" not in before and "base" not in before
    monkeypatch.setattr(train, "build", real)
    train.main([*words, "--out", str(out), "--resume"])
    record = json.loads((out / "train_config.json").read_text())
    assert record["path"] == "reference" and record["base"]["weights"] and record["token_budget_used"]


def test_a_run_that_was_begun_on_another_device_is_not_resumed(words, cut_off):
    """The optimiser's state is another there, and no rounding is the same."""
    path = cut_off / "train_config.json"
    path.write_text(path.read_text().replace('"device": "cpu"', '"device": "cuda"'))
    with pytest.raises(ValueError, match="--resume: device was 'cuda', now it is 'cpu'"):
        train.main([*words, "--out", str(cut_off), "--resume"])

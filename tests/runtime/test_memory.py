"""A step that the GPU cannot hold is done again in smaller pieces; one with a bad number is not done at all.

    --token-budget auto    is halved until the step fits
    --token-budget N       is kept, and the message says what to try

There is no GPU here: the model's forward raises torch's own error where a micro-batch is too large. Compared
with: the run that had the smaller budget from its start, bit for bit, dropout on (so nothing of the attempt
that failed is left: no gradient, no draw of a mask); and the uninterrupted run.
"""

import math
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import assert_same_run, events, rows_of_all_lengths, write_pairs
from safetensors.torch import load_file

import infer
import train
from minarena.batching import rows_of_step
from minarena.dist import World
from minarena.files.checkpoint import find_checkpoints
from minarena.files.run import Run
from minarena.model import PreferenceModel


@pytest.fixture(scope="module")
def words(tiny, pairs_file) -> list[str]:
    """Six steps of seven rows (the last of an epoch: six) of 90 tokens, dropout on."""
    text = f"--model {tiny} --data {pairs_file} --limit 24 --n-splits 6 --batch-size 7 --epochs 2 --lr 5e-3"
    return [*text.split(), "--lora-r", "4", "--max-length", "90"]


def limit_memory(patch, tokens: int, fails: tuple[int, ...] = ()) -> list[int]:
    """From here on micro-batches of more than `tokens` do not fit, nor does what the calls `fails` (from 1)
    of the model are given. Returns the tokens of every micro-batch, as they are tried."""
    real, tried = PreferenceModel.forward, []

    def forward(self, input_ids, mask):
        tried.append(input_ids.numel())
        if input_ids.numel() > tokens or len(tried) in fails:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(self, input_ids, mask)

    patch.setattr(PreferenceModel, "forward", forward)
    return tried


def trained(words, out: Path, *more: str) -> Path:
    train.main([*words, "--out", str(out), *more])
    return out


@pytest.fixture(scope="module")
def plain_run(words, tmp_path_factory):
    """A function (options) -> the folder of the run with these options and memory enough, trained once."""

    @cache
    def plain_run(*more: str) -> Path:
        return trained(words, tmp_path_factory.mktemp("plain") / "run", *more)

    return plain_run


def test_an_automatic_budget_is_halved_until_the_step_fits_and_stays_there(
    words, plain_run, tmp_path, monkeypatch, capsys
):
    plain = plain_run("--token-budget", "256")
    with monkeypatch.context() as patch:
        tried = limit_memory(patch, tokens=270)
        lowered = trained(words, tmp_path / "lowered")
    assert_same_run(plain, lowered)
    # 4,096, 2,048 and 1,024 tokens hold all seven rows, 512 hold five; tried in the first step only
    assert [size for size in tried if size > 270] == [630, 630, 630, 450]
    said = capsys.readouterr().err
    assert said.count("out of GPU memory") == 4
    assert "with micro-batches of 512 tokens: again, and from here on, with --token-budget 256" in said


def test_an_attempt_that_failed_half_way_leaves_no_trace(words, plain_run, tmp_path, monkeypatch):
    """At 512 tokens the first micro-batch goes through, backward and all, and the second does not fit."""
    plain = plain_run("--token-budget", "256")
    with monkeypatch.context() as patch:
        tried = limit_memory(patch, tokens=450, fails=(5,))
        again = trained(words, tmp_path / "again")
    assert tried[:6] == [630, 630, 630, 450, 180, 180]
    assert_same_run(plain, again)


def test_without_dropout_the_result_is_that_of_a_gpu_with_room_up_to_rounding(
    words, plain_run, tmp_path, monkeypatch
):
    quiet = ["--lora-dropout", "0", "--head-dropout", "0"]
    plain = plain_run(*quiet)
    with monkeypatch.context() as patch:
        limit_memory(patch, tokens=630, fails=(3,))  # in the third step: 1,024 and 512 still to come
        lowered = trained(words, tmp_path / "lowered", *quiet, "--save-every", "2")
    first, second = (load_file(out / "adapter_model.safetensors") for out in (plain, lowered))
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=0, atol=2e-4, msg=name)
    assert [event["step"] for event in events(lowered) if event["event"] == "step"] == [1, 2, 3, 4, 5, 6]
    losses = [
        [event["loss"] for event in events(out) if event["event"] == "step"] for out in (plain, lowered)
    ]
    np.testing.assert_allclose(*losses, rtol=0, atol=1e-5)


def test_an_evaluation_that_does_not_fit_is_done_again_as_well(
    words, plain_run, tmp_path, monkeypatch, capsys
):
    plain = plain_run()
    with monkeypatch.context() as patch:
        limit_memory(patch, tokens=10_000, fails=(7,))  # six steps, then the held-out rows
        again = trained(words, tmp_path / "again")
    assert "again, and from here on, with --token-budget 2048" in capsys.readouterr().err
    first, second = (pd.read_parquet(out / "eval.parquet") for out in (plain, again))
    pd.testing.assert_frame_equal(first, second, rtol=0, atol=1e-6)


def test_a_typed_budget_is_kept_and_the_message_names_the_value_to_try(
    words, plain_run, tmp_path, monkeypatch
):
    plain, out = plain_run("--token-budget", "512"), tmp_path / "run"
    with monkeypatch.context() as patch:
        limit_memory(patch, tokens=450, fails=(6,))  # two micro-batches a step: in the third step
        problem = r"step 3, rows \[.*\]: out of GPU memory with micro-batches of 512 tokens: "
        with pytest.raises(MemoryError, match=problem + "try --token-budget 256; --resume goes on after"):
            trained(words, out, "--token-budget", "512")
    assert [path.name for path in find_checkpoints(str(out))] == ["checkpoint-2"]
    trained(words, out, "--token-budget", "512", "--resume")
    assert_same_run(plain, out, saves=False)


def test_a_row_that_does_not_fit_by_itself_is_said_to_be_too_long(words, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        tried = limit_memory(patch, tokens=89)
        with pytest.raises(MemoryError, match="of 90 tokens: a single row, so only a smaller --max-length"):
            trained(words, tmp_path / "run")
    assert tried == [630, 630, 630, 450, 180, 90, 90]  # 4,096 ... 256, 128, 90: not more
    assert not find_checkpoints(str(tmp_path / "run"))  # nothing was done


def test_out_of_memory_in_the_optimiser_is_neither_done_again_nor_saved(
    words, plain_run, tmp_path, monkeypatch
):
    """Some weights are new by then and some are not."""
    plain, out, calls = plain_run(), tmp_path / "run", []

    def half(optimizer, *_):
        calls.append(1)
        if len(calls) == 3:
            optimizer.param_groups[0]["params"][0].data += 1
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(optimizer)

    real = torch.optim.AdamW.step
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", half)
        with pytest.raises(ValueError, match="out of GPU memory in the optimiser: weights half updated"):
            trained(words, out, "--save-every", "2")
    assert len(calls) == 3 and [path.name for path in find_checkpoints(str(out))] == ["checkpoint-2"]
    trained(words, out, "--resume")
    assert_same_run(plain, out, saves=False)


# --------------------------------------------------------------------------------------- bad numbers


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("number", "order"), [(1, "ab"), (4, "ab"), (4, "both")])
def test_a_bad_number_stops_the_run_before_its_step_and_leaves_the_steps_before_it(
    words, plain_run, pairs_file, tmp_path, monkeypatch, bad, number, order
):
    """Its message names the step and the ids of its rows, as one reads them from the file by hand."""
    plain, out = plain_run("--order", order), tmp_path / "run"
    words = [*words, "--order", order]
    real, calls = PreferenceModel.forward, []

    def forward(self, input_ids, mask):
        calls.append(1)
        logits = real(self, input_ids, mask)
        return logits * bad if len(calls) == number else logits

    with monkeypatch.context() as patch, pytest.raises(FloatingPointError) as caught:
        patch.setattr(PreferenceModel, "forward", forward)
        trained(words, out)
    ids = pd.read_parquet(pairs_file)["id"].head(24)[np.arange(24) % 6 != 0].to_numpy()
    chosen = list(ids[rows_of_step(number - 1, 20, 7, 0xFACED)])
    assert str(caught.value).startswith(f"step {number}, rows {chosen}: loss nan, gradient norm ")
    going_on = f"; --resume goes on after step {number - 1}"
    assert str(caught.value).endswith(going_on) == (
        number > 1
    )  # before the first step nothing is to go on with
    assert [path.name for path in find_checkpoints(str(out))] == [f"checkpoint-{number - 1}"] * (number > 1)
    trained(words, out, "--resume")  # the number is a good one this time
    assert_same_run(plain, out, saves=False)


def test_a_bad_number_in_an_evaluation_on_the_way_costs_no_step(words, plain_run, tmp_path, monkeypatch):
    plain, out = plain_run(), tmp_path / "run"
    real = PreferenceModel.forward

    def forward(self, *batch):
        return real(self, *batch) * (1 if self.training else math.nan)

    with monkeypatch.context() as patch, pytest.raises(FloatingPointError, match="logits that are not fin"):
        patch.setattr(PreferenceModel, "forward", forward)
        trained(words, out, "--eval-every", "4")
    assert [path.name for path in find_checkpoints(str(out))] == ["checkpoint-4"]
    trained(words, out, "--resume")
    assert_same_run(plain, out, saves=False)


# ------------------------------------------------------------------------------------------ inference


def test_inference_lowers_its_budget_too_and_predicts_the_same(runs, tmp_path, small_parts, monkeypatch):
    data = write_pairs(tmp_path / "rows.parquet", rows_of_all_lengths())
    words = ["--adapter", *runs, "--data", data, "--out", str(tmp_path / "s.csv"), "--probs"]
    infer.main([*words, str(tmp_path / "plain.parquet")])
    with monkeypatch.context() as patch:
        tried = limit_memory(patch, tokens=600)
        infer.main([*words, str(tmp_path / "lowered.parquet")])
        fits = [size <= 600 for size in tried]
        assert all(fits[fits.index(True) :])  # the next part and the next adapter begin with what did fit
        with pytest.raises(MemoryError, match="micro-batches of 2,000 tokens: try --token-budget 1000"):
            infer.main([*words, str(tmp_path / "typed.parquet"), "--token-budget", "2000"])
    assert max(tried) > 600 and not (tmp_path / "typed.parquet").exists()
    plain, lowered = (pd.read_parquet(tmp_path / f"{name}.parquet") for name in ("plain", "lowered"))
    pd.testing.assert_frame_equal(plain, lowered, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("size", "after"), [(1, "after step 3"), (2, "from the newest checkpoint")])
def test_of_several_ranks_one_without_memory_promises_no_step_that_rank_0_may_not_have_saved(size, after):
    run = SimpleNamespace(saved=3, world=World(size - 1, size))
    with pytest.raises(MemoryError, match=f"--resume goes on {after}$"), Run.saving_on_failure(run, 3, ["r"]):
        raise MemoryError("out of GPU memory")

"""The three commands from end to end, as the README types them.

    python train.py                                  the demo
    python train.py --swap                           its mirrored twin
    python infer.py --adapter runs/ab runs/ba        the ensemble on the demo's held-out pairs

The fixture `demo` (conftest.py) ran these, the first on fewer rows. Compared with: what training itself
predicted for the held-out rows, scikit-learn, and a run on a file that was mirrored by hand.
"""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import REPOSITORY
from helpers import write_pairs
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, log_loss

import infer
import quantize
import train
from minarena.config import InferConfig, QuantizeConfig, TrainConfig, parse
from minarena.tiny import demo_pairs

FIGURES = {"accuracy", "accuracy_se", "log_loss", "log_loss_se"}


def test_the_demo_learns_what_wins_and_says_that_it_is_the_demo(demo):
    _, said = demo
    result, stderr = said["ba"]
    assert result["rows"] == 2400 and result["order"] == "ba" and result["out"] == "runs/ba"
    assert (
        result["eval"]["accuracy"] > 0.7
    )  # chance is .5, the label noise allows .9, 600 rows: 10 errors away
    assert result["eval"]["log_loss"] < 0.6
    assert "This is the demo" in stderr and "lr 0.005 is the demo's own" in stderr


def test_the_last_line_of_training_has_the_promised_keys(demo):
    for name, order in (("ab", "ab"), ("ba", "ba")):
        result = demo[1][name][0]
        assert result.keys() == {
            *("out", "order", "steps", "rows", "tokens", "seconds", "tokens_per_second", "peak_memory_gib"),
            *("resumed_after", "eval"),
        }
        assert result["eval"].keys() == FIGURES | {"ab", "ba", "mean"}
        assert all(result["eval"][part].keys() == FIGURES for part in ("ab", "ba", "mean"))
        assert {name: result["eval"][name] for name in FIGURES} == result["eval"][order]
        assert result["steps"] == -(-result["rows"] // 16)


def test_the_folder_of_a_run_holds_the_promised_files(demo):
    run = demo[0] / "runs" / "ba"
    files = {path.name for path in run.iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "eval.parquet"} | {
        *("train_config.json", "log.jsonl", "checkpoint-150")  # the last step's, for an end that is cut off
    }
    table = pd.read_parquet(run / "eval.parquet")
    assert list(table.columns) == ["id", "label", "p_a_ab", "p_a_ba", "p_a"]
    held_out = demo_pairs(600, 0xFACED, held_out=True)
    assert list(table["id"]) == list(held_out["id"]) and list(table["label"]) == list(held_out["label"])
    np.testing.assert_allclose(table["p_a"], (table["p_a_ab"] + table["p_a_ba"]) / 2)
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "step"] == list(range(1, 151))
    assert {"loss", "lr", "grad_norm", "tokens_per_second"} <= events[0].keys()
    assert [(event["event"], event["step"]) for event in events[-2:]] == [("save", 150), ("eval", 150)]


def test_the_figures_of_training_are_scikit_learns_of_its_eval_table(demo):
    table = pd.read_parquet(demo[0] / "runs" / "ba" / "eval.parquet")
    figures = demo[1]["ba"][0]["eval"]
    for part, column in (("ab", "p_a_ab"), ("ba", "p_a_ba"), ("mean", "p_a")):
        assert figures[part]["accuracy"] == pytest.approx(accuracy_score(table["label"], table[column] > 0.5))
        assert figures[part]["log_loss"] == pytest.approx(log_loss(table["label"], table[column]))


def test_the_ensemble_is_each_model_in_its_own_order_averaged_and_better_than_chance(demo):
    folder, said = demo
    result = said["infer"][0]
    ab, ba = (
        pd.read_parquet(folder / "runs" / order / "eval.parquet").set_index("id") for order in ("ab", "ba")
    )
    expected = (ab["p_a_ab"] + ba["p_a_ba"]) / 2
    probs = pd.read_csv(folder / "probs.csv").set_index("id")
    assert list(probs.index) == list(demo_pairs(600, 0xFACED, held_out=True)["id"])
    np.testing.assert_allclose(probs["winner_model_a"], expected.loc[probs.index], rtol=0, atol=1e-5)
    np.testing.assert_allclose(probs["winner_model_a"] + probs["winner_model_b"], 1, rtol=0, atol=1e-12)
    assert result["accuracy"] == pytest.approx(accuracy_score(ab["label"], expected > 0.5))
    assert result["log_loss"] == pytest.approx(log_loss(ab["label"], expected), abs=1e-6)
    assert result["accuracy"] > 0.7
    assert result["passes"] == ["runs/ab ab", "runs/ba ba"] and result["rows"] == 600


def test_the_submission_has_every_id_once_in_input_order(demo):
    submission = pd.read_csv(demo[0] / "submission.csv")
    probs = pd.read_csv(demo[0] / "probs.csv")
    assert list(submission.columns) == ["id", "winner"]
    assert list(submission["id"]) == list(demo_pairs(600, 0xFACED, held_out=True)["id"])
    assert list(submission["winner"]) == [
        "model_a" if p > 0.5 else "model_b" for p in probs["winner_model_a"]
    ]


def test_rows_in_another_order_and_both_orders_of_each_adapter(demo, tmp_path, capsys):
    """--tta all averages four passes; lengths are unsorted, ids come back as they stood."""
    folder = demo[0]
    table = demo_pairs(600, 0xFACED, held_out=True).sample(40, random_state=3)
    data = write_pairs(tmp_path / "shuffled.csv", table)
    adapters = ["--adapter", str(folder / "runs" / "ab"), str(folder / "runs" / "ba")]
    outs = ["--out", str(tmp_path / "s.parquet"), "--probs", str(tmp_path / "p.parquet")]
    ab, ba = (
        pd.read_parquet(folder / "runs" / order / "eval.parquet").set_index("id") for order in ("ab", "ba")
    )
    for more, expected in (
        (["--tta", "all"], (ab["p_a"] + ba["p_a"]) / 2),
        (["--weights", "3", "1"], 0.75 * ab["p_a_ab"] + 0.25 * ba["p_a_ba"]),
        (["--tta", "all", "--weights", "0", "2"], ba["p_a"]),
    ):
        infer.main([*adapters, "--data", data, *outs, *more])
        probs = pd.read_parquet(tmp_path / "p.parquet")
        assert list(probs["id"]) == list(table["id"]) == list(pd.read_parquet(tmp_path / "s.parquet")["id"])
        np.testing.assert_allclose(
            probs["winner_model_a"], expected.loc[probs["id"]].to_numpy(), rtol=0, atol=1e-5
        )
        assert len(capsys.readouterr().out.splitlines()) == 1


def mirrored(table: pd.DataFrame) -> pd.DataFrame:
    """By hand, row by row."""
    rows = []
    for row in table.to_dict("records"):
        other = {"response_a": row["response_b"], "response_b": row["response_a"]}
        rows.append({**row, **other, "label": 1 - row["label"]})
    return pd.DataFrame(rows)


def test_swap_trains_on_the_mirrored_text_byte_for_byte(tiny, tmp_path, capsys):
    """The adapters of `--swap` and of no swap on a file that was mirrored by hand have the same bits."""
    table, held_out = demo_pairs(24, seed=1), demo_pairs(6, seed=2, held_out=True)
    for name, change in (("plain", lambda t: t), ("mirrored", mirrored)):
        write_pairs(tmp_path / f"{name}.parquet", change(table))
        write_pairs(tmp_path / f"{name}-valid.parquet", change(held_out))
    adapters = {}
    for out, name, more in (
        ("swap", "plain", ["--swap"]),
        ("hand", "mirrored", []),
        ("plain", "plain", []),
    ):
        words = f"--model {tiny} --data {tmp_path}/{name}.parquet --eval-data {tmp_path}/{name}-valid.parquet"
        words += f" --lora-r 4 --lr 5e-3 --batch-size 8 --max-length 150 --out {tmp_path}/{out}"
        train.main([*words.split(), *more])
        adapters[out] = load_file(tmp_path / out / "adapter_model.safetensors")
    for key, tensor in adapters["swap"].items():
        assert torch.equal(tensor, adapters["hand"][key]), key
    assert any(not torch.equal(t, adapters["plain"][key]) for key, t in adapters["swap"].items())
    swap, hand = (pd.read_parquet(tmp_path / out / "eval.parquet") for out in ("swap", "hand"))
    np.testing.assert_allclose(swap["p_a_ba"], 1 - hand["p_a_ab"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(swap["p_a_ab"], 1 - hand["p_a_ba"], rtol=0, atol=1e-12)


def test_training_and_inference_repair_and_cut_a_text_alike(tiny, tmp_path, capsys):
    """Of broken text both see what ftfy makes of it, and no more than --max-length tokens of it."""
    adapters, probs = [], []
    for name, broken in (("broken", True), ("mended", False)):
        for part, rows in (("train", 12), ("valid", 8)):
            table = demo_pairs(rows, seed=3, held_out=part == "valid")
            for column in ("prompt", "response_a", "response_b"):
                table[column] = [("schÃ¶n &amp; " if broken else "schön & ") + text for text in table[column]]
            write_pairs(tmp_path / f"{name}-{part}.parquet", table)
        run, valid = tmp_path / name, tmp_path / f"{name}-valid.parquet"
        words = f"--model {tiny} --data {tmp_path}/{name}-train.parquet --eval-data {valid} --batch-size 4"
        train.main([*words.split(), *f"--lora-r 4 --lr 1e-2 --max-length 80 --out {run}".split()])
        adapters.append(load_file(run / "adapter_model.safetensors"))
        outs = f"--out {tmp_path}/s.csv --probs {tmp_path}/p.parquet"
        infer.main([*f"--adapter {run} --data {valid} {outs}".split()])
        probs.append(pd.read_parquet(tmp_path / "p.parquet")["winner_model_a"])
        seen_in_training = pd.read_parquet(run / "eval.parquet")["p_a_ab"]
        np.testing.assert_allclose(probs[-1], seen_in_training, rtol=0, atol=1e-6)
        infer.main([*f"--adapter {run} --data {valid} {outs} --max-length 400".split()])
        uncut = pd.read_parquet(tmp_path / "p.parquet")["winner_model_a"]
        assert np.abs(uncut - seen_in_training).max() > 1e-4  # the cut was one
    assert all(torch.equal(tensor, adapters[1][name]) for name, tensor in adapters[0].items())
    np.testing.assert_array_equal(*probs)


def test_the_demos_learning_rate_is_its_own_and_a_typed_one_wins(tiny, pairs_file, tmp_path, capsys):
    valid = write_pairs(tmp_path / "valid.parquet", demo_pairs(2, seed=4, held_out=True))
    for number, (model, typed, lr) in enumerate(
        [
            ("tiny", [], 5e-3),
            ("tiny", ["--lr", "1e-3"], 1e-3),
            (tiny, [], 2e-4),
            (tiny, ["--lr", "1e-3"], 1e-3),
        ]
    ):
        words = f"--model {model} --data {pairs_file} --eval-data {valid} --limit 4 --batch-size 2"
        train.main([*words.split(), *typed, "--warmup-ratio", "0", "--out", str(tmp_path / str(number))])
        assert json.loads((tmp_path / str(number) / "train_config.json").read_text())["lr"] == lr
        first = json.loads((tmp_path / str(number) / "log.jsonl").read_text().splitlines()[0])
        assert first["lr"] == lr  # that of a first step without warm-up
        assert ("the demo's own" in capsys.readouterr().err) == (model == "tiny" and not typed)


def test_training_over_an_8_bit_folder_is_training_over_the_float_one(tiny, pairs_file, tmp_path, capsys):
    quantize.main(["--model", tiny, "--out", str(tmp_path / "base-8bit")])
    losses = []
    for number, base in enumerate((tiny, str(tmp_path / "base-8bit"))):
        words = f"--model {base} --data {pairs_file} --limit 16 --n-splits 4 --batch-size 4 --lora-r 4"
        train.main([*words.split(), "--out", str(tmp_path / str(number))])
        lines = (tmp_path / str(number) / "log.jsonl").read_text().splitlines()
        losses.append([json.loads(line).get("loss") for line in lines])
    assert losses[0] == losses[1] and len(losses[0]) == 5
    output = capsys.readouterr().out.splitlines()
    assert len(output) == 3 and json.loads(output[0]).keys() >= {"out", "model", "bytes", "head", "worst"}


def test_an_adapter_without_a_record_is_taken_as_ab_aloud_and_can_be_said_to_be_ba(demo, tmp_path, capsys):
    """PEFT's own files have no train_config.json."""
    folder = demo[0]
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (bare / name).write_bytes((folder / "runs" / "ba" / name).read_bytes())
    ba = pd.read_parquet(folder / "runs" / "ba" / "eval.parquet").head(20)
    outs = ["--limit", "20", "--out", str(tmp_path / "s.csv"), "--probs", str(tmp_path / "p.parquet")]
    for argument, column in ((f"{bare}", "p_a_ab"), (f"{bare}:ba", "p_a_ba")):
        infer.main(["--adapter", argument, "--model", "tiny", *outs])
        probs = pd.read_parquet(tmp_path / "p.parquet")
        np.testing.assert_allclose(probs["winner_model_a"], ba[column], rtol=0, atol=1e-5)
        assert f"{bare}: no train_config.json, taken as order {column[-2:]}" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--model is needed"):
        infer.main(["--adapter", str(bare), *outs])


def test_adapters_that_were_trained_differently_need_the_option_to_be_said(demo, tmp_path):
    folder, other = demo[0], tmp_path / "other"
    shutil.copytree(folder / "runs" / "ab", other)
    record = json.loads((other / "train_config.json").read_text())
    (other / "train_config.json").write_text(json.dumps({**record, "max_length": 99}))
    with pytest.raises(ValueError, match=r"different --max-length.*2200.*99.*give --max-length"):
        infer.main(["--adapter", str(folder / "runs" / "ba"), str(other), "--out", str(tmp_path / "s.csv")])


def test_what_infer_cannot_do_is_refused_before_anything_is_loaded(demo, tmp_path):
    runs = demo[0] / "runs"
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "train_config.json").write_text("{}")
    rows = tmp_path / "rows.csv"
    rows.write_text("not read before the refusal")
    for words, named in (
        (f"--adapter {tmp_path}/none", "none: no adapter_config.json there"),
        (f"--adapter {unfinished}", "its training is unfinished"),
        (f"--adapter {runs}/ab --out {tmp_path}/s.txt", r"s.txt: must end in .csv or .parquet"),
        (
            f"--adapter {runs}/ab --probs {tmp_path}/no/p.csv",
            "p.csv: cannot be written: No such file or directory",
        ),
        (f"--adapter {runs}/ab --data {tmp_path}/none.csv --out {tmp_path}/s.csv", "none.csv: no such file"),
        (f"--adapter {runs}/ab --data {rows} --out {rows}", "rows.csv: is read, and would be replaced"),
        (f"--adapter {runs}/ab --data {rows} --probs {tmp_path}/./rows.csv", "rows.csv: is read"),
        (f"--adapter {runs}/ab --model some/base --out {tmp_path}/s.csv", "--data FILE is needed"),
    ):
        with pytest.raises(ValueError, match=named):
            infer.main(words.split())


def test_rows_that_cannot_be_trained_on_are_refused_before_the_base_is_loaded(pairs_file, tmp_path):
    table = pd.read_parquet(pairs_file)
    unlabelled, one = tmp_path / "unlabelled.parquet", tmp_path / "one.parquet"
    table.drop(columns="winner").to_parquet(unlabelled)
    table.head(1).to_parquet(one)
    for words, named in (
        (f"--data {unlabelled} --n-splits 4", "no winner for id .*needs a column winner"),
        (f"--data {one} --n-splits 4", "--data has no rows: see what was left out, --n-splits"),
        (f"--data {pairs_file} --fold 999", "the held-out part has no rows"),
        (f"--data {pairs_file} --eval-data {one}", "--eval-data .*one.parquet: id 'demo-0' is in --data"),
    ):
        with pytest.raises(ValueError, match=named):
            train.main([*words.split(), "--model", "none-such", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_freeze_beyond_the_last_layer_is_refused(tiny, pairs_file, tmp_path):
    words = f"--model {tiny} --data {pairs_file} --n-splits 4 --freeze-layers 2 --out {tmp_path}/run"
    with pytest.raises(ValueError, match="at or above layer 2"):
        train.main(words.split())


def test_the_commands_that_the_fixture_ran_stand_in_the_readme():
    text = Path(REPOSITORY, "README.md").read_text()
    for command in (
        "python train.py --swap ",
        "python train.py ",
        "python infer.py --adapter runs/ab runs/ba ",
    ):
        assert re.search(rf"{command} +# ", text), command


COMMANDS = {"train.py": TrainConfig, "infer.py": InferConfig, "quantize.py": QuantizeConfig}


@pytest.mark.parametrize("file", ["README.md", *COMMANDS])
def test_every_command_that_is_written_down_parses(file, capsys):
    """As in `python train.py --swap   # why`: the words end at two spaces, a #, | or &, or a lone quote."""
    text = Path(REPOSITORY, file).read_text().replace("\\\n", " ")
    found = re.findall(
        r"python (train\.py|infer\.py|quantize\.py)((?: (?:\"[^\"\n]*\"|[^\s#|&`\"']+))*)", text
    )
    assert found, f"{file} shows no command"
    for script, words in found:
        parse(COMMANDS[script], shlex.split(words.rstrip(".,;:)")))

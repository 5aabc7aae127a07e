"""The options that won since: soft labels and their weight, ties, stages, the uncertain rows, the cut.

train.py --data train.parquet pseudo.parquet --pseudo-weight 0.5 --ties half --truncation middle
train.py --init-adapter runs/first --data second.parquet
infer.py --adapter DIR... --tta uncertain --tta-fraction 0.4

Compared with: rows predicted alone, the loss and its gradient computed in one batch by hand, and what the
training loop hands to its step, text by text. The cut itself is in test_snip.py.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import CPU, TEXTS, adapted, counted, one_step, rows_of_all_lengths, write_pairs
from sklearn.metrics import log_loss

import infer
import train
from minarena.files.adapter import load_adapter_
from minarena.files.base import load_backbone
from minarena.files.pairs import read_pairs
from minarena.model import AdapterConfig, PreferenceModel
from minarena.runtime import memory
from minarena.text import encode
from minarena.tiny import byte_tokenizer, demo_pairs


def test_uncertain_is_all_for_the_rows_nearest_a_half_and_none_for_the_others(
    runs, alone, tmp_path, monkeypatch
):
    table = rows_of_all_lengths()
    data = write_pairs(tmp_path / "rows.csv", table)
    calls = counted(monkeypatch)
    outs = ["--out", str(tmp_path / "s.csv"), "--probs", str(tmp_path / "p.parquet")]
    words = ["--adapter", *runs, "--data", data, "--tta", "uncertain", "--tta-fraction", "0.3", *outs]
    result = infer.main(words)
    p = pd.read_parquet(tmp_path / "p.parquet")
    assert list(p["id"]) == list(table["id"])
    p = p.set_index("id")["winner_model_a"]
    own = {r["id"]: (alone(r, 0, "ab") + alone(r, 1, "ba")) / 2 for r in table.to_dict("records")}
    both = {
        r["id"]: np.mean([alone(r, number, order) for number in (0, 1) for order in ("ab", "ba")])
        for r in table.to_dict("records")
    }
    nearest = sorted(own, key=lambda i: abs(own[i] - 0.5))[:7]  # 0.3 of 23 rows
    for i in own:
        assert p[i] == pytest.approx(both[i] if i in nearest else own[i], abs=1e-5)
    assert max(abs(own[i] - both[i]) for i in nearest) > 1e-3
    assert calls == [23, 23, 7, 7]
    swapped = [f"{runs[0]} ba (30% of the rows)", f"{runs[1]} ab (30% of the rows)"]
    assert sorted(result["passes"]) == sorted([f"{runs[0]} ab", f"{runs[1]} ba", *swapped])


def test_weights_count_for_the_uncertain_rows_too(runs, alone, tmp_path):
    table = rows_of_all_lengths()
    data = write_pairs(tmp_path / "rows.csv", table)
    outs = ["--out", str(tmp_path / "s.csv"), "--probs", str(tmp_path / "p.parquet")]
    words = ["--adapter", *runs, "--data", data, "--weights", "1", "4", *outs]
    infer.main([*words, "--tta", "uncertain", "--tta-fraction", "0.3"])
    p = pd.read_parquet(tmp_path / "p.parquet").set_index("id")["winner_model_a"]
    rows = {row["id"]: row for row in table.to_dict("records")}
    own = {i: 0.2 * alone(row, 0, "ab") + 0.8 * alone(row, 1, "ba") for i, row in rows.items()}
    nearest = sorted(own, key=lambda i: abs(own[i] - 0.5))[:7]  # 0.3 of 23 rows
    equal = []
    for i in nearest:
        first, second = ((alone(rows[i], n, "ab") + alone(rows[i], n, "ba")) / 2 for n in (0, 1))
        own[i] = 0.2 * first + 0.8 * second
        equal.append((first + second) / 2)
    for i, expected in own.items():
        assert p[i] == pytest.approx(expected, abs=1e-5)
    assert max(abs(p[i] - without) for i, without in zip(nearest, equal, strict=True)) > 1e-3


def test_an_adapter_trained_on_both_orders_is_the_mean_of_both_beside_any_other(
    runs, alone, tmp_path, capsys
):
    """Its two passes share its one weight: with a weight each P would go up to 2."""
    both = tmp_path / "both"
    shutil.copytree(runs[1], both)
    record = json.loads((both / "train_config.json").read_text())
    (both / "train_config.json").write_text(json.dumps({**record, "order": "both"}))
    table = rows_of_all_lengths(9)
    data = write_pairs(tmp_path / "rows.csv", table)
    outs = ["--out", str(tmp_path / "s.csv"), "--probs", str(tmp_path / "p.parquet")]
    for adapters, more, weights in (
        ([str(both)], [], (0, 1)),
        ([runs[0], str(both)], [], (0.5, 0.5)),
        ([runs[0], str(both)], ["--weights", "3", "1"], (0.75, 0.25)),
    ):
        result = infer.main(["--adapter", *adapters, "--data", data, *more, *outs])
        assert result["passes"][-2:] == [f"{both} ab", f"{both} ba"]
        p = pd.read_parquet(tmp_path / "p.parquet").set_index("id")["winner_model_a"]
        for row in table.to_dict("records"):
            mean = (alone(row, 1, "ab") + alone(row, 1, "ba")) / 2
            expected = weights[0] * alone(row, 0, "ab") + weights[1] * mean
            assert p[row["id"]] == pytest.approx(expected, abs=1e-5)


def test_the_loss_is_the_weighted_mean_and_its_gradient_too(tiny):
    """sum(w ce) / sum(w) by hand in one batch, against micro-batches of unequal size."""
    rows = encode(byte_tokenizer(), rows_of_all_lengths(7), 300)
    rng = np.random.default_rng(0)
    labels, weights = rng.random(7), np.array([1, 0.25, 1, 0.25, 0.25, 1, 1])
    model, _ = adapted(tiny, AdapterConfig(r=6, alpha=9.0))
    mask = [torch.ones(1, len(row), dtype=torch.int64) for row in rows]
    logits = torch.cat([model(torch.tensor(row)[None].long(), m) for row, m in zip(rows, mask, strict=True)])
    log_p = torch.log(torch.softmax(logits.double(), -1))
    y, w = torch.tensor(labels), torch.tensor(weights)
    loss = (w * -(y * log_p[:, 0] + (1 - y) * log_p[:, 1])).sum() / w.sum()
    loss.backward()
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = [p.grad.clone() for p in parameters]
    model.zero_grad()
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    before = [p.detach().clone() for p in parameters]
    settings = {"lr": 1.0, "token_budget": 500, "pad_id": 0, "max_grad_norm": 0}
    found, _ = one_step(model, optimizer, rows, labels, row_weights=weights, **settings)
    assert found == pytest.approx(loss.item(), abs=1e-6)
    for old, new, grad in zip(before, parameters, expected, strict=True):
        torch.testing.assert_close(old - new, grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("order", ["ab", "both"])
def test_training_gives_pseudo_labelled_rows_their_soft_label_and_weight(
    order, tiny, pairs_file, tmp_path, monkeypatch
):
    people = read_pairs([pairs_file], limit=12).set_index("id")["label"]
    soft = demo_pairs(9, seed=3).assign(id=[f"soft{i}" for i in range(9)])
    soft["winner"] = [[x, 1 - x] for x in np.linspace(0.05, 0.9, 9)]
    pseudo = str(tmp_path / "pseudo.parquet")
    soft[["id", *TEXTS, "winner"]].to_parquet(pseudo)
    people_file = str(tmp_path / "people.parquet")
    pd.read_parquet(pairs_file).head(12).to_parquet(people_file)
    steps, texts = [], {}

    def step(model, optimizer, batch, *_, **__):
        rows = zip(batch.rows, batch.p_first, batch.weights, strict=True)
        steps.append([(byte_tokenizer().decode(row[1:-1]), label, weight) for row, label, weight in rows])
        return 0.7, 0.1

    monkeypatch.setattr(train, "train_step", step)
    words = f"--model {tiny} --data {people_file} {pseudo} --pseudo-weight 0.25 --n-splits 6 --order {order}"
    train.main([*words.split(), "--out", str(tmp_path / "run")])
    table = pd.concat([pd.read_parquet(people_file), soft]).set_index("id")
    for i, row in table.iterrows():
        label = people[i] if i in people else row["winner"][0]
        for a, b, p in (
            (row["response_a"], row["response_b"], label),
            (row["response_b"], row["response_a"], 1 - label),
        ):
            text = f"<prompt>: {row['prompt']}\n\n<response_a>: {a}\n\n<response_b>: {b}"
            texts.setdefault(text, []).append((p, 1.0 if i in people else 0.25))
    seen = [entry for step in steps for entry in step]
    assert len(seen) == (10 + 9) * (2 if order == "both" else 1)  # two of the people's rows are held out
    for text, label, weight in seen:
        assert any((label, weight) == pytest.approx(pair) for pair in texts[text])
    assert {weight for _, _, weight in seen} == {1.0, 0.25}


def test_a_weight_without_pseudo_labels_and_pseudo_labels_without_people_are_refused(
    tiny, pairs_file, tmp_path
):
    words = f"--model {tiny} --data {pairs_file} --pseudo-weight 0.5 --n-splits 4 --out {tmp_path}/run"
    with pytest.raises(ValueError, match=r"--pseudo-weight 0\.5: no file of --data has pseudo-labels"):
        train.main(words.split())
    rows = demo_pairs(8, seed=1)
    rows["winner"] = [[0.5, 0.5]] * 8
    rows[["id", *TEXTS, "winner"]].to_parquet(tmp_path / "p.parquet")
    with pytest.raises(ValueError, match="the held-out part has no rows"):
        train.main(f"--model {tiny} --data {tmp_path}/p.parquet --n-splits 4 --out {tmp_path}/run".split())


def test_the_standard_errors_of_training_are_over_prompts(tiny, pairs_file, tmp_path):
    """Twelve held-out rows about three prompts: taken as twelve independent rows the error is another."""
    held_out = demo_pairs(12, seed=4, held_out=True)
    held_out["prompt"] = [f"{number % 3}?" for number in range(12)]
    valid = write_pairs(tmp_path / "valid.parquet", held_out)
    words = (
        f"--model {tiny} --data {pairs_file} --limit 8 --eval-data {valid} --lora-r 4 --out {tmp_path}/run"
    )
    figures = train.main(words.split())["eval"]
    table = pd.read_parquet(tmp_path / "run" / "eval.parquet")
    for order, column in (("ab", "p_a_ab"), ("ba", "p_a_ba"), ("mean", "p_a")):
        loss = np.array([log_loss([y], [p], labels=[0, 1]) for y, p in table[["label", column]].to_numpy()])
        off = [(loss - loss.mean())[number::3].sum() for number in range(3)]
        by_hand = np.sqrt(3 / 2 * np.sum(np.square(off))) / 12
        assert figures[order]["log_loss_se"] == pytest.approx(by_hand, rel=1e-6)
        assert abs(loss.std(ddof=1) / np.sqrt(12) / by_hand - 1) > 0.05


def test_ties_are_left_out_or_labelled_one_half(tiny, pairs_file, runs, tmp_path, capsys):
    table = pd.read_parquet(pairs_file).head(20)
    table.loc[::4, "winner"] = "tie"
    table.to_parquet(tmp_path / "ties.parquet")
    base = f"--model {tiny} --data {tmp_path}/ties.parquet --n-splits 10 --fold 1 --lora-r 4"
    rows = {}
    for ties in ("drop", "half"):
        rows[ties] = train.main([*base.split(), "--ties", ties, "--out", str(tmp_path / ties)])["rows"]
    assert rows == {"drop": 13, "half": 18}  # of 20 rows two are held out, and five are ties
    assert "5 ties (--ties half keeps them)" in capsys.readouterr().err
    infer.main([*f"--adapter {runs[0]} --data {tmp_path}/ties.parquet --out {tmp_path}/s.csv".split()])
    assert "ties      5, not counted in the accuracy" in capsys.readouterr().err


def test_an_initial_adapter_that_is_not_there_is_named_with_its_option(tiny, pairs_file, tmp_path):
    words = f"--model {tiny} --data {pairs_file} --init-adapter {tmp_path}/none --out {tmp_path}/run"
    with pytest.raises(ValueError, match=f"--init-adapter {tmp_path}/none: no adapter_config.json there"):
        train.main(words.split())


def test_the_second_stage_starts_where_the_first_ended(tiny, pairs_file, tmp_path):
    """One step has lr 0 (the warm-up's first), so what is saved is what was started from."""
    base = f"--model {tiny} --data {pairs_file} --limit 16 --n-splits 4 --max-length 200"
    train.main(f"{base} --lora-r 4 --head linear --batch-size 4 --out {tmp_path}/first".split())
    train.main(f"{base} --init-adapter {tmp_path}/first --batch-size 12 --out {tmp_path}/second".split())
    first, second = (
        (tmp_path / run / "adapter_model.safetensors").read_bytes() for run in ("first", "second")
    )
    assert first == second


def test_training_and_its_evaluation_show_rows_that_are_cut_in_the_middle(
    tiny, pairs_file, tmp_path, monkeypatch
):
    table = pd.read_parquet(pairs_file).head(12)
    table["response_a"] = [text * 9 for text in table["response_a"]]
    table.to_parquet(tmp_path / "long.parquet")
    seen = []
    monkeypatch.setattr(
        train, "train_step", lambda m, o, batch, *_, **__: (seen.extend(batch.rows), (0.7, 0.1))[1]
    )
    monkeypatch.setattr(
        memory, "predict_p_first", lambda m, rows, *_: seen.extend(rows) or np.full(len(rows), 0.5)
    )
    words = (
        f"--model {tiny} --data {tmp_path}/long.parquet --n-splits 4 --max-length 300 --out {tmp_path}/run"
    )
    train.main([*words.split(), "--truncation", "middle"])
    texts = [byte_tokenizer().decode(row[1:-1]) for row in seen]
    assert len(texts) == 9 + 2 * 3  # three rows are held out, and evaluated in both orders
    assert all(text.startswith("<prompt>: ") for text in texts) and any("(snip " in text for text in texts)
    assert json.loads((tmp_path / "run" / "train_config.json").read_text())["truncation"] == "middle"


def test_inference_cuts_rows_as_they_were_cut_in_training(tiny, runs, tmp_path):
    table = rows_of_all_lengths(6)
    table["response_a"] = [text * 20 for text in table["response_a"]]
    data = write_pairs(tmp_path / "rows.csv", table)
    folder = tmp_path / "middle"
    folder.mkdir()
    for path in Path(runs[0]).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    record = json.loads((folder / "train_config.json").read_text())
    (folder / "train_config.json").write_text(json.dumps({**record, "truncation": "middle"}))
    model = PreferenceModel(load_backbone(tiny, CPU, torch.float32), torch.nn.Identity())
    load_adapter_(model, runs[0])
    outs = ["--out", str(tmp_path / "s.csv"), "--probs", str(tmp_path / "p.csv")]
    found = {}
    for name, more in (("middle", []), ("left", ["--truncation", "left"])):
        infer.main(["--adapter", str(folder), "--data", data, *more, *outs])
        found[name] = pd.read_csv(tmp_path / "p.csv")["winner_model_a"].to_numpy()
        for p, row in zip(found[name], encode(byte_tokenizer(), table, 200, name), strict=True):
            ids = torch.tensor(row)[None].long()
            with torch.no_grad():
                logits = model.eval()(ids, torch.ones_like(ids)).double()
            assert p == pytest.approx(logits.softmax(-1)[0, 0].item(), abs=1e-5)
    assert np.abs(found["middle"] - found["left"]).max() > 1e-3

"""The options that won since: soft labels and their weight, ties, stages, the uncertain rows, the cut.

train.py --data train.parquet pseudo.parquet --pseudo-weight 0.5 --ties half --truncation middle
train.py --init-adapter runs/first --data second.parquet
infer.py --adapter DIR... --tta uncertain --tta-fraction 0.4

Compared with: rows predicted alone, the loss and its gradient computed in one batch by hand, and what the
training loop hands to its step, text by text. The cut itself is in test_snip.py.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import CPU, TEXTS, adapted, counted, one_step, rows_of_all_lengths, write_pairs

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


def test_ties_are_left_out_or_labelled_one_half(tiny, pairs_file, tmp_path, capsys):
    table = pd.read_parquet(pairs_file).head(20)
    table.loc[::4, "winner"] = "tie"
    table.to_parquet(tmp_path / "ties.parquet")
    base = f"--model {tiny} --data {tmp_path}/ties.parquet --n-splits 10 --fold 1 --lora-r 4"
    rows = {}
    for ties in ("drop", "half"):
        rows[ties] = train.main([*base.split(), "--ties", ties, "--out", str(tmp_path / ties)])["rows"]
    assert rows == {"drop": 13, "half": 18}  # of 20 rows two are held out, and five are ties
    assert "5 ties (--ties half keeps them)" in capsys.readouterr().err


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
        for p, row in zip(found[name], encode(byte_tokenizer(), table, 400, name), strict=True):
            ids = torch.tensor(row)[None].long()
            with torch.no_grad():
                logits = model.eval()(ids, torch.ones_like(ids)).double()
            assert p == pytest.approx(logits.softmax(-1)[0, 0].item(), abs=1e-5)
    assert np.abs(found["middle"] - found["left"]).max() > 1e-3

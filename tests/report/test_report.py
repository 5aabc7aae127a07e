"""The page of minarena.report.

python -m minarena.report runs/ab runs/ba --probs probs.csv --out report.html

Compared with: scikit-learn and pandas on the same tables, Python's HTML parser, and a real Chromium
(`python -m pytest -m browser`). Most runs are folders written by hand, with probabilities of a made-up judge.
"""

import html
import json
import re
import runpy
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import write_pairs
from sklearn.metrics import accuracy_score, log_loss

from minarena import metrics
from minarena.files.durable import file_record
from minarena.report import __main__ as report
from minarena.report import page as page_of
from minarena.report import sections
from minarena.runtime import console
from minarena.tiny import demo_pairs

EVIL = [
    "<script>alert(1)</script><img src=x onerror=alert(2)>",
    "</dd></dl></details></section><style>*{display:none}</style><iframe src=//evil.example>",
    "NUL \x00, escape \x1b[31m, half a pair HALF, turned \u202e round &amp; &lt;b&gt;",
    "long " * 30_000,
    "W" * 20_000,
]


def write_run(
    folder: Path, table: pd.DataFrame, order: str = "ab", seed: int = 0, steps: int = 40, **record
) -> Path:
    """A finished run whose judge knows a little and prefers the first answer a little."""
    rng, label = np.random.default_rng(seed), table["label"].to_numpy()
    folder.mkdir(parents=True)
    logit = 2 * label - 1 + rng.normal(size=len(table))
    p_ab, p_ba = (
        1 / (1 + np.exp(-logit + shift - 0.7 * rng.normal(size=len(table)))) for shift in (-0.2, 0.2)
    )
    found = table[["id", "label"]].assign(p_a_ab=p_ab, p_a_ba=p_ba, p_a=(p_ab + p_ba) / 2)
    found.to_parquet(folder / "eval.parquet", index=False)
    settings = dict(
        model="tiny", order=order, max_length=120, epochs=1, rows=640, batch_size=16, seed=5, lr=0.005
    )
    settings |= dict(data=[], data_files=[]) | record
    (folder / "train_config.json").write_text(json.dumps(settings))
    scored = {"log_loss": 0.5, "accuracy": 0.7}
    losses = 0.7 - 0.3 * np.arange(steps) / 40 + 0.02 * rng.normal(size=steps)
    events = [{"event": "step", "step": i + 1, "loss": loss, "lr": 1e-3} for i, loss in enumerate(losses)]
    events.append({"event": "eval", "step": steps, "ab": scored, "ba": scored, "mean": scored})
    (folder / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def cut_off(run: Path, steps: int) -> Path:
    """As if the run were at that step, in the middle of a line."""
    lines = (run / "log.jsonl").read_text().splitlines()
    (run / "log.jsonl").write_text("\n".join(lines[:steps]) + '\n{"event": "step", "st')
    (run / "eval.parquet").unlink()
    return run


@pytest.fixture
def no_pictures(monkeypatch):
    """Captions without figures: drawing them is most of the time that a page takes."""
    caption = "<figure><figcaption>{}</figcaption></figure>"
    monkeypatch.setattr(page_of, "picture", lambda ax, said: caption.format(page_of.text(said)))


undrawn = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    """The demo's held-out rows for seed 5, as a run with that seed sees them."""
    return demo_pairs(150, 5, held_out=True)


@pytest.fixture(scope="module")
def two(table, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("two")
    return [write_run(folder / order, table, order, seed) for seed, order in enumerate(("ab", "ba"))]


def made(*words, out: Path) -> tuple[str, list[str]]:
    """(the page, its sentences)"""
    report.main([*map(str, words), "--out", str(out)])
    page = out.read_text(encoding="utf-8")
    said = re.findall(r"<figcaption>(.*?)</figcaption>|<li>(.*?)<dl>", page, re.DOTALL)
    return page, [html.unescape(a or b) for a, b in said]


def cells(page: str) -> dict[str, tuple[str, ...]]:
    """name -> rows, accuracy, log loss of every table line"""
    lines = re.findall(r"<tr.*?><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td>", page)
    found = {html.unescape(name).removesuffix(" (trained)"): tuple(rest) for name, *rest in lines}
    assert len(found) == len(lines)  # no name stands there twice
    return found


def cards(page: str) -> dict[str, tuple[str, str]]:
    """title -> (figure, what it means), of the five at the beginning"""
    found = re.findall(r"<div><h3>(.*?)</h3><strong>(.*?)</strong><p>(.*?)</p></div>", page)
    return {html.unescape(title): (figure, html.unescape(said)) for title, figure, said in found}


def answer(page: str) -> str:
    """The first sentence of the page, after the question."""
    return re.search(r'<p class="answer"><strong>.*?</strong> (.*?)</p>', page)[1]


@undrawn
def test_the_figures_are_those_of_scikit_learn_for_each_order_and_the_ensemble(two, table, tmp_path):
    page, said = made(*two, out=tmp_path / "r.html")
    ab, ba = (pd.read_parquet(run / "eval.parquet") for run in two)
    found = cells(page)
    for run, each in zip(two, (ab, ba), strict=True):
        for name, column in (("order ab", "p_a_ab"), ("order ba", "p_a_ba"), ("both orders", "p_a")):
            rows, accuracy, loss = found[f"{run} in {name}"]
            assert rows == "150"
            assert accuracy.startswith(f"{accuracy_score(table['label'], each[column] > 0.5):.3f} ± ")
            assert loss.startswith(f"{log_loss(table['label'], each[column]):.3f} ± ")
    ensemble = (ab["p_a_ab"] + ba["p_a_ba"]) / 2  # each in the order that it was trained in
    error = metrics.standard_error((ensemble > 0.5) == table["label"], table["prompt"])
    expected = f"{accuracy_score(table['label'], ensemble > 0.5):.3f} ± {error:.3f}"
    assert found["ensemble"][1] == expected
    agrees = f"ensemble agrees with the generated labels on {expected} of 150 rows"
    assert any(agrees in sentence for sentence in said)
    flip = np.mean((ab["p_a_ab"] > 0.5) != (ab["p_a_ba"] > 0.5))
    assert any(
        f"{flip:.3f} ± " in s and "of its verdicts flip" in s and s.startswith(str(two[0])) for s in said
    )
    groups = table.assign(right=(ensemble > 0.5) == table["label"]).groupby("language")["right"]
    assert len(groups) == 6
    for language, right in groups:
        if len(right) < 20:
            assert language not in found
        else:
            assert found[language][0] == str(len(right))
            assert found[language][1].startswith(f"{right.mean():.3f}")
    longer = np.where(table["response_a"].str.len() > table["response_b"].str.len(), 1.0, 0.0)
    half = table["response_a"].str.len() == table["response_b"].str.len()
    rule = np.where(half, 0.5, longer == table["label"]).mean()
    assert any(f"the rule that the longer answer wins: {rule:.3f} ± " in sentence for sentence in said)
    ratio = np.log2((table["response_a"].str.len() + 1) / (table["response_b"].str.len() + 1))
    expected = [np.corrcoef(ratio, y)[0, 1] for y in (ensemble, table["label"])]
    (sentence,) = [sentence for sentence in said if "correlations" in sentence]
    assert re.search(r"correlations with length are {:.3f} ± .* and {:.3f} ± ".format(*expected), sentence)
    rises = [np.polyfit(ratio, y, 1)[0] for y in (ensemble, table["label"])]
    assert re.search(r"judge rises by {:.3f} ± .*prefer a rises by {:.3f} ± ".format(*rises), sentence)


@undrawn
@pytest.mark.parametrize(
    "shift, words", [(0, "no place"), (0.1, "answer shown first"), (-0.1, "answer shown second")]
)
def test_a_preference_for_a_place_is_said_and_one_within_noise_is_called_so(shift, words, table, tmp_path):
    run, rng = write_run(tmp_path / "run", table), np.random.default_rng(0)
    p_ab, p_ba = rng.uniform(0.2, 0.8, (2, 150)) + np.array([[shift], [-shift]])  # P(a wins)
    table[["id", "label"]].assign(p_a_ab=p_ab, p_a_ba=p_ba, p_a=0.5).to_parquet(run / "eval.parquet")
    _, said = made(run, out=tmp_path / "r.html")
    (sentence,) = [s for s in said if "of its verdicts flip" in s]
    assert f"favours {'no place' if not shift else 'the ' + words} (" in sentence
    assert ("within noise" in sentence) == (not shift)


@undrawn
def test_the_twenty_worst_are_the_most_confident_and_the_flips_the_widest(two, table, tmp_path):
    page, _ = made(two[0], out=tmp_path / "r.html")
    found = pd.read_parquet(two[0] / "eval.parquet").set_index("id")
    ids = re.findall(r"<dt>id</dt><dd dir=auto>(.*?)</dd>", page)
    best = min(("p_a_ab", "p_a_ba", "p_a"), key=lambda column: log_loss(found["label"], found[column]))
    wrong = found[(found[best] > 0.5) != (found["label"] > 0.5)]
    mistakes = (wrong[best] - 0.5).abs().sort_values(ascending=False).index[:20]
    flip = found[(found["p_a_ab"] > 0.5) != (found["p_a_ba"] > 0.5)]
    widest = (flip["p_a_ab"] - flip["p_a_ba"]).abs().sort_values(ascending=False).index[:20]
    assert len(mistakes) == 20 and ids == [*mistakes, *widest]
    row = table.set_index("id").loc[ids[0]]
    assert f"<dd dir=auto>{html.escape(row['response_a'])}</dd>" in page


def elements(page: str) -> tuple[list[tuple[str, dict]], str]:
    """What a browser makes of a page: its elements with their attributes, and its text."""
    found, text = [], []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append((tag, dict(attributes)))
    parser.handle_data = text.append
    parser.feed(page)
    return found, "".join(text)


@pytest.fixture(scope="module")
def evil(tmp_path_factory) -> tuple[Path, pd.DataFrame, str]:
    """(a run, its rows, their file): texts, a language, an id and a folder that could break a page."""
    folder = tmp_path_factory.mktemp("evil")
    table = demo_pairs(60, 7)
    for i, text in enumerate(EVIL):
        table.loc[i, ["prompt", "response_a", "response_b"]] = [f"{i} {text}", f"{text} a", f"{text} b"]
    table.loc[0, ["id", "language"]] = ["<b>id</b>", "<script>$x^2$</script>"]
    table.loc[:30, "language"] = table.loc[0, "language"]
    data = write_pairs(folder / "evil.jsonl", table)
    Path(data).write_text(Path(data).read_text().replace("HALF", "\\ud83d"))  # a DataFrame cannot hold it
    record = {"data": ["x"], "eval_data": data, "data_files": [file_record(data)]}
    run = write_run(folder / "<i>run &amp;", table, **record)
    found = pd.read_parquet(run / "eval.parquet")
    found.loc[:4, "p_a_ab"] = np.where(found.loc[:4, "label"] == 1, 0.001, 0.999)  # the worst mistakes of all
    found.loc[:4, "p_a_ba"] = 1 - found.loc[:4, "p_a_ab"]
    found.to_parquet(run / "eval.parquet", index=False)
    return run, table, data


def test_hostile_texts_are_shown_as_text_and_huge_ones_are_cut_with_a_mark(evil, tmp_path):
    run, _, _ = evil
    page, _ = made(run, out=tmp_path / "r.html")
    found, text = elements(page)
    tags = [tag for tag, _ in found]
    assert not {"script", "img", "iframe", "i", "b", "object"} & {*tags}
    assert tags.count("style") == 1 and tags.count("section") == 7
    assert not any(name.startswith("on") for _, attributes in found for name in attributes)
    for shown in (EVIL[0], EVIL[1], "turned \u202e round &amp; &lt;b&gt;", "<b>id</b>", "<i>run &amp;"):
        assert shown in text, shown
    assert "NUL \ufffd, escape \ufffd[31m, half a pair" in text and "\x00" not in page and "\x1b" not in page
    for marked in (EVIL[3], EVIL[4]):
        cut = len(f"{marked} a") - 1200
        assert f"[{cut:,} more characters]" in text and marked[:1200] in text and marked[:1300] not in text
    assert len(page) < 500_000


def test_the_page_asks_for_nothing_and_runs_nothing(two, tmp_path):
    page, _ = made(*two, out=tmp_path / "r.html")
    for tag, attributes in elements(page)[0]:
        assert tag not in {"script", "img", "iframe", "object", "embed", "video", "audio", "form"}
        for name, value in attributes.items():
            if name in ("href", "xlink:href", "src", "srcset", "data", "action"):
                assert value.startswith(("#", "data:")), (tag, name, value)
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme: dark" in style
    assert not re.search(r"#a[12]000\d", page)  # every colour is one of the page's own


def test_without_texts_the_page_has_none(two, table, tmp_path):
    page, _ = made(two[0], "--no-texts", out=tmp_path / "r.html")
    assert "What did it get most wrong?" not in page and "Where is it weak?" in page
    for column in ("id", "prompt", "response_a", "response_b"):
        assert not any(html.escape(text) in page for text in table[column])


@undrawn
def test_an_unfinished_run_is_read_up_to_the_line_that_is_being_written(table, tmp_path):
    whole = write_run(tmp_path / "whole", table, "ba")
    running = cut_off(write_run(tmp_path / "running", table, seed=3), 17)
    page, said = made(running, out=tmp_path / "r.html")
    assert "17 of 40 steps, unfinished" in said[0] and "How good is it?" not in page
    assert "held-out probabilities" in page
    page, said = made(running, whole, out=tmp_path / "r.html")
    assert "How good is it?" in page and f"{running} in order" not in page
    begun = write_run(tmp_path / "begun", table)
    (begun / "eval.parquet").unlink()
    for content in ("", '{"event":', None):  # not a step yet, or not even a log
        (begun / "log.jsonl").unlink() if content is None else (begun / "log.jsonl").write_text(content)
        _, said = made(begun, out=tmp_path / "r.html")
        assert "0 of 40 steps, unfinished" in said[0]


@undrawn
def test_an_unfinished_run_and_a_file_of_probabilities_make_a_page(table, tmp_path):
    """Which rows were cut is known of finished runs alone, and a data file need not name languages."""
    running = cut_off(write_run(tmp_path / "running", table), 17)
    for name, rows in (("with", table), ("without", table.drop(columns="language"))):
        data, probs = write_pairs(tmp_path / f"{name}.parquet", rows), tmp_path / f"{name}.csv"
        p = 0.3 + 0.4 * rows["label"].where(rows.index % 7 > 0, 1 - rows["label"])
        pd.DataFrame({"id": rows["id"], "winner_model_a": p}).to_csv(probs)
        page, _ = made(running, "--data", data, "--probs", probs, out=tmp_path / "r.html")
        assert cells(page)[probs.name][0] == "150" and "cut at --max-length" not in page
        assert "The 20 most confident mistakes" in page and (" (English)" in page) == (name == "with")


@undrawn
def test_lines_of_the_log_that_cannot_be_read_are_left_out(table, tmp_path):
    run = write_run(tmp_path / "run", table)
    lines = (run / "log.jsonl").read_text().splitlines()
    for number, garbage in enumerate(["{}}", "[" * 10**5, "\0\0", "[1]", '{"loss": 1}', '"step"', "7"]):
        lines[2 * number] = garbage
    (run / "log.jsonl").write_text("\n".join(lines))
    assert "33 of 40 steps" in made(run, out=tmp_path / "r.html")[1][0]


@undrawn
def test_a_loss_that_only_shakes_is_called_noise_and_one_that_falls_is_not(table, tmp_path):
    run = write_run(tmp_path / "run", table)
    assert f"The training loss of {run} fell (-" in made(run, out=tmp_path / "r.html")[1][1]
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    rng = np.random.default_rng(0)
    for event in events[:-1]:
        event["loss"] = 0.69 + 0.02 * rng.normal()
    (run / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    assert "did not fall (" in made(run, out=tmp_path / "r.html")[1][1]
    (run / "eval.parquet").unlink()
    assert "has not fallen yet (" in made(run, out=tmp_path / "r.html")[1][1]


def test_of_too_few_steps_rows_or_prompts_nothing_is_claimed(table, tmp_path):
    """Four steps of forty; one held-out row; three that are all right; two hundred of one prompt."""
    running = cut_off(write_run(tmp_path / "running", table), 4)
    _, said = made(running, out=tmp_path / "r.html")
    assert "may have changed (" in said[1] and "too little to tell" in said[1]
    assert "fell" not in said[1] and "fall" not in said[1]
    right = {"p_a_ab": 0.9, "p_a_ba": 0.8, "p_a": 0.85}  # all about rows that a wins
    won = demo_pairs(600, 5, held_out=True)[lambda rows: rows["label"] == 1]
    for name, rows in (("one", won.head(1)), ("three", won.head(3)), ("prompt", won.assign(prompt="?"))):
        data = write_pairs(tmp_path / f"{name}.parquet", rows)
        run = write_run(tmp_path / name, rows, data_files=[file_record(data)])
        rows[["id", "label"]].assign(**right).to_parquet(run / "eval.parquet")
        page, said = made(run, out=tmp_path / "r.html")
        claims = [s for s in said[2:] if "ECE" in s or "agrees with" in s or "log loss" in s or "flip" in s]
        assert len(claims) == 4
        for claim in claims:
            assert "too little to tell" in claim and not re.search(r"\bnan\b|± 0\.000", claim), claim
            for certain in ("within noise", "as sure as", "does not differ", "as good as", "no place"):
                assert certain not in claim, claim
        assert not any("noise" in s for s in said[2:])  # nor of the groups
        assert "± 0.000" not in cells(page)[f"{run} in order ab"]


@undrawn
def test_a_scatter_plot_of_many_rows_says_how_many_it_shows(table, tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", table)
    found = pd.read_parquet(run / "eval.parquet")
    flip = (found["p_a_ab"] > 0.5) != (found["p_a_ba"] > 0.5)
    for most, told in ((150, False), ((~flip).sum() - 1, True)):
        monkeypatch.setattr(sections, "POINTS", most)
        _, said = made(run, out=tmp_path / "r.html")
        (sentence,) = [s for s in said if "of its verdicts flip" in s]
        assert (f"Drawn are at most {most:,} rows of a colour." in sentence) == told


@undrawn
def test_rows_that_were_cut_and_prompts_by_length_are_told_apart(table, tmp_path):
    """One token a byte, BOS and EOS: the count of bytes, by hand."""
    page, _ = made(write_run(tmp_path / "run", table, max_length=190), out=tmp_path / "r.html")
    template = "<prompt>: {prompt}\n\n<response_a>: {response_a}\n\n<response_b>: {response_b}"
    size = np.array([len(template.format(**row).encode()) + 2 for row in table.to_dict("records")])
    assert 20 < (size > 190).sum() < 130 and (size == 190).any()
    assert cells(page)["cut at --max-length"][0] == str((size > 190).sum())
    assert cells(page)["not cut"][0] == str((size <= 190).sum())
    sizes = [int(rows) for name, (rows, *_) in cells(page).items() if name.startswith("prompt ")]
    assert sum(sizes) == 150


@undrawn
def test_probabilities_of_infer_are_joined_by_id_and_become_what_the_page_is_about(two, table, tmp_path):
    rng = np.random.default_rng(4)
    p = np.clip(table["label"] * 0.6 + rng.random(150) * 0.4, 0.01, 0.99)
    probs = pd.DataFrame({"id": table["id"], "winner_model_a": p, "winner_model_b": 1 - p})
    probs.sample(frac=1, random_state=1).to_csv(tmp_path / "probs.csv", index=False)
    page, said = made(*two, "--probs", tmp_path / "probs.csv", out=tmp_path / "r.html")
    assert cells(page)["probs.csv"][2].startswith(f"{log_loss(table['label'], p):.3f} ± ")
    assert any(sentence.startswith("probs.csv agrees with the generated labels") for sentence in said)
    other = demo_pairs(90, 8)  # rows that no run has seen
    data = write_pairs(tmp_path / "other.csv", other)
    pd.DataFrame({"id": other["id"], "winner_model_a": 0.5 + 0.3 * other["label"]}).to_csv(tmp_path / "o.csv")
    page, _ = made(two[0], "--probs", tmp_path / "o.csv", "--data", data, out=tmp_path / "r.html")
    assert cells(page)["o.csv"][0] == "90"


@undrawn
def test_texts_of_a_file_that_changed_are_not_shown_unless_given_and_labels_must_agree(evil, tmp_path):
    run, table, _ = evil
    data = write_pairs(tmp_path / "rows.jsonl", table.iloc[5:])
    record = {"data_files": [file_record(data)]}
    run = write_run(tmp_path / "run", table.iloc[5:], **record)
    moved = str(tmp_path / "moved.jsonl")
    mirrored = table.iloc[5:].assign(label=1 - table["label"])
    for change, shown in (("same", True), ("changed", False), ("gone", False)):
        if change == "changed":
            write_pairs(data, mirrored)
        if change == "gone":
            Path(data).rename(moved)
        page, said = made(run, out=tmp_path / "r.html")
        assert ("Where is it weak?" in page) == shown
        assert ("held-out rows are not known" in said[0]) == (not shown)
        assert {"same": "", "changed": "was changed since the training", "gone": "No such file"}[
            change
        ] in said[0]
    page, _ = made(run, "--data", moved, out=tmp_path / "r.html")  # of these the labels are others
    assert "Where is it weak?" not in page
    write_pairs(moved, table.iloc[5:])
    assert "Where is it weak?" in made(run, "--data", moved, out=tmp_path / "r.html")[0]
    renamed = pd.read_json(moved, lines=True, dtype=False).rename(columns={"prompt": "q", "winner": "vote"})
    renamed.replace({"vote": {"model_a": "1", "model_b": "0"}}).to_json(moved, orient="records", lines=True)
    typed = ["--columns", "prompt=q", "winner=vote", "--winner-words", "a=1", "b=0"]
    assert "Where is it weak?" in made(run, "--data", moved, *typed, out=tmp_path / "r.html")[0]


def test_ties_soft_labels_and_certainty_are_taken(table, tmp_path):
    soft = table.assign(label=np.linspace(0, 1, 150).round(2))
    run = write_run(tmp_path / "run", soft, "both")
    found = pd.read_parquet(run / "eval.parquet")
    found.loc[:9, ["p_a_ab", "p_a_ba", "p_a"]] = 1.0
    found.loc[10:19, ["p_a_ab", "p_a_ba", "p_a"]] = 0.0
    found.to_parquet(run / "eval.parquet", index=False)
    page, _ = made(run, out=tmp_path / "r.html")
    loss = metrics.cross_entropy(soft["label"].to_numpy(), found["p_a"].to_numpy()).mean()
    assert cells(page)[f"{run} in both orders"][2].startswith(f"{loss:.3f}")


@pytest.mark.parametrize("rows", [1, 2, 30])
def test_few_rows_and_rows_of_one_prompt_make_a_page(rows, tmp_path):
    table = demo_pairs(rows, 5, held_out=True)
    made(write_run(tmp_path / "run", table, steps=1), out=tmp_path / "r.html")
    data = write_pairs(
        tmp_path / "same.csv", table.assign(prompt="the same", response_a="as long", response_b="as lOng")
    )
    made(write_run(tmp_path / "same", table, data_files=[file_record(data)]), out=tmp_path / "r.html")


def test_what_cannot_be_read_is_one_line_that_names_it(two, table, tmp_path, capsys):
    damaged = write_run(tmp_path / "damaged", table)
    (damaged / "eval.parquet").write_bytes(b"PAR1")
    (tmp_path / "none").mkdir()
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    (tmp_path / "header.csv").write_text("id,winner_model_a\n")
    pd.DataFrame({"id": ["x"], "winner_model_a": [0.5]}).to_csv(tmp_path / "strange.csv")
    for words, named in (
        ([tmp_path / "none"], "none: no run of train.py: there is no train_config.json"),
        ([damaged], "damaged: not what train.py writes"),
        ([two[0], "--probs", tmp_path / "other.csv"], "other.csv: needs columns id, winner_model_a"),
        ([two[0], "--probs", tmp_path / "strange.csv"], "no probabilities of rows with a known label"),
        ([two[0], "--probs", tmp_path / "no.csv"], "no.csv: no such file"),
        ([two[0], "--probs", tmp_path / "header.csv"], "header.csv: no rows"),
    ):
        with pytest.raises(ValueError, match=named) as caught:
            report.main([*map(str, words), "--out", str(tmp_path / "r.html")])
        assert "\n" not in str(caught.value) and "Errno" not in str(caught.value)
    with pytest.raises(ValueError, match="no such folder"):
        report.main([str(two[0]), "--out", str(tmp_path / "no" / "r.html")])
    with pytest.raises(ValueError, match=r"log.jsonl: must end in .html"):
        report.main([str(two[0]), "--out", str(two[0] / "log.jsonl")])
    for words, named in (
        ([], "arguments are required: NAME"),
        (["x", "--prob", "y"], "did you mean --probs"),
    ):
        with pytest.raises(SystemExit):
            report.main(words)
        assert named in capsys.readouterr().err


@undrawn
def test_as_a_module_it_says_where_the_page_is_and_calls_itself_by_its_name(
    two, tmp_path, monkeypatch, capsys
):
    for name in ("minarena.report", "minarena.report.__main__"):  # else runpy warns
        monkeypatch.delitem(sys.modules, name, raising=False)

    def typed(*words) -> None:
        for name in ("minarena.report", "minarena.report.__main__"):
            sys.modules.pop(name, None)
        monkeypatch.setattr(sys, "argv", ["-m", *map(str, words), "--out", f"{tmp_path}/r.html"])
        runpy.run_module("minarena.report", run_name="__main__", alter_sys=True)

    with pytest.raises(SystemExit) as stopped:
        typed(tmp_path)
    assert (
        stopped.value.code
        == f"minarena.report: {tmp_path}: no run of train.py: there is no train_config.json"
    )
    with pytest.raises(SystemExit):
        typed()
    assert capsys.readouterr().err.startswith("minarena.report: ")
    typed(*two)
    said = capsys.readouterr()
    assert said.err == f"2 runs, 2 finished -> {tmp_path}/r.html: open it in a browser\n"
    assert json.loads(said.out.splitlines()[-1])["out"] == f"{tmp_path}/r.html"


@undrawn
def test_the_demos_own_runs_make_the_page_that_the_readme_shows(demo, tmp_path, monkeypatch):
    folder, said = demo
    monkeypatch.chdir(folder)
    page, _ = made("runs/ab", "runs/ba", "--probs", "probs.csv", out=tmp_path / "r.html")
    found = cells(page)
    for name, result in (("runs/ba in order ba", said["ba"][0]["eval"]), ("probs.csv", said["infer"][0])):
        expected = tuple(f"{result[k]:.3f} ± {result[k + '_se']:.3f}" for k in ("accuracy", "log_loss"))
        assert found[name] == ("600", *expected)  # the standard errors, too, are over prompts in both
    assert found["ensemble"] == found["probs.csv"]
    for order, run in zip(
        ("ab", "ba"), facts(page), strict=True
    ):  # evaluations and checkpoints are not steps
        stated, whole = int(run["time"].split()[0]), said[order][0]["seconds"]
        assert round(0.3 * whole) <= stated <= round(whole)
        assert f" s in {said[order][0]['steps']} steps; " in run["time"]


@pytest.fixture
def people(tmp_path) -> tuple[pd.DataFrame, str]:
    """(150 rows, their file): labels of people, not generated ones."""
    table = demo_pairs(150, 11).assign(id=[f"row {i}" for i in range(150)])
    return table, write_pairs(tmp_path / "people.parquet", table)


def predicting(run: Path, p_ab, p_ba) -> Path:
    """The run with other probabilities."""
    found = pd.read_parquet(run / "eval.parquet").assign(p_a_ab=p_ab, p_a_ba=p_ba, p_a=(p_ab + p_ba) / 2)
    found.to_parquet(run / "eval.parquet", index=False)
    return run


def plus(value: float, error: float) -> str:
    return f"{value:.3f} ± {error:.3f}"


@undrawn
def test_the_page_begins_with_an_answer_and_five_figures_of_the_best_judge(two, table, tmp_path):
    page, _ = made(*two, out=tmp_path / "r.html")
    label, prompt = table["label"].to_numpy(), table["prompt"].to_numpy()
    ab, ba = (pd.read_parquet(run / "eval.parquet") for run in two)
    p = {f"{run} in order {order}": each[f"p_a_{order}"] for run, each in zip(two, (ab, ba), strict=True)
         for order in ("ab", "ba")}  # fmt: skip
    p |= {f"{run} in both orders": each["p_a"] for run, each in zip(two, (ab, ba), strict=True)}
    p["ensemble"] = (ab["p_a_ab"] + ba["p_a_ba"]) / 2
    losses = {name: log_loss(label, each) for name, each in p.items()}
    best = min(losses, key=losses.get)
    assert (
        f"The judge is {best}: of 7 judges of the same rows it has the lowest log loss, which flatters"
        in html.unescape(page)
    )
    assert answer(page) == "Yes: the judge knows something that position and length alone cannot tell."
    right = ((p[best] > 0.5) == label).to_numpy().astype(float)
    figures = cards(page)
    assert list(figures) == ["Accuracy", "Log loss", "Over “longer wins”", "Flips", "Calibration"]
    error = metrics.standard_error(right, prompt)
    assert figures["Accuracy"][0] == plus(right.mean(), error)
    assert f"more often than a coin (+{plus(right.mean() - 0.5, error)})" in figures["Accuracy"][1]
    assert figures["Accuracy"][1].endswith("it agrees with the generated labels.")
    error = metrics.standard_error(metrics.cross_entropy(label, p[best].to_numpy()), prompt)
    assert figures["Log loss"][0] == plus(losses[best], error)
    assert f"better than no skill, 0.693 nats ({losses[best] - np.log(2):+.3f} ± " in figures["Log loss"][1]
    size_a, size_b = table["response_a"].str.len(), table["response_b"].str.len()
    rule = np.where(size_a == size_b, 0.5, (size_a > size_b) == label).astype(float)
    gap = plus((right - rule).mean(), metrics.standard_error(right - rule, prompt))
    assert figures["Over “longer wins”"][0] == f"+{gap}"
    assert (
        f"does better than (+{gap}) the rule that the longer answer wins, which is right {rule.mean():.3f}"
        in (figures["Over “longer wins”"][1])
    )
    singles = {str(run): (each["p_a_ab"], each["p_a_ba"]) for run, each in zip(two, (ab, ba), strict=True)}
    singles["ensemble"] = p["ensemble"], (ab["p_a_ba"] + ba["p_a_ab"]) / 2
    first, second = singles[best.partition(" in ")[0]]
    flips = ((first > 0.5) != (second > 0.5)).to_numpy().astype(float)
    assert figures["Flips"][0] == plus(flips.mean(), metrics.standard_error(flips, prompt))
    which = np.minimum((p[best] * 10).astype(int), 9)
    ece = sum(abs((p[best] - label)[which == i].sum()) for i in range(10)) / 150
    assert figures["Calibration"][0].startswith(f"{ece:.3f} ± ") and "confident" in figures["Calibration"][1]


@undrawn
@pytest.mark.parametrize(
    "p, said",
    [
        (lambda label, rng: 0.2 + 0.6 * rng.random(150), "No"),  # sure of what it does not know
        (lambda label, rng: 0.49 + 0.02 * rng.random(150), "Not shown"),
        (lambda label, rng: 0.3 + 0.4 * label, "Yes"),
    ],
)
def test_a_judge_that_knows_nothing_is_not_said_to_have_learnt(p, said, table, tmp_path):
    p = p(table["label"].to_numpy(), np.random.default_rng(0))
    page, _ = made(predicting(write_run(tmp_path / "run", table), p, p), out=tmp_path / "r.html")
    assert answer(page).startswith(f"{said}: ")


@undrawn
def test_before_the_end_nothing_is_known_and_without_texts_lengths_are_not(table, people, tmp_path):
    page, _ = made(cut_off(write_run(tmp_path / "begun", table), 30), out=tmp_path / "r.html")
    assert answer(page) == "Not known yet: no run has ended." and not cards(page)
    rows, data = people
    run = write_run(tmp_path / "run", rows, data_files=[file_record(data)])
    assert "position and length" in answer(made(run, out=tmp_path / "r.html")[0])
    Path(data).unlink()
    page, _ = made(run, out=tmp_path / "r.html")
    assert answer(page) == "Yes: the judge knows something that position alone cannot tell."
    assert cards(page)["Over “longer wins”"] == ("unknown", "The texts are not known (--data FILE).")
    assert "The lengths of the answers are not known" in page


def test_of_too_few_prompts_the_page_begins_with_no_claim(tmp_path):
    page, _ = made(write_run(tmp_path / "run", demo_pairs(15, 5, held_out=True)), out=tmp_path / "r.html")
    assert answer(page).startswith("Too little to tell: there are too few held-out prompts")
    for title, (_, said) in cards(page).items():
        assert "too little to tell" in said or title == "Over “longer wins”"


@undrawn
def test_people_are_named_only_where_people_gave_the_labels(two, people, tmp_path):
    page, _ = made(two[0], out=tmp_path / "r.html")
    assert "people" not in page.replace("generated, not of people", "") and "generated label: " in page
    rows, data = people
    run = write_run(tmp_path / "run", rows, data_files=[file_record(data)])
    page, said = made(run, out=tmp_path / "r.html")
    assert "generated" not in page and "; people: " in page
    assert any("agrees with people on" in sentence for sentence in said)


def facts(page: str) -> list[dict[str, str]]:
    """name -> value, of each run at the beginning"""
    lists = re.findall(r"<li>.*?<dl>(.*?)</dl></li>", page)
    return [
        {name: html.unescape(value) for name, value in re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", each)}
        for each in lists
    ]


@undrawn
def test_where_figures_come_from_is_said_and_what_is_not_recorded_is_called_so(people, tmp_path):
    rows, data = people
    known = {
        "date": "2026-11-25T10:00:00", "command": "train.py --data x", "device_name": "NVIDIA H100",
        "device": "cuda", "world_size": 2, "dtype": "bf16", "path": "fast", "commit": "0123456789abcdef+",
        "versions": {"torch": "2.13.0", "transformers": "5.23.0", "numpy": "2"}, "model": "tiny",
        "data_files": [file_record(data)],
    }  # fmt: skip
    whole = write_run(tmp_path / "whole", rows, **known)
    times = enumerate([(600.25, 5), (400, 7000), (None, None), (234.25, 9000)])
    steps = [
        {"event": "step", "step": i, "seconds": seconds, "tokens_per_second": speed}
        for i, (seconds, speed) in times
    ]
    with open(whole / "log.jsonl", "a") as log:
        log.writelines(json.dumps(each) + "\n" for each in steps)
    bare = write_run(tmp_path / "bare", rows, limit=5, swap=True, data=["a.csv", "b.csv"])
    found, nothing = facts(made(whole, bare, out=tmp_path / "r.html")[0])
    assert found == {
        "date": "2026-11-25T10:00:00",
        "command": "train.py --data x",
        "data": f"{data} ({Path(data).stat().st_size:,} bytes)",
        "labels": "from the files; 150 held-out rows",
        "base": "tiny",
        "device": "2 × NVIDIA H100, bf16 fast path",
        "time": "1,234 s in 3 steps; 7,000 tokens/s in the median step",
        "commit": "0123456789ab, with changes that are not committed",
        "versions": "torch 2.13.0, transformers 5.23.0",
    }
    assert [name for name, value in nothing.items() if value.startswith("not recorded")] == [
        "date", "command", "time", "commit", "versions",
    ]  # fmt: skip
    typed = "--data a.csv b.csv --limit 5 --max-length 120 --lr 0.005 --seed 5"
    assert nothing["command"] == f"not recorded; options beside the defaults: {typed}"
    assert nothing["device"] == "device (its name is not recorded)"
    assert nothing["labels"] == "generated, not of people; 150 held-out rows"


def test_the_order_that_a_run_was_trained_in_is_marked_in_the_table_and_in_the_figures(table, tmp_path):
    runs = [write_run(tmp_path / order, table, order) for order in ("ab", "ba", "both")]
    page, said = made(*runs, out=tmp_path / "r.html")
    marked = re.findall(r'<tr class="bold"><td>(.*?) \(trained\)</td>', page)
    expected = [f"{runs[0]} in order ab", f"{runs[1]} in order ba", f"{runs[2]} in both orders"]
    assert marked == expected and page.count("(trained)") == 3
    bold = re.findall(r'<text style="font-weight: 700[^"]*"[^>]*>(.*?)</text>', page)
    assert len(bold) == 6 and "".join(bold).count("both orders") == 2  # in two figures
    assert any(
        "Names in bold are runs in the order that they were trained in." in sentence for sentence in said
    )


@undrawn
def test_two_predictors_are_compared_row_by_row(two, table, tmp_path):
    """Both find the same rows hard: not paired, their difference would be within noise."""
    label, rng = table["label"].to_numpy(), np.random.default_rng(3)
    hard = 1.5 * rng.normal(size=150)
    better, worse = (1 / (1 + np.exp(-(2 * label - 1) * (0.8 + hard + shift))) for shift in (0.1, 0.0))
    runs = [write_run(tmp_path / name, table) for name in ("better", "worse")]
    for run, p in zip(runs, (better, worse), strict=True):
        predicting(run, p, p)
    _, said = made(*runs, out=tmp_path / "r.html")
    gap = metrics.cross_entropy(label, better) - metrics.cross_entropy(label, worse)
    prompt = table["prompt"].to_numpy()
    paired = metrics.standard_error(gap, prompt)
    each = [metrics.standard_error(metrics.cross_entropy(label, p), prompt) for p in (better, worse)]
    assert abs(gap.mean()) > 3 * paired and abs(gap.mean()) < np.hypot(*each)
    (sentence,) = [s for s in said if s.startswith("The log loss of")]
    found = f"{runs[1]} in order ab ({gap.mean():+.3f} ± {paired:.3f})"
    assert found in sentence.partition("It is better than ")[2]


@undrawn
def test_only_judges_of_the_same_rows_are_called_rivals(table, tmp_path):
    """The first run has the lower log loss, on rows that the second one never saw."""
    knows = 0.1 + 0.8 * table["label"].head(70)
    first = predicting(write_run(tmp_path / "first", table.head(70)), knows, knows)
    second = write_run(tmp_path / "second", table.tail(80))
    page, _ = made(first, second, out=tmp_path / "r.html")
    assert f"The judge is {second} in " in page and ": of 3 judges of the same rows it has" in page
    probs = tmp_path / "probs.csv"  # no run has exactly these rows
    pd.DataFrame({"id": table["id"].head(75), "winner_model_a": 0.6}).to_csv(probs)
    page, _ = made(first, second, "--probs", probs, out=tmp_path / "r.html")
    assert "The judge is probs.csv. Its log loss on 75 held-out rows is" in page


@undrawn
def test_files_of_probabilities_with_the_same_name_are_told_apart(two, table, tmp_path):
    paths = [tmp_path / folder / "probs.csv" for folder in ("one", "other")]
    losses = []
    for share, path in zip((0.5, 0.7), paths, strict=True):
        path.parent.mkdir()
        p = 0.25 + 0.5 * (share * table["label"] + (1 - share) * np.random.default_rng(1).random(150))
        pd.DataFrame({"id": table["id"], "winner_model_a": p}).to_csv(path, index=False)
        losses.append(log_loss(table["label"], p))
    page, _ = made(*two, "--probs", *paths, out=tmp_path / "r.html")
    for path, loss in zip(paths, losses, strict=True):
        assert cells(page)[str(path)][2].startswith(f"{loss:.3f} ± ")
    assert "probs.csv" not in cells(page)


def test_answers_of_nearly_equal_lengths_make_groups_that_do_not_replace_one_another(tmp_path):
    """Ratios of 1.000 to 1.020: with one decimal four groups had one name, and the last stood for all."""
    table = demo_pairs(400, 11).assign(id=[f"row {i}" for i in range(400)])
    table = table.assign(response_a="a" * 5000, response_b=["b" * (5000 + i // 4) for i in range(400)])
    run = write_run(
        tmp_path / "run", table, data_files=[file_record(write_pairs(tmp_path / "d.parquet", table))]
    )
    page, said = made(run, out=tmp_path / "r.html")
    (sentence,) = [s for s in said if "times as long" in s]
    assert "no two groups" not in sentence and "the noise of 4 groups" in sentence
    ticks = re.findall(r">(1\.\d+ to 1\.\d+ times as long)</text>", page)
    assert len(ticks) == len(set(ticks)) == 4


def test_a_run_or_a_file_that_is_given_twice_is_refused(two, tmp_path):
    probs = tmp_path / "p.csv"
    probs.write_text("id,winner_model_a\n")
    for words, named in (
        ([two[0], two[1], f"{two[0]}/"], two[0]),
        ([two[0], "--probs", probs, tmp_path / "." / "x" / ".." / "p.csv"], probs),
    ):
        with pytest.raises(ValueError, match=f"{named} and .*: one and the same: give it once"):
            report.main([*map(str, words), "--out", str(tmp_path / "r.html")])


@undrawn
def test_what_a_terminal_shows_of_a_name_cannot_move_its_cursor(table, tmp_path, capsys, monkeypatch):
    name = "turn\x1b[2Jed\u202e"
    run = write_run(tmp_path / name, table)
    made(run, out=tmp_path / f"{name}.html")
    monkeypatch.setattr(
        sys, "argv", ["minarena.report", str(tmp_path / f"{name}x"), "--out", f"{tmp_path}/r.html"]
    )
    with pytest.raises(SystemExit) as stopped:
        console.run_command(report.main)
    for said in (capsys.readouterr().err, str(stopped.value.code)):
        assert "turn?[2Jed?" in said and "\x1b" not in said and "\u202e" not in said


@undrawn
def test_an_evaluation_that_lacks_the_order_trained_is_no_error(table, tmp_path):
    run = write_run(tmp_path / "run", table)
    with open(run / "log.jsonl", "a") as log:
        log.write('{"event": "eval", "step": 41, "ba": {}}\n{"event": "eval", "step": 42, "ab": {}}\n')
    assert "came to 0.500" in made(run, out=tmp_path / "r.html")[1][1]


@pytest.fixture
def chromium():
    """Chromium by its own driver, with what it logs and asks for; nothing is downloaded."""
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    quiet = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    for word in f"{quiet} disable-component-update disable-sync".split():
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield browser
    browser.quit()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser_nothing_overflows_nothing_is_asked_for_and_nothing_goes_wrong(
    chromium, evil, two, scheme, tmp_path
):
    made(evil[0], *two, out=tmp_path / "r.html")
    where = (tmp_path / "r.html").as_uri()
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    for width in (360, 768, 1280):
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width == 360}
        chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        chromium.get(where)
        chromium.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
        sizes = chromium.execute_script("return [innerWidth, document.documentElement.scrollWidth]")
        assert sizes[0] == width and sizes[1] <= width
        boxes = "[...document.querySelectorAll('{}')].map(e => e.getBoundingClientRect())"
        wide = boxes.format("body *") + ".filter(r => r.right > innerWidth + 1 || r.left < -1)"
        assert chromium.execute_script(f"return {wide}") == []
        smallest = f"Math.min(...{boxes.format('svg text')}.map(r => Math.max(r.width, r.height)))"
        assert chromium.execute_script(f"return {smallest}") > 8  # pixels
        assert chromium.execute_script("return document.querySelectorAll('script, img, iframe').length") == 0
    background = chromium.execute_script("return getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", background)[:3])) / 3
    assert brightness > 240 if scheme == "light" else brightness < 40
    assert chromium.get_log("browser") == []
    asked = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]
    asked = {m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"}
    assert {url for url in asked if not url.startswith("data:")} == {where}

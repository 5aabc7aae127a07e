"""What the report computes of held-out rows, before it is drawn or put into words.

    beyond_position_and_length(rows).gain      log loss less the log loss of position and length alone
    quantiles(values, rows, 4, "{} to {}")     [("1.0 to 1.3", the rows), ...]

Compared with: scikit-learn, NumPy, loops over rows, and judges made to know one thing only.
"""

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, log_loss

from minarena import metrics
from minarena.data import JUDGED_BY
from minarena.report import figures, groups
from minarena.report.predictors import Predictor, best_of, ensemble_of, judged, read_probs
from minarena.report.runs import GENERATED, PEOPLE, Run, join_data_
from minarena.report.words import side


def rows_of(n: int = 400, seed: int = 0, slope: float = 0.0, knows: float = 0.0, leans: float = 0.0):
    """Rows whose label follows log2(length of a / length of b) times `slope`, and what is hidden. The
    judge's logit is `knows` times the hidden and `leans` times that logarithm."""
    rng = np.random.default_rng(seed)
    sizes, hidden = rng.integers(5, 200, (2, n)), rng.normal(size=n)
    ratio = np.log2((sizes[0] + 1) / (sizes[1] + 1))
    label = (rng.random(n) < 1 / (1 + np.exp(-slope * ratio - 2 * hidden))).astype(float)
    texts = {f"response_{x}": [x * size for size in sizes[i]] for i, x in enumerate("ab")}
    table = {"prompt": [f"prompt {i}" for i in range(n)], "label": label, **texts}
    rows = pd.DataFrame(table, index=[f"row {i}" for i in range(n)])
    rows = rows.assign(group=rows["prompt"], labeller=PEOPLE, cut=False, language=None)
    return judged(rows, pd.Series(1 / (1 + np.exp(-knows * hidden - leans * ratio)), rows.index))


@pytest.mark.parametrize(
    "slope, knows, leans, expected",
    [
        (0, 2, 0, "less"),  # knows what decides
        (2, 2, 2, "less"),  # and the length
        (3, 0, 3, "neither"),  # the length alone, at most as well as the regression
        (0, 0, 0, "neither"),  # one half for every row
        (0, 0, 3, "more"),  # leans on a length that decides nothing
    ],
)
def test_only_a_judge_that_knows_more_than_position_and_length_is_said_to(slope, knows, leans, expected):
    rows = rows_of(slope=slope, knows=knows, leans=leans)
    found = figures.beyond_position_and_length(rows)
    assert side(found.gain) == expected and found.lengths and found.rows == 400
    x = np.log2((rows["response_a"].str.len() + 1) / (rows["response_b"].str.len() + 1)).to_numpy()[:, None]
    simple = LogisticRegression(C=1e6).fit(x, rows["label"]).predict_proba(x)[:, 1]
    assert found.simple.value == pytest.approx(log_loss(rows["label"], simple), abs=1e-4)
    assert found.loss.value == pytest.approx(log_loss(rows["label"], rows["p"]))
    each = metrics.cross_entropy(rows["label"].to_numpy(), simple)
    paired = metrics.standard_error(rows["loss"].to_numpy() - each, rows["group"].to_numpy())
    assert found.gain.error == pytest.approx(paired, abs=1e-4)


def test_a_judge_of_the_position_alone_knows_nothing_beyond_it():
    """a wins in seven rows of ten; the judge says 0.7 to every row."""
    rows = rows_of().assign(label=(np.arange(400) % 10 < 7).astype(float))
    found = figures.beyond_position_and_length(judged(rows, pd.Series(0.7, rows.index)))
    assert side(found.gain) != "less"
    assert (
        side(figures.difference(judged(rows, pd.Series(0.7, rows.index))["loss"] - np.log(2), rows)) == "less"
    )


def test_without_texts_the_position_alone_is_compared_with():
    rows = rows_of(knows=2)
    texts = dict.fromkeys(("prompt", "response_a", "response_b"))
    found = figures.beyond_position_and_length(rows.assign(**texts))
    share = rows["label"].mean()
    assert not found.lengths and found.simple.value == pytest.approx(
        log_loss(rows["label"], np.full(400, share)), abs=1e-6
    )


def test_the_rule_that_the_longer_answer_wins_row_by_row():
    rows = rows_of(60)
    rows.iloc[0, rows.columns.get_loc("response_a")] = rows.iloc[0]["response_b"]
    rows.iloc[1, rows.columns.get_loc("right")] = np.nan  # a tie
    rows.iloc[2, rows.columns.get_loc("response_a")] = None
    found = figures.longer_rule(rows)
    assert found.iloc[0] == 0.5 and np.isnan(found.iloc[1]) and np.isnan(found.iloc[2])
    for _, row in rows.iloc[3:].iterrows():
        a_longer = len(row["response_a"]) > len(row["response_b"])
        equal = len(row["response_a"]) == len(row["response_b"])
        assert found[row.name] == (0.5 if equal else float(a_longer == (row["label"] == 1)))


def test_calibration_is_told_by_bin_and_as_one_figure():
    rows = rows_of(knows=4)  # twice as sure as it should be
    found = figures.calibration(rows)
    assert sum(share for *_, share in found.bins) == pytest.approx(1)
    for mean_p, label, share in found.bins:
        some = rows[(rows["p"] > np.ceil(mean_p * 10) / 10 - 0.1) & (rows["p"] <= np.ceil(mean_p * 10) / 10)]
        assert (len(some) / 400, some["label"].mean()) == (pytest.approx(share), pytest.approx(label.value))
    right = (rows["p"] > 0.5) == (rows["label"] == 1)
    confidence = np.maximum(rows["p"], 1 - rows["p"])
    assert found.sure == pytest.approx(confidence.mean())
    assert found.over.value == pytest.approx((confidence - right).mean()) and side(found.over) == "more"
    assert found.brier.value == pytest.approx(brier_score_loss(rows["label"], rows["p"]))
    drawn = [(np.random.default_rng(i).random(400) < rows["p"]).astype(float) for i in range(100)]
    by_chance = [figures.calibration(rows.assign(label=label)).ece.value for label in drawn[:20]]
    assert found.chance == pytest.approx(np.mean(by_chance), abs=4 * np.std(by_chance) / np.sqrt(20))


def test_quantiles_keep_equal_values_together_and_no_two_have_the_same_name():
    """A quarter of the ratios differ in the fourth decimal only: printed with one, four names are one."""
    rows = rows_of(80)
    values = pd.Series(np.repeat([1.00011, 1.00021, 1.00031, 1.00041], 20), rows.index)
    found = figures.quantiles(values, rows, 4, "{} to {} times as long")
    names = [name for name, _ in found]
    assert len(set(names)) == len(found) == 4 and sum(len(part) for _, part in found) == 80
    assert names[0] == "1.0001 to 1.0001 times as long"
    same = figures.quantiles(pd.Series(1.0, rows.index), rows, 4, "{} to {}")
    assert [(name, len(part)) for name, part in same] == [("1 to 1", 80)]
    dense = figures.quantiles(pd.Series(np.linspace(1, 2, 80), rows.index), rows, 4, "{} to {}")
    assert [name for name, _ in dense] == ["1.0 to 1.2", "1.3 to 1.5", "1.5 to 1.7", "1.8 to 2.0"]
    whole = figures.quantiles(pd.Series(np.arange(80) * 100, rows.index), rows, 4, "{} to {}")
    assert [name for name, _ in whole] == ["0 to 1,900", "2,000 to 3,900", "4,000 to 5,900", "6,000 to 7,900"]


def test_groups_of_any_known_column_are_shown_from_twenty_rows_on_and_none_replaces_another():
    rows = rows_of(200, knows=2)
    subset = np.array(["chat", "code", 7, "7", "few", None], object)[
        np.repeat(range(6), [50, 50, 30, 25, 19, 26])
    ]
    rows["subset"] = rows["source"] = subset
    page = groups.weak(Predictor("it", rows))
    for value, start, end in (("chat", 0, 50), ("code", 50, 100), ("7", 100, 155)):
        accuracy = ((rows["p"] > 0.5) == (rows["label"] == 1))[start:end].mean()
        for column in ("subset", "source"):
            assert f"<td>{column} {value}</td><td>{end - start}</td><td>{accuracy:.3f} ± " in page
    assert "subset few" not in page and page.count("1 groups of fewer than 20 rows are left out") == 2
    each = [
        ((rows["p"] > 0.5) == (rows["label"] == 1))[a:b].mean() for a, b in ((0, 50), (50, 100), (100, 155))
    ]
    assert page.count(f"The mean over the 3 groups is {np.mean(each):.3f}") == 2


def test_many_groups_are_drawn_as_the_lowest_thirty():
    rows = rows_of(1000, knows=2).assign(category=np.repeat([f"kind {i:02}" for i in range(50)], 20))
    (ax, said), *_ = [groups.by_group(groups.groups_of(rows, "category"), benchmark=True)]
    assert len(ax.get_yticks()) == 30 and "Drawn are the 30 lowest" in said and "the 50 groups" in said
    accuracy = rows.groupby("category")["right"].mean()
    assert said.startswith("The lowest is category kind") and f", {accuracy.min():.3f}" in said
    drawn = {tick.get_text().removeprefix("category ") for tick in ax.get_yticklabels()}
    assert accuracy[list(drawn)].max() <= accuracy.drop(drawn).min()


def run_of(order: str, seed: int, table: pd.DataFrame) -> Run:
    p_ab, p_ba = np.random.default_rng(seed).random((2, len(table)))
    rows = table[["label", "prompt", "group", "labeller"]].assign(
        p_a_ab=p_ab, p_a_ba=p_ba, p_a=(p_ab + p_ba) / 2
    )
    trained = JUDGED_BY[order]
    orders = [each for each in ("ab", "ba", "mean") if each != trained] + [trained]
    return Run(order, {"order": order, "data_files": []}, [], rows, "", orders)


def test_an_ensemble_judges_each_run_in_its_own_order_and_flips_all_of_them():
    table = rows_of(50)
    ab, ba, both = (run_of(order, seed, table) for seed, order in enumerate(("ab", "ba", "both")))
    rows = ensemble_of([ab, ba, both]).rows
    own = (ab.rows["p_a_ab"] + ba.rows["p_a_ba"] + both.rows["p_a"]) / 3
    np.testing.assert_allclose(rows["p"], own)
    np.testing.assert_allclose(
        rows["p_ab"], (ab.rows["p_a_ab"] + ba.rows["p_a_ba"] + both.rows["p_a_ab"]) / 3
    )
    np.testing.assert_allclose(
        rows["p_ba"], (ab.rows["p_a_ba"] + ba.rows["p_a_ab"] + both.rows["p_a_ba"]) / 3
    )


def test_the_best_has_the_lowest_log_loss_of_those_that_judge_the_same_rows():
    good, bad, other = rows_of(knows=2), rows_of(knows=0.2), rows_of(100, knows=2)
    names = [
        Predictor("good", good),
        Predictor("bad", bad),
        Predictor("mixed", bad.sample(frac=1, random_state=0)),
    ]
    assert best_of(names).name == "good"
    assert best_of([*names, Predictor("of other rows", other)]).name == "of other rows"


def test_who_labelled_the_rows_is_said_in_the_plural_or_left_open():
    rows = rows_of(10)
    assert Predictor("", rows).labeller == "people"
    assert Predictor("", rows.assign(labeller=GENERATED)).labeller == "the generated labels"
    rows.iloc[0, rows.columns.get_loc("labeller")] = GENERATED
    assert Predictor("", rows).labeller == "the labels"


def test_columns_that_name_groups_are_joined_by_id_from_the_data(tmp_path):
    table = rows_of(30)
    run = run_of("ab", 0, table)
    run.record |= {"seed": 3}
    run.rows = run.rows[["label", "p_a_ab", "p_a_ba", "p_a"]].rename_axis("id")
    data = table[["prompt", "response_a", "response_b", "label"]].assign(subset=[f"s{i}" for i in range(30)])
    join_data_(run, [data.sample(frac=1, random_state=0)])
    assert run.rows["subset"].tolist() == [f"s{i}" for i in range(30)] and "source" not in run.rows


def test_a_file_of_probabilities_is_joined_by_id_and_what_is_no_probability_is_left_out(tmp_path):
    table = rows_of(30)
    written = pd.DataFrame({"id": table.index, "winner_model_a": 0.25})
    written.loc[:4, "winner_model_a"] = [2.0, -1, np.nan, 1.0, 0.0]
    written.sample(frac=1, random_state=0).to_csv(tmp_path / "p.csv", index=False)
    rows = read_probs(str(tmp_path / "p.csv"), [table.drop(columns=["p", "right", "loss"])])
    assert rows.index.tolist() == [f"row {i}" for i in range(3, 30)]
    assert rows["p"].tolist() == [1.0, 0.0] + [0.25] * 25

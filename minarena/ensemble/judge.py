"""A judge from Python: which of two answers a person prefers, by adapters over one base that is loaded once.

    judge = load_judge("runs/ab", "runs/ba")       tta="all", weights=[3, 1], model="base": infer.py's options
    judge("Why is the sky blue?", a, b)            P(a is preferred), a float; of three lists an array
    judge.best("Why is the sky blue?", answers)    [(answer, mean P(it wins)), ...], the best first

A prompt or an answer is a text, or a list of messages, which is written as the readers of files write it. A
line on stderr says what was cut. infer.py loads and predicts by the same functions (predict.py): the numbers
are equal up to rounding. What it does not do: save a long list in parts, as infer.py does.
"""

from dataclasses import dataclass

import numpy as np

from minarena.config import SEED, InferConfig, options_of
from minarena.dist import SINGLE_PROCESS
from minarena.ensemble.adapters import Ensemble, check_base, find_ensemble_
from minarena.ensemble.predict import Predictor, load_predictor, predict_pairs, say_cut
from minarena.files.layouts import table_of_lists
from minarena.files.outliers import GUARD_ROWS
from minarena.files.repair import repaired
from minarena.runtime.console import plain_bars
from minarena.tiny import demo_pairs

OPTIONS = ["model", "tta", "tta_fraction", "weights", "max_length", "truncation", "token_budget", "dtype"]
OPTIONS += ["matmul", "fast"]
LONG = 100  # rows: fewer are judged without a bar


@dataclass
class Judge:
    """A loaded base, and the adapters over it with their options."""

    base: Predictor
    ensemble: Ensemble

    def __call__(self, prompt, a, b) -> float | np.ndarray:
        """P(a is preferred): a float, or (rows,) of three lists of texts or of lists of messages."""
        given = (prompt, a, b)
        if all(map(is_one, given)):
            return float(self.judged([prompt], [a], [b])[0])
        sizes = [f"a list of {len(value)}" if is_list(value) else "no list" for value in given]
        if "no list" in sizes or len(set(sizes)) > 1:
            found = ", ".join(sizes)
            raise ValueError(f"prompt, a, b: must be three texts or messages, or three equal lists: {found}")
        return self.judged(*map(list, given))

    def best(self, prompt, answers) -> list[tuple]:
        """(answer, its mean P(it wins) against each other one), the best first. Every pair is shown in both
        orders: n answers are n (n - 1) rows for each adapter."""
        if not is_one(prompt) or not is_list(answers) or len(answers) < 2:
            raise ValueError("best: must be given one prompt and a list of two answers or more")
        answers, n, (i, j) = list(answers), len(answers), np.triu_indices(len(answers), 1)
        wins = np.zeros((n, n))
        first, second = ([answers[k] for k in side] for side in (i, j))
        wins[i, j] = self.judged([prompt] * len(i), first, second, "all")
        wins[j, i] = 1 - wins[i, j]
        mean = wins.sum(axis=1) / (n - 1)
        return [(answers[k], float(mean[k])) for k in np.argsort(-mean, kind="stable")]

    def judged(self, prompts: list, a: list, b: list, tta: str = "") -> np.ndarray:
        """(rows,). tta: instead of the judge's own."""
        adapters, config = self.ensemble.adapters, self.ensemble.config
        if not a:
            return np.zeros(0)
        table = repaired(table_of_lists(prompts, a, b))
        self.base.aloud = len(table) >= LONG
        say_cut(self.base, table, adapters, tta or config.tta)
        how = (tta or config.tta, config.tta_fraction, config.weights)
        return predict_pairs(self.base, table, adapters, *how).loc[table["id"]].to_numpy()


def is_one(value) -> bool:
    """Whether a value is a text, messages or nothing (a conversation's prompt), and no list of these."""
    messages = isinstance(value, list) and value != [] and all(isinstance(turn, dict) for turn in value)
    return messages or value is None or isinstance(value, str | dict)


def is_list(value) -> bool:
    return not is_one(value) and hasattr(value, "__len__") and hasattr(value, "__iter__")


def load_judge(*adapters: str, **options) -> Judge:
    """options: OPTIONS, as infer.py takes them. Whatever is wrong with them is a ValueError of one line."""
    words = ["--adapter", *map(str, adapters)] if adapters else []
    for name, value in options.items():
        if name not in OPTIONS:
            raise ValueError(f"load_judge: no option {name}; there are {', '.join(OPTIONS)}")
        words += [] if value is None else ["--" + name.replace("_", "-"), *map(str, np.atleast_1d(value))]
    plain_bars()
    found = find_ensemble_(options_of(InferConfig, words), SINGLE_PROCESS)
    check_base(found)
    return Judge(load_predictor(found, demo_pairs(GUARD_ROWS, SEED), kept={}), found)

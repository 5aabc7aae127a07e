"""One page that says what runs learnt: a figure and a sentence each, and the texts they got most wrong.

    python -m minarena.report runs/ab runs/ba                       finished or not: report.html
    python -m minarena.report runs/ab runs/ba --probs probs.csv     and what infer.py --probs wrote

The page is one file without script, font or request. It is made of each run's train_config.json, log.jsonl
and, once the run is finished, eval.parquet; texts, groups and lengths come from the data files that are named
in the record. The page is about one judge: the one with the lowest log loss among all that judge the rows of
the last one (a --probs file, or the ensemble, or the last run). A difference below two standard errors is
called noise. What it does not do: load a model. Nothing imports this file.
"""

if __name__ == "__main__":  # the imports below take seconds
    from minarena.runtime.interrupt import one_line_on_ctrl_c

    one_line_on_ctrl_c("minarena.report")

import sys
from collections import Counter
from dataclasses import MISSING, dataclass, replace
from pathlib import Path

from minarena.config import AS_JSON, option, parse
from minarena.files.durable import write_text
from minarena.files.pairs import as_typed, read_pairs
from minarena.metrics import ENOUGH
from minarena.report import groups, sections, summary
from minarena.report.page import page, section, styled
from minarena.report.predictors import best_of, predictors_of
from minarena.report.runs import read_run
from minarena.runtime.console import print_json, run_command, say


@dataclass
class ReportConfig:
    runs: list[str] = option(MISSING, "folders that train.py wrote, or is writing")
    data: list[str] = option([], "files with texts and labels, where the runs' own do not have them")
    columns: list[str] = option([], "as train.py's: what the columns of --data mean")
    winner_words: list[str] = option([], "as train.py's: what its column winner says")
    probs: list[str] = option([], "files that infer.py --probs wrote, to compare with")
    out: str = option("report.html", "the page to write")
    no_texts: bool = option(False, "figures only, no text of the data")
    json: bool = option(False, AS_JSON)


def main(argv: list[str] | None = None) -> dict:
    config = parse(ReportConfig, argv, __doc__)
    check(config)
    tables = [read_pairs(config.data, **as_typed(vars(config))).set_index("id")] if config.data else []
    runs = [read_run(folder, tables) for folder in config.runs]
    done = [each for each in runs if each.rows is not None]
    predictors = predictors_of(done, config.probs, tables)
    with styled():
        html = body(runs, predictors, config.no_texts)
    write_text(html, Path(config.out))
    rows = {each.name: len(each.rows) for each in predictors}
    result = {"out": config.out, "runs": config.runs, "rows": rows}
    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    say(f"{count}, {len(done)} finished -> {config.out}: open it in a browser")
    return print_json(result, config.json)


def check(config: ReportConfig) -> None:
    """ValueError for an --out that cannot be written, and for a run or --probs file that is given twice."""
    if not Path(config.out).resolve().parent.is_dir():
        raise ValueError(f"--out {config.out}: no such folder")
    if Path(config.out).suffix not in (".html", ".htm"):  # so no file that is read can be replaced
        raise ValueError(f"--out {config.out}: must end in .html")
    for paths in (config.runs, config.probs):
        same = Counter(Path(path).resolve() for path in paths)
        double = [path for path in paths if same[Path(path).resolve()] > 1]
        if double:
            raise ValueError(f"{' and '.join(double)}: one and the same: give it once")


def body(runs: list, predictors: list, no_texts: bool) -> str:
    """The page as HTML."""
    trained = [each for each in predictors if each.trained]
    listed = [summary.provenance(each) for each in runs]
    if not predictors:
        last = section("The other questions need held-out probabilities, which a finished run has.", [])
        return page(summary.unknown(), listed, [sections.learnt(runs), last], runs[0].labeller)
    best = best_of(predictors)
    others = [each for each in trained if each is not best]
    found = [sections.learnt(runs), sections.good(best, predictors), sections.believed([*others, best])]
    found += [sections.position(trained)] if trained else []
    known = replace(best, rows=best.rows[best.rows["prompt"].notna()])
    found += [sections.length(known), groups.weak(known)] if len(known.rows) >= ENOUGH else []
    found += [] if no_texts else [groups.worst(best, trained)]
    return page(summary.opening(best, predictors), listed, found, best.labeller)


if __name__ == "__main__":
    sys.argv[0] = "minarena.report"  # the name that error messages begin with: -m puts a path there
    run_command(main)

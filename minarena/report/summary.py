"""The beginning of the page: did the judge learn anything, five figures, and where the figures come from.

    opening(best, predictors)      a sentence and five figures, with a verdict on each
    provenance(run)                date, command, data, base, device, time, commit of a run

A fact that train_config.json and log.jsonl lack is called not recorded, never guessed.
"""

from dataclasses import MISSING, fields
from statistics import median

from minarena.config import TrainConfig
from minarena.report import figures, page
from minarena.report.predictors import Predictor, rivals_of
from minarena.report.runs import PEOPLE, Run, about
from minarena.report.words import Estimate, Words, difference, mean, side, verdict

NOT_RECORDED = "not recorded"
ANSWERS = Words("No", "Yes", "Not shown", "Too little to tell")  # to the page's first question
LEARNT = Words(
    "the judge is worse than a guess from {} alone",
    "the judge knows something that {} alone cannot tell",
    "the judge cannot be told from a guess by {} alone",
    "there are too few held-out prompts to compare the judge with a guess from {} alone",
)

LOSS = Words("worse than", "better than", "as good as", "not comparable with")
COIN = Words(
    "It is right more often than a coin",
    "It is right less often than a coin",
    "It does not differ from a coin",
    "It cannot be compared with a coin",
)
SKILL = Words(
    "It is worse than no skill, 0.693 nats",
    "It is better than no skill, 0.693 nats",
    "It does not differ from no skill, 0.693 nats",
    "It cannot be compared with no skill, 0.693 nats",
)
RULE = Words(
    "It does better than", "It does worse than", "It does not differ from", "It cannot be compared with"
)
PLACE = Words("the answer shown first", "the answer shown second", "no place", "one place or none")
CONFIDENCE = Words(
    "is over-confident", "is under-confident", "is as sure as it is right", "may be over-confident"
)


def opening(best: Predictor, predictors: list[Predictor]) -> dict[str, str]:
    """The page's beginning as HTML: answer, cards (the five figures) and evidence."""
    found = figures.beyond_position_and_length(best.rows)
    what = "position and length" if found.lengths else "position"
    answer, meaning = (getattr(words, side(found.gain)) for words in (ANSWERS, LEARNT))
    evidence = f"The judge is {best.name}"
    if (rivals := len(rivals_of(predictors))) > 1:
        evidence += (
            f": of {rivals} judges of the same rows it has the lowest log loss, which flatters it a little"
        )
    evidence += f". Its log loss on {found.rows:,} held-out rows is "
    evidence += f"{found.loss}. This is {verdict(found.gain, LOSS)} the {found.simple} of a logistic "
    evidence += f"regression on {what}, although the regression is fitted to these very rows."
    if not found.lengths:
        evidence += " The lengths of the answers are not known (--data FILE)."
    answer = f"<strong>Did it learn anything beyond {what}?</strong> {answer}: {meaning.format(what)}."
    return {"answer": answer, "cards": page.cards(five_figures(best)), "evidence": page.text(evidence)}


def unknown() -> dict[str, str]:
    """The page's beginning while no run has held-out probabilities."""
    question = "<strong>Did it learn anything beyond position and length?</strong>"
    return {"answer": f"{question} Not known yet: no run has ended.", "cards": "", "evidence": ""}


def five_figures(best: Predictor) -> list[tuple[str, str, str]]:
    """(title, figure, verdict) of accuracy, log loss, "longer wins", flips and calibration."""
    rows, people = best.rows, best.labeller
    half = difference(rows["right"] - 0.5, rows)
    no_skill = difference(rows["loss"] - figures.NO_SKILL, rows)
    return [
        ("Accuracy", str(mean(rows["right"], rows)), f"{verdict(half, COIN)}: it agrees with {people}."),
        ("Log loss", str(mean(rows["loss"], rows)), f"{verdict(no_skill, SKILL)}; lower is better."),
        against_longer(best),
        flip_figure(best),
        calibration_figure(best),
    ]


def against_longer(best: Predictor) -> tuple[str, str, str]:
    rows, rule = best.rows, figures.longer_rule(best.rows)
    title = "Over “longer wins”"
    if rule.isna().all():
        return title, "unknown", "The texts are not known (--data FILE)."
    gap = difference(rows["right"] - rule, rows)
    said = f"{verdict(gap, RULE)} the rule that the longer answer wins, which is right {mean(rule, rows)}."
    sign = "+" if gap.value > 0 else ""
    return title, f"{sign}{Estimate(gap.value, mean(rows['right'] - rule, rows).error)}", said


def flip_figure(best: Predictor) -> tuple[str, str, str]:
    if "p_ab" not in best.rows:
        said = "The file has one probability a row. “Does the position matter?” has the flips of each run."
        return "Flips", "unknown", said
    found = figures.position_of(best.rows)
    said = "So many verdicts of a single order change when the two answers change places. The judge favours "
    return "Flips", str(found.flips), f"{said}{verdict(found.place, PLACE)}."


def calibration_figure(best: Predictor) -> tuple[str, str, str]:
    found = figures.calibration(best.rows)
    said = f"The calibration error, ECE; chance alone gives {found.chance:.3f}. The judge "
    return "Calibration", str(found.ece), f"{said}{verdict(found.over, CONFIDENCE)}."


# --------------------------------------------------------------------------------- where figures come from


def provenance(run: Run) -> str:
    record, versions = run.record, run.record.get("versions", {})
    rows = "no held-out rows yet" if run.rows is None else f"{len(run.rows):,} held-out rows"
    files = [f"{file['file']} ({file['bytes']:,} bytes)" for file in record["data_files"]]
    commit = record.get("commit") or NOT_RECORDED
    changed = ", with changes that are not committed" if commit.endswith("+") else ""
    of_versions = ", ".join(
        f"{name} {versions[name]}" for name in ("torch", "transformers") if name in versions
    )
    found = [
        ("date", record.get("date", NOT_RECORDED)),
        ("command", record.get("command", f"{NOT_RECORDED}; {options(record)}")),
        ("data", ", ".join(files) or "generated pairs"),
        ("labels", f"{'from the files' if run.labeller == PEOPLE else 'generated, not of people'}; {rows}"),
        ("base", record["model"]),
        ("device", device(record)),
        ("time", time(run)),
        ("commit", commit if commit == NOT_RECORDED else commit.rstrip("+")[:12] + changed),
        ("versions", of_versions or NOT_RECORDED),
    ]
    return page.facts(f"{run.name}: {about(run)}{run.note}", found)


def options(record: dict) -> str:
    """The options of a record that are not train.py's defaults."""
    changed = []
    for f in fields(TrainConfig):
        default = f.default if f.default_factory is MISSING else f.default_factory()
        value = record.get(f.name, default)
        if value != default and f.name != "resume":
            flag = "--" + f.name.replace("_", "-")
            words = value if isinstance(value, list) else [value]
            changed.append(flag if value is True else " ".join([flag, *map(str, words)]))
    return f"options beside the defaults: {' '.join(changed)}" if changed else "all options are the defaults"


def device(record: dict) -> str:
    name = record.get("device_name") or f"{record.get('device', 'device')} (its name is {NOT_RECORDED})"
    ranks = record.get("world_size", 1)
    computed = " ".join(filter(None, [record.get("dtype"), record.get("path") and f"{record['path']} path"]))
    return (f"{ranks} × " if ranks > 1 else "") + name + (f", {computed}" if computed else "")


def time(run: Run) -> str:
    """The seconds of all steps, also those before --resume, and the median speed of a step."""
    seconds, speeds = (
        [event[key] for event in run.events if isinstance(event.get(key), int | float)]
        for key in ("seconds", "tokens_per_second")
    )
    said = f"{sum(seconds):,.0f} s in {len(seconds):,} steps" if seconds else NOT_RECORDED
    return f"{said}; {median(speeds):,.0f} tokens/s in the median step" if speeds else said

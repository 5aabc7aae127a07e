"""What each option is worth on real rows: every arm trained with several seeds, on the same held-out rows.

    python benchmarks/options.py --model SmolLM2-135M --data train.parquet --eval-data valid.parquet \
        --ties ties.parquet --out runs/options --jobs 6
    python benchmarks/options.py --eval-data valid.parquet --out runs/options --table-only

An arm is a command line of train.py, infer.py or peft_trainer.py, run as a user would run it (PLAN). All
arms of a seed that train on --data alone see its rows in the same order. Printed is a table: accuracy and
log loss in the arm's own order and with both orders averaged, means over the seeds, and the difference in
log loss from `ab` (an int8 arm's from the arm that it repeats), with two standard errors: over held-out
prompts (with these seeds, would other prompts say the same?) and over seeds (with these prompts, would
other seeds?). The last line on stdout is one JSON object.

A group is a chain of arms, one after the other; the groups of all seeds are dealt to `--jobs` processes on
one GPU, so seconds say nothing here. What exists in --out is kept: a run that was stopped goes on.
"""

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import pandas as pd

from benchmarks.random_base import print_result
from minarena.files.pairs import read_pairs
from minarena.metrics import cross_entropy, is_correct, standard_error
from minarena.runtime.console import run_command, say

# group -> its arms in order: (name, script and options). {arm} is that arm's folder or file of the same seed,
# {data} and {eval} the files given; a training arm has --eval-data {eval} unless it holds out a fold.
PLAN = {
    "pair": [
        ("ab", "train --data {data}"),
        ("ba", "train --data {data} --swap"),
        ("ensemble", "infer --data {eval} --adapter {ab} {ba}"),
        ("ensemble_tta_uncertain", "infer --data {eval} --adapter {ab} {ba} --tta uncertain"),
        ("ab_tta_uncertain", "infer --data {eval} --adapter {ab} --tta uncertain"),
        ("ab_tta_all", "infer --data {eval} --adapter {ab} --tta all"),
        ("labels", "infer --data {ties} --adapter {ab} {ba} --tta all --pseudo {labels} --exclude {eval}"),
        ("pseudo", "train --data {data} {labels}"),
    ],
    "orders": [("both", "train --data {data} --order both"), ("linear", "train --data {data} --head linear")],
    "stages": [
        ("first", "train --data {english}"),
        ("stages", "train --data {others} --init-adapter {first}"),
        ("middle", "train --data {data} --truncation middle"),
        ("with_ties", "train --data {data} {ties} --ties half"),
    ],
    "distill": [
        ("fold_0", "train --data {data} --n-splits 2 --fold 0"),
        ("fold_1", "train --data {data} --n-splits 2 --fold 1"),
        ("soft", "infer --data {data} --distill {fold_0} {fold_1} --pseudo {soft}"),
        ("distilled", "train --data {soft}"),
        ("two_epochs", "train --data {data} --epochs 2"),
    ],
    "int8": [  # on its own: two of its arms are arms of other groups as well
        ("ab", "train --data {data}"),
        ("ab_int8", "train --data {data} --matmul int8"),
        ("ab_read_in_int8", "infer --data {eval} --adapter {ab} --matmul int8"),
        ("both", "train --data {data} --order both"),
        ("both_int8", "train --data {data} --order both --matmul int8"),
        ("both_read_in_int8", "infer --data {eval} --adapter {both} --matmul int8"),
    ],
    "peer": [("peer", "peft_trainer --data {data} --checkpointing off")],
}
COMPARED_WITH = {"both_int8": "both", "both_read_in_int8": "both"}  # every other arm: with ab
STEPS_ON_THE_WAY = {"first", "labels", "soft", "fold_0", "fold_1"}  # not results of their own


def main(argv: list[str] | None = None) -> dict:
    options = parse(argv)
    out = Path(options.out)
    if not options.table_only:
        ties = any("{ties}" in command for group in options.groups for _, command in PLAN[group])
        if not options.data or (ties and not options.ties):
            files = "--data FILE and --ties FILE are" if ties else "--data FILE is"
            raise ValueError(f"{files} needed, or --table-only")
        out.mkdir(parents=True, exist_ok=True)
        if "stages" in options.groups:
            write_languages(options)
        tasks = [(group, seed) for group in options.groups for seed in range(options.seeds)]
        with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
            list(pool.map(run_group, [options] * len(tasks), *zip(*tasks, strict=True)))
    held_out = read_pairs([options.eval_data])
    table = summary(out, held_out)
    say(*markdown(table))
    result = {"rows": len(held_out), "arms": table}
    print_result(vars(options), result)
    return result


def write_languages(options: argparse.Namespace) -> None:
    """The two data sets of the arm `stages`: the English rows, then the others."""
    rows, out = pd.read_parquet(options.data), Path(options.out)
    rows[rows["language"] == "English"].to_parquet(out / "english.parquet")
    rows[rows["language"] != "English"].to_parquet(out / "others.parquet")


def run_group(options: argparse.Namespace, group: str, seed: int) -> None:
    """Run the group's arms with one seed, in this process; a finished one is skipped."""
    import infer
    import train
    from benchmarks import peft_trainer

    scripts = {"train": train, "infer": infer, "peft_trainer": peft_trainer}
    folder = Path(options.out) / str(seed)
    folder.mkdir(exist_ok=True)
    places = {"data": options.data, "eval": options.eval_data, "ties": options.ties}
    places |= {name: f"{options.out}/{name}.parquet" for name in ("english", "others")}
    for name, command in PLAN[group]:
        places[name] = f"{folder}/{name}.parquet" if name in ("labels", "soft") else f"{folder}/{name}"
        record = folder / f"{name}.json"
        if record.exists():
            continue
        script, *words = [word.format(**places) for word in command.split()]
        if script != "infer":
            words += ["--model", options.model, "--out", places[name], "--seed", str(seed)]
            words += ["--lr", str(options.lr), "--max-length", str(options.max_length)]
            words += [] if "--n-splits" in words else ["--eval-data", options.eval_data]
        elif "--pseudo" not in words:
            words += ["--out", f"{folder}/{name}.csv", "--probs", f"{folder}/{name}.probs.parquet"]
        say(f"seed {seed}: {name}: {script}.py {' '.join(words)}")
        result = scripts[script].main(words)
        record.write_text(json.dumps({"command": f"{script}.py {' '.join(words)}"} | result))


def summary(out: Path, held_out: pd.DataFrame) -> list[dict]:
    """One dict an arm: means over its seeds, standard errors, differences in log loss from `ab`."""
    label, prompt = held_out["label"].to_numpy(), held_out["prompt"].to_numpy()
    names = list(dict.fromkeys(name for arms in PLAN.values() for name, _ in arms))
    names = [name for name in names if name not in STEPS_ON_THE_WAY]
    found = {name: predictions(out, name, held_out["id"]) for name in names}
    table = []
    for name in names:
        row = {"arm": name, "seeds": len(found[name])}
        for view in ("own", "mean"):
            p = [by_view[view] for by_view in found[name].values() if view in by_view]
            if not p:
                continue
            right = np.mean([is_correct(label, one) for one in p], axis=0)
            row[f"{view}_accuracy"] = round(right.mean(), 4)
            row[f"{view}_accuracy_se"] = round(standard_error(right, prompt[label != 0.5]), 4)
            losses = [cross_entropy(label, one) for one in p]
            row[f"{view}_log_loss"] = round(np.mean(losses), 4)
            row[f"{view}_log_loss_by_seed"] = [round(loss.mean(), 4) for loss in losses]
            other = found[COMPARED_WITH.get(name, "ab")]
            shared = [seed for seed in found[name] if view in found[name][seed] and seed in other]
            pair = [[arm[seed][view] for seed in shared] for arm in (found[name], other)]
            row |= difference(*pair, label, prompt, view) if shared and name != "ab" else {}
        table += [row] if row["seeds"] else []
    return table


def predictions(out: Path, name: str, ids: pd.Series) -> dict[int, dict[str, np.ndarray]]:
    """Seed -> P(response_a wins) of the held-out rows in the arm's own order, and with both averaged."""
    found = {}
    for record in sorted(out.glob(f"*/{name}.json")):
        folder, seed = record.parent, int(record.parent.name)
        probs = folder / f"{name}.probs.parquet"
        if probs.exists():
            found[seed] = {"own": pd.read_parquet(probs).set_index("id")["winner_model_a"]}
        else:
            order = json.loads(record.read_text())["order"]
            table = pd.read_parquet(folder / name / "eval.parquet").set_index("id")
            own = "p_a" if order == "both" else f"p_a_{order}"
            found[seed] = {"own": table[own], "mean": table["p_a"]}
        found[seed] = {view: p.loc[ids].to_numpy() for view, p in found[seed].items()}
    return found


def difference(arm: list, ab: list, label: np.ndarray, prompt: np.ndarray, view: str) -> dict:
    """Log loss of the arm minus the log loss of `ab`, same rows and seeds; below 0 the arm is better."""
    each = np.array([cross_entropy(label, p) - cross_entropy(label, q) for p, q in zip(arm, ab, strict=True)])
    over_seeds = each.mean(axis=1).std(ddof=1) / len(each) ** 0.5 if len(each) > 1 else np.nan
    figures = {"": each.mean(), "_se_prompts": standard_error(each.mean(axis=0), prompt)}
    figures |= {"_se_seeds": over_seeds}
    return {f"{view}_against{key}": round(float(value), 4) for key, value in figures.items()}


def markdown(table: list[dict]) -> list[str]:
    """The table, with one column more than the README's (seeds) and the range of the seeds' log losses."""
    lines = [
        "| arm | seeds | accuracy | log loss | against ab | both orders: accuracy | log loss | against ab |"
    ]
    lines.append("|---" * 8 + "|")
    for row in table:
        cells = [row["arm"], str(row["seeds"])]
        for view in ("own", "mean"):
            if f"{view}_accuracy" in row:
                cells.append(f"{row[f'{view}_accuracy']:.3f} ± {row[f'{view}_accuracy_se']:.3f}")
                seeds = row[f"{view}_log_loss_by_seed"]
                cells.append(f"{row[f'{view}_log_loss']:.3f} ({min(seeds):.3f}-{max(seeds):.3f})")
            else:
                cells += ["", ""]
            name = f"{view}_against"
            cells.append(
                f"{row[name]:+.3f} ± {row[name + '_se_prompts']:.3f} / {row[name + '_se_seeds']:.3f}"
                if name in row
                else ""
            )
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def parse(argv: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", default="tiny", help="base")
    parser.add_argument("--data", help="training rows with a column language (parquet)")
    parser.add_argument("--eval-data", required=True, help="held-out rows")
    parser.add_argument("--ties", help="more rows, whose winner is a tie")
    parser.add_argument("--out", required=True, help="folder for all of it")
    usual = [group for group in PLAN if group not in ("int8", "peer")]
    parser.add_argument("--groups", nargs="+", choices=list(PLAN), default=usual)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to N - 1")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--max-length", type=int, default=512, help="tokens a row")
    parser.add_argument("--table-only", action="store_true", help="train nothing: the table of what is there")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)

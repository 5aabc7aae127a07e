"""A run with a linear head -> the folder of one ordinary sequence classifier, a judge that servers can load.

    judge = read_judge(config, source)     the run, where it makes a judge; None: a base to train on
    write_judge(folder, judge, base)       what the folder needs beside weights: labels, ends of a row, a card

The folder takes the template's text alone: its tokenizer adds BOS and EOS and cuts a long text on the left,
as text.py does. Its pad token is not EOS: transformers reads the last token that is not pad, and would read
the one before EOS. What it does not do: serve an mlp head, swap the answers of a ba run, or cut parts in
their middle.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from minarena.config import EVAL_COLUMNS, UNRECORDED, QuantizeConfig
from minarena.files.durable import read_record
from minarena.files.fingerprint import differences, fingerprint
from minarena.files.resume import read_log
from minarena.files.tokenizer import PROBE, load_tokenizer
from minarena.quantization.stream import Source
from minarena.runtime.console import plus_minus, say
from minarena.text import TEMPLATE

WAYS_OUT = "train with --head linear, or load the run by PEFT and put model.make_head on it"
# Order of the run -> what a text shows first and second, in the words of its table
SHOWN = {"ab": (" (response_a)", " (response_b)"), "ba": (" (response_b)", " (response_a)"), "both": ("", "")}
CARD = """---
pipeline_tag: text-classification
library_name: transformers
{front}---

# Which of two answers does a person prefer?

A sequence classifier of {model}, made by `quantize.py` of minarena from the run `{run}`.

- **Labels:** 0 = `{labels[0]}`: the answer shown first is preferred. 1 = `{labels[1]}`: the other one.
- **Order:** trained in order {order}: {shown}
- **Text:** the template below and nothing else; the tokenizer adds what begins and ends a row.
- **Length:** at most {max_length} tokens. {cut}
- **Weights:** LoRA merged in fp32, then stored in {stored}.
- **License of the base:** {license}.

```python
import transformers

text = {template!r}.format(prompt, first, second)
judge = transformers.pipeline("text-classification", "FOLDER")
judge([text], truncation=True, top_k=None)
```

## Held-out rows of the run

Measured before the merge, about the table's response_a.

{figures}
"""


@dataclass
class Judge:
    """A run that becomes a folder. record: its train_config.json. pad: the token that pads a row."""

    config: QuantizeConfig
    order: str
    record: dict
    pad: str


def read_judge(config: QuantizeConfig, source: Source) -> Judge | None:
    """The run of --adapter, where it makes a judge; None where the folder becomes a base to train on.

    A judge is made of a folder with train_config.json and a linear head of two rows. Raises ValueError where
    --float asks for a judge that cannot be made, and where no token of the base could pad.
    """
    path, mlp = Path(config.adapter or "", "train_config.json"), "score.1.weight" in source.merge.replaced
    if config.float and source.is_8bit():
        raise ValueError(f"--float: --model {config.model} is 8-bit: give the float base, or drop --float")
    problem = ""
    if mlp:
        problem = f"an mlp head has no place in a sequence classifier: {WAYS_OUT}"
    elif source.head != "adapter" or config.labels != 2:
        problem = "there is no linear head (score.weight) of two rows in it"
    elif not path.exists():
        problem = "there is no train_config.json in it: not a run of train.py"
    if problem and config.float:
        raise ValueError(f"--float --adapter {config.adapter}: {problem}")
    if problem:
        if mlp and config.labels == 2:
            say(f"{config.adapter}: {problem}.", "The folder will be a base to train on, not a judge.")
        return None
    record = UNRECORDED | read_record(path)
    changed = differences(record.get("base"), fingerprint(source.folder, load_tokenizer(source.folder)))
    if changed:
        say(f"{config.adapter}: its base had other {' and '.join(changed)} than {config.model} has")
    return Judge(config, record["order"], record, pad_token(source))


def pad_token(source: Source) -> str:
    """The base's pad token or, where that is EOS or missing, another special token that has an embedding.

    Not an ordinary one: the tokenizer would no longer merge it with its neighbours.
    """
    tokenizer = load_tokenizer(source.folder)
    if tokenizer.pad_token_id not in (None, tokenizer.eos_token_id):
        return tokenizer.pad_token
    special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    usable = [i for i in sorted(special) if i < source.config.vocab_size and i != tokenizer.eos_token_id]
    if not usable:
        raise ValueError(
            f"--model {source.folder}: no special token beside EOS that could pad a judge's rows"
        )
    # a token that is named so first, one that begins rows last; masked, so any of them gives the same numbers
    return special[min(usable, key=lambda i: ("pad" not in special[i].lower(), i == tokenizer.bos_token_id))]


def write_judge(folder: Path, judge: Judge, base: str) -> None:
    """Make a judge of the written classifier in `folder`; base: the folder that it was made from."""
    tokenizer = load_tokenizer(str(folder))
    limit, (first, second) = judge.record["max_length"], SHOWN[judge.order]
    labels = [f"shown first{first}", f"shown second{second}"]
    write_ends(folder / "tokenizer.json", tokenizer)
    # No add_bos_token, add_eos_token or class of its own: with these transformers rebuilds the post-processor
    settings = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token, "pad_token": judge.pad}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": limit}
    settings |= {"truncation_side": "left", "padding_side": "right", "split_special_tokens": True}
    dropped = ("add_bos_token", "add_eos_token", "auto_map")
    edit(folder / "tokenizer_config.json", settings, dropped)
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    ids["pad_token_id"] = tokenizer.convert_tokens_to_ids(judge.pad)
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    edit(folder / "config.json", ids | names | {"problem_type": "single_label_classification"})
    (folder / "README.md").write_text(card(judge, labels, base), encoding="utf-8")
    check_ids(folder, tokenizer)


def edit(path: Path, changes: dict, dropped: tuple[str, ...] = ()) -> None:
    kept = {name: value for name, value in read_record(path).items() if name not in dropped}
    path.write_text(json.dumps(kept | changes, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_ends(path: Path, tokenizer) -> None:
    """Make tokenizer.json put BOS, where the base has one, before a text and EOS behind it."""
    from tokenizers.processors import TemplateProcessing

    begin, end = [tokenizer.bos_token] if tokenizer.bos_token else [], [tokenizer.eos_token]
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in begin + end]
    ends = TemplateProcessing([*begin, "$A", *end], [*begin, "$A", "$B", *end], special)
    edit(path, {"post_processor": json.loads(ends.__getstate__()), "padding": None, "truncation": None})


def check_ids(folder: Path, tokenizer) -> None:
    """Say it where transformers gives a text other ids than the run saw: it builds some pipelines anew."""
    from transformers import AutoTokenizer

    text = TEMPLATE.format(PROBE, tokenizer.eos_token, PROBE)
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)(text, verbose=False)["input_ids"]
    if found != [*begin, *ids, tokenizer.eos_token_id]:
        say("tokenizer AutoTokenizer gives a text other ids: load it by PreTrainedTokenizerFast")


def card(judge: Judge, labels: list[str], base: str) -> str:
    """The model card, README.md."""
    config, record, stated = judge.config, judge.record, license_of(base)
    shown = "either way round; the mean of both is the better judge."
    if judge.order != "both":
        shown = "response_{} of a table is shown first, response_{} second.".format(*judge.order)
    cut = "`truncation=True` cuts the start of a longer text, as the run did."
    if record["truncation"] != "left":
        cut = "The run cut each part of a longer row in its middle; the tokenizer cuts the text's start."
    return CARD.format(
        front=f"license: {stated}\n" if re.fullmatch(r"[\w.+-]+", stated) else "",
        model=config.model,
        run=config.adapter,
        labels=labels,
        order=judge.order,
        shown=shown,
        max_length=record["max_length"],
        cut=cut,
        stored="the base's own dtype" if config.float else "bitsandbytes' int8",
        license=stated,
        template=TEMPLATE,
        figures="\n".join(figures_of(config.adapter)) or "Not recorded.",
    )


def figures_of(run: str) -> list[str]:
    """The run's last evaluation as the lines of a table; none where its log has none."""
    last = next((event for event in reversed(read_log(run)) if event.get("event") == "eval"), {})
    rows = []
    for name in [name for name in EVAL_COLUMNS if name in last]:
        cells = [plus_minus(last[name], key) for key in ("accuracy", "log_loss")]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return ["| order | accuracy | log loss |", "|---|---|---|", *rows] if rows else []


def license_of(base: str) -> str:
    """What the base's README.md (its front matter) or config.json says, or `not stated`."""
    readme = Path(base, "README.md")
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.exists() else ""
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    line = re.search(r"^license:[ \t]*(\S.*)$", front[1] if front else "", re.MULTILINE)
    stated = line[1].strip(" \"'") if line else read_record(Path(base, "config.json")).get("license")
    return str(stated or "not stated")

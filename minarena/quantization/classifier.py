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

from minarena.config import UNRECORDED, QuantizeConfig
from minarena.data import EVAL_COLUMNS
from minarena.files.durable import read_record
from minarena.files.fingerprint import differences, fingerprint
from minarena.files.resume import read_log
from minarena.files.tokenizer import PROBE, load_tokenizer
from minarena.quantization.stream import Source
from minarena.runtime.console import plus_minus, say
from minarena.text import AS_TEXT, TEMPLATE

# Order of the run -> labels 0 and 1: the answer that is shown there is preferred
LABELS = {
    "ab": ("shown first (response_a)", "shown second (response_b)"),
    "ba": ("shown first (response_b)", "shown second (response_a)"),
    "both": ("shown first", "shown second"),  # the mean of both orders is the better judge
}
FP16 = " (`MatMul8bitLt: inputs will be cast` says that its product takes fp16: no error)"
CARD = """---
pipeline_tag: text-classification
license: {license}
---
# Which of two answers does a person prefer?

Made by minarena's `quantize.py` of the base {model} and the run `{run}`.

- **Label 0:** `{labels[0]}`: this answer is preferred. **Label 1:** `{labels[1]}`.
- **Order:** {order}; the labels say which answer of a table is shown first.{mean}
- **Text:** the template below, nothing else; the tokenizer adds what begins and ends a row.
- **Length:** at most {max_length} tokens. With `truncation=True` a longer text loses its start.{cut}
- **Weights:** LoRA merged in fp32, stored as {stored}.
- **License of the base:** {stated}.

    import transformers

    text = {template!r}.format(prompt, first, second)
    judge = transformers.pipeline("text-classification", FOLDER)
    judge([text], truncation=True, top_k=None)

Held-out rows of the run, before the merge:

| order | accuracy | log loss |
|---|---|---|
{figures}
"""


@dataclass
class JudgeRun:
    """A run that becomes a folder. record: its train_config.json. pad: the token that pads a row."""

    config: QuantizeConfig
    record: dict
    pad: str


def read_judge(config: QuantizeConfig, source: Source) -> JudgeRun | None:
    """The run of --adapter, where it makes a judge; None where the folder becomes a base to train on.

    A judge is made of a folder with train_config.json and a linear head of two rows. Raises ValueError where
    --float asks for a judge that cannot be made, and where no token of the base could pad.
    """
    path, mlp = Path(config.adapter or "", "train_config.json"), "score.1.weight" in source.merge.replaced
    problem = ""
    if mlp:
        problem = "an mlp head has no place in a sequence classifier: train with --head linear, "
        problem += "or load the run by PEFT and put model.make_head on it"
    elif source.head != "adapter" or config.labels != 2:
        problem = "there is no linear head (score.weight) of two rows in it"
    elif not path.exists():
        problem = "there is no train_config.json in it: not a run of train.py"
    if config.float and problem:
        raise ValueError(f"--float: --adapter {config.adapter}: {problem}")
    if config.float and source.is_8bit():
        raise ValueError(f"--float: --model {config.model} is 8-bit: give the float base, or drop --float")
    if problem:
        if mlp:
            say(f"{config.adapter}: {problem}.", "The folder will be a base to train on, not a judge.")
        return None
    record, tokenizer = UNRECORDED | read_record(path), load_tokenizer(source.folder)
    if changed := differences(record.get("base"), fingerprint(source.folder, tokenizer)):
        say(f"{config.adapter}: its base had other {' and '.join(changed)} than {config.model} has")
    return JudgeRun(config, record, pad_token(tokenizer, source))


def pad_token(tokenizer, source: Source) -> str:
    """The base's pad token or, where that is EOS or missing, another special token that has an embedding.

    Not an ordinary one: the tokenizer would no longer merge it with its neighbours.
    """
    end = tokenizer.eos_token_id
    if tokenizer.pad_token_id not in (None, end):
        return tokenizer.pad_token
    special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    usable = [i for i in sorted(special) if i < source.config.vocab_size and i != end]
    if not usable:
        raise ValueError(f"--model {source.folder}: no special token beside EOS that could pad rows")
    # One named so first, BOS last: any of them gives the same numbers, because it is masked
    return special[min(usable, key=lambda i: ("pad" not in special[i].lower(), i == tokenizer.bos_token_id))]


def write_judge(folder: Path, judge: JudgeRun, base: str) -> None:
    """Make a judge of the written classifier in `folder`; base: the folder that it was made from."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(str(folder))
    begin, end = [tokenizer.bos_token] if tokenizer.bos_token else [], [tokenizer.eos_token]
    ids = dict(zip(begin + end, tokenizer.convert_tokens_to_ids(begin + end), strict=True))
    ends = TemplateProcessing([*begin, "$A", *end], [*begin, "$A", "$B", *end], [*ids.items()])
    whole = {"post_processor": json.loads(ends.__getstate__()), "padding": None, "truncation": None}
    edit(folder / "tokenizer.json", whole)
    settings = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token, "pad_token": judge.pad}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": judge.record["max_length"]}
    settings |= {"truncation_side": "left", "padding_side": "right", "split_special_tokens": True}
    # With these transformers would build the post-processor anew
    edit(folder / "tokenizer_config.json", settings, dropped=("add_bos_token", "add_eos_token", "auto_map"))
    names = dict(enumerate(LABELS[judge.record["order"]]))
    config = {"id2label": names, "label2id": {name: i for i, name in names.items()}}
    config |= {"pad_token_id": tokenizer.convert_tokens_to_ids(judge.pad)}
    config |= {"eos_token_id": tokenizer.eos_token_id, "problem_type": "single_label_classification"}
    edit(folder / "config.json", config)
    (folder / "README.md").write_text(card(judge, base), encoding="utf-8")
    text = TEMPLATE.format(PROBE, tokenizer.eos_token, PROBE)
    wanted = tokenizer(text, **AS_TEXT)["input_ids"]
    wanted = [*(ids[token] for token in begin), *wanted, ids[tokenizer.eos_token]]
    by_class = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if by_class(text, verbose=False)["input_ids"] != wanted:  # it builds the pipelines of some classes anew
        say("tokenizer AutoTokenizer gives a text other ids: load it by PreTrainedTokenizerFast")


def edit(path: Path, changes: dict, dropped: tuple[str, ...] = ()) -> None:
    kept = {name: value for name, value in read_record(path).items() if name not in dropped}
    path.write_text(json.dumps(kept | changes, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def card(judge: JudgeRun, base: str) -> str:
    """The model card, README.md."""
    config, record, stated = judge.config, judge.record, license_of(base)
    last = next((event for event in reversed(read_log(config.adapter)) if event.get("event") == "eval"), {})
    rows = []
    for name in [name for name in EVAL_COLUMNS if name in last]:
        cells = [plus_minus(last[name], key) for key in ("accuracy", "log_loss")]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    middle = " The run cut each part of a longer row in its middle instead."
    return CARD.format(
        license=stated if re.fullmatch(r"[\w.+-]+", stated) else "unknown",  # the hub's word
        model=config.model,
        run=config.adapter,
        labels=LABELS[record["order"]],
        order=record["order"],
        mean=" The mean of both ways is the better judge." if record["order"] == "both" else "",
        max_length=record["max_length"],
        cut=middle if record["truncation"] == "middle" else "",
        stored="floats, in the base's dtype" if config.float else f"bitsandbytes' int8{FP16}",
        stated=stated,
        template=TEMPLATE,
        figures="\n".join(rows or ["| not recorded | | |"]),
    )


def license_of(base: str) -> str:
    """What the base's README.md (its front matter) or config.json says, or `not stated`."""
    readme = Path(base, "README.md")
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.exists() else ""
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    line = re.search(r"^license:[ \t]*(\S.*)$", front[1] if front else "", re.MULTILINE)
    stated = line[1].strip(" \"'") if line else read_record(Path(base, "config.json")).get("license")
    return str(stated or "not stated")

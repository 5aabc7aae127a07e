"""A base's tokenizer: its token ids are those of its own tokenizer.json.

    tokenizer = load_tokenizer(folder)
    write_tokenizer(tokenizer, folder, into)     the same tokenizer in another folder

transformers 5.23's AutoTokenizer takes vocabulary and merges from tokenizer.json, but normaliser and
pre-tokenizer from the code of the class that tokenizer_config.json names (GPT2Tokenizer, GemmaTokenizer),
and for every base of model_type qwen2 from Qwen2Tokenizer. A base with a pipeline of its own, such as
DeepSeek-R1-Distill-Qwen, then gets other ids than it was trained with, without any message. So the pipeline
here is tokenizer.json's. BOS, EOS, pad, added tokens and chat settings come from the folder's configuration.
What it does not do: correct a tokenizer.json that is itself wrong (transformers' `fix_mistral_regex` is off).
"""

import json
import shutil
from pathlib import Path

from minarena.runtime.console import first_line
from minarena.text import pad_id


def load_tokenizer(folder: str):
    """The base's fast tokenizer; ValueError where it is missing or has no token that could end a row."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if (Path(folder) / "tokenizer.json").exists():
            tokenizer = with_own_pipeline(tokenizer, folder)
    except Exception as error:  # transformers raises a dozen kinds here, for one user's mistake
        raise ValueError(f"{folder}: no usable tokenizer or config.json: {first_line(error)}") from error
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise ValueError(f"{folder}: the tokenizer must be a fast one with an EOS token")
    return tokenizer


def with_own_pipeline(by_class, folder: str):
    """The tokenizer of the folder's tokenizer.json, with the special tokens of its configuration.

    by_class: AutoTokenizer's. Its class may name a special token that the configuration leaves out (Gemma's
    `<eos>`); it counts where tokenizer.json has it, because a new token would have no embedding.
    """
    from transformers import PreTrainedTokenizerFast

    file = str(Path(folder) / "tokenizer.json")
    settings = {"tokenizer_file": file, "fix_mistral_regex": False, "trust_remote_code": False}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, **settings)
    vocabulary = tokenizer.get_vocab()
    for name in ("bos_token", "eos_token", "pad_token"):
        token = getattr(by_class, name)
        if getattr(tokenizer, name) is None and token in vocabulary:
            setattr(tokenizer, name, token)
    return tokenizer


# Where the pipelines of transformers' classes are known to part from others
PROBE = "In 1984, 12345 x 3.14159!\n\n1. first\n\n\n2.  two  spaces\tand I'LL don't né ﬁne ½ <b>bold</b>"
PROBE += " 我们每天练习下棋。怎么学? Как дела? كيف الحال؟ 👩‍👩‍👧🎉 def f(x):\n    return x**2  # ok\r\n "


def ids_differ_from_transformers(folder: str) -> bool:
    """Whether AutoTokenizer, which this code used before, gives a text other ids than tokenizer.json does."""
    from transformers import AutoTokenizer

    settings = {"add_special_tokens": False, "split_special_tokens": True}
    by_class = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return by_class(PROBE, **settings)["input_ids"] != load_tokenizer(folder)(PROBE, **settings)["input_ids"]


def write_tokenizer(tokenizer, folder: str, into: Path) -> None:
    """Write the tokenizer of `folder` into the folder `into`; tokenizer.json, if there is one, byte for byte.

    transformers writes a tokenizer.json of its own that holds all added tokens, so tokenizer_config.json does
    not list them. The source's tokenizer.json may lack some of them: the list is written, too.
    """
    tokenizer.save_pretrained(into)
    source = Path(folder) / "tokenizer.json"
    if source.exists():
        shutil.copyfile(source, into / "tokenizer.json")
        path = into / "tokenizer_config.json"
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings.pop("fast_tokenizer_files", None)  # names files that are not copied
        added = tokenizer.added_tokens_decoder.items()
        settings["added_tokens_decoder"] = {str(i): token.__getstate__() for i, token in added}
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_vocabulary(tokenizer, embeddings: int) -> None:
    """ValueError where the model has no embedding for a token that a row can hold: on a GPU such a token ends
    the process. Special tokens other than BOS, EOS and pad never come from a text (text.py)."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    own = {tokenizer.bos_token_id, tokenizer.eos_token_id, pad_id(tokenizer)} - {None}
    last = max((set(tokenizer.get_vocab().values()) - special) | own)
    if last >= embeddings:
        reason = f"its tokenizer has token {last}, the model has {embeddings} embeddings"
        raise ValueError(f"--model {tokenizer.name_or_path}: {reason}: another model's tokenizer?")

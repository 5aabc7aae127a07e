"""A base's folder: found, or fetched from the hub, checked before anything in it is loaded, and loaded.

Other people's folders are read and never obeyed: their code does not run, only safetensors weights are read,
and a file that another file names lies in the same folder, or the folder is refused. transformers alone
follows `../../x` in an index and in tokenizer_config.json, unpickles a `.bin` that an index names, and offers
to run a folder's code. What it does not do: verify hashes, or follow up a link that lies in the folder.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from minarena.files.durable import read_record
from minarena.int8 import use_dequantized_
from minarena.model import PreferenceModel, residual_dtype, soft_cap
from minarena.outliers import GUARD_ROWS, LARGEST_ERROR, use_int8_product_
from minarena.runtime.console import first_line, say
from minarena.text import encode, pad_id
from minarena.tiny import write_tiny

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
# Files that name others, under which key, and what those must end in
NAMING = [
    ("model.safetensors.index.json", "weight_map", ".safetensors"),
    ("tokenizer_config.json", "fast_tokenizer_files", ".json"),
]


def check_folder(name: str) -> None:
    """ValueError where a local folder lacks what is needed or names files outside of it, or where a name that
    looks like a path is none."""
    if name == "tiny":  # the demo's, which base_folder makes
        return
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"--model {name}: no config.json: not a model folder")
        if not list(folder.glob("*.safetensors")):
            remedy = "pickled weights are not read, convert them first"
            raise ValueError(f"--model {name}: no .safetensors file: {remedy}")
        if not any((folder / file).exists() for file in TOKENIZERS):  # transformers would make an empty one
            raise ValueError(f"--model {name}: no tokenizer: none of {', '.join(TOKENIZERS)}")
        if (folder / "adapter_config.json").exists():  # where PEFT is installed, transformers would apply it
            raise ValueError(f"--model {name}: an adapter lies there, too: merge it (quantize.py --adapter)")
        for file, key, ending in NAMING:
            for other in named(folder / file, key):
                if not isinstance(other, str) or Path(other).name != other or not other.endswith(ending):
                    remedy = f"only {ending} files of this folder are read"
                    raise ValueError(f"--model {name}: {file} names {other!r}: {remedy}")
    elif folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"--model {name}: no such folder")


def named(path: Path, key: str) -> list:
    """What the JSON file at `path`, if there is one, has under `key`: a list's items, or a dict's values."""
    found = read_record(path).get(key) if path.exists() else None
    found = [*found.values()] if isinstance(found, dict) else found
    return found if isinstance(found, list) else [found] * (found is not None)


def local_folder(name: str) -> str:
    """The checked folder of a base that may be a hub id: then its weights, configuration and tokenizer are
    fetched, without pickles and code."""
    check_folder(name)
    if Path(name).is_dir():
        return name
    from huggingface_hub import snapshot_download

    wanted = ["model*.safetensors", "*.json", "tokenizer.model", "merges.txt", "*.jinja"]
    try:
        folder = snapshot_download(name, allow_patterns=wanted)
    except (ValueError, OSError) as error:  # the hub's errors are both
        raise ValueError(f"--model {name}: {first_line(error)}") from error
    check_folder(folder)
    return folder


def load_tokenizer(folder: str):
    """The base's fast tokenizer; ValueError where it is missing or has no token that could end a row."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises a dozen kinds here, for one user's mistake
        raise ValueError(f"{folder}: no usable tokenizer or config.json: {first_line(error)}") from error
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise ValueError(f"{folder}: the tokenizer must be a fast one with an EOS token")
    return tokenizer


def check_vocabulary(tokenizer, embeddings: int) -> None:
    """ValueError where the model has no embedding for a token, which on a GPU ends the process."""
    last = max(
        tokenizer.vocab_size - 1, tokenizer.eos_token_id, tokenizer.bos_token_id or 0, pad_id(tokenizer)
    )
    if last >= embeddings:
        reason = f"its tokenizer has token {last}, the model has {embeddings} embeddings"
        raise ValueError(f"--model {tokenizer.name_or_path}: {reason}: another model's tokenizer?")


@contextlib.contextmanager
def base_folder(name: str) -> Iterator[str]:
    """The folder to load for `--model name`: `tiny` is made in a temporary one, others are checked."""
    if name != "tiny":
        yield local_folder(name)
        return
    with tempfile.TemporaryDirectory(prefix="minarena-tiny-") as folder:
        yield write_tiny(folder)


def load_backbone(
    name: str, device: torch.device, dtype: torch.dtype, quantize: bool = True, matmul: str = "dequant"
) -> nn.Module:
    """The base in the folder `name` (folders.py) without its LM head, frozen, on `device`.

    quantize: a float base is quantized to int8 while it loads (a base that is 8-bit already stays as it is);
    False keeps a float base, in `dtype`. matmul: see int8.py; llm-int8 is bitsandbytes' own product, the
    seed's numerics. Raises ValueError where the folder is no usable base, naming the reason.
    """
    from transformers import AutoConfig, AutoModel, BitsAndBytesConfig, logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report lists the unused LM head; what is missing we check
    try:
        # not None, which would ask whether to run a folder's code, and run it on `y`
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        vars(config).pop("transformers_weights", None)  # a file of any kind, to be taken as the weights
        method = getattr(config, "quantization_config", None)
        if method is not None and not method.get("load_in_8bit"):
            raise ValueError("quantized, but not by bitsandbytes' 8-bit method: take the float model")
        # only transformers' eager attention applies Gemma-2's soft-cap; the others have none and take SDPA
        keywords = {"attn_implementation": "eager" if soft_cap(config) else "sdpa"}
        # with the config, for what a config.json says of attention would win, other people's kernels included
        keywords |= {"config": config, "trust_remote_code": False, "use_safetensors": True}
        keywords |= {"ignore_mismatched_sizes": True, "output_loading_info": True}  # each is refused by name
        if not hasattr(config, "hidden_size"):
            raise ValueError("no plain text model: it has parts such as a vision tower")
        if method is None and quantize:
            keywords["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
        elif method is None:
            keywords["dtype"] = dtype
        backbone, report = AutoModel.from_pretrained(name, device_map={"": device}, **keywords)
    except Exception as error:  # transformers raises many kinds for one user's mistake
        raise ValueError(f"--model {name}: {first_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
    for tensor, found, wanted in sorted(report["mismatched_keys"]):
        raise ValueError(f"--model {name}: {tensor} is {tuple(found)}: config.json needs {tuple(wanted)}")
    if report["missing_keys"]:
        raise ValueError(f"--model {name}: the weights lack {sorted(report['missing_keys'])[0]}")
    if matmul != "llm-int8":
        use_dequantized_(backbone)
    return backbone.requires_grad_(False)


def load_base(name: str, device: torch.device, dtype: torch.dtype, matmul: str) -> tuple:
    """(PreferenceModel without a head, tokenizer) of `--model name`."""
    with base_folder(name) as folder:
        tokenizer = load_tokenizer(folder)
        backbone = load_backbone(folder, device, dtype, matmul=matmul)
    check_vocabulary(tokenizer, backbone.get_input_embeddings().num_embeddings)
    return PreferenceModel(backbone, nn.Identity(), residual_dtype(device, dtype)), tokenizer


def round_activations_(
    model: PreferenceModel, tokenizer, table: pd.DataFrame, max_length: int, truncation: str
) -> None:
    """--matmul int8, before LoRA is put on: find the base's outlier columns, use them if that is harmless.

    table: rows of the run. Where the last hidden state of the first of them changes by more than LLM.int8
    would change it, the run goes on with dequantized weights; a line says what was decided.
    """
    rows = encode(tokenizer, table.head(GUARD_ROWS), max_length, truncation)
    model.int8_columns, error = use_int8_product_(model.model, tokenizer, rows)
    found = f"--matmul int8 changes the last hidden state of {len(rows)} rows by {error:.3f}"
    if not model.int8_columns:
        say(f"{found}, LLM.int8 by about {LARGEST_ERROR}: this run goes on with --matmul dequant")
    else:
        say(f"{found} (LLM.int8: about {LARGEST_ERROR}); outlier columns {model.int8_columns}")

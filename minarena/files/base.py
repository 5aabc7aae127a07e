"""A base's folder: found, or fetched from the hub, checked before anything in it is loaded, and loaded.

Other people's folders are read and never obeyed: their code does not run, only safetensors weights are read,
and a file that another file names lies in the same folder, or the folder is refused. transformers alone
follows `../../x` in an index and in tokenizer_config.json, unpickles a `.bin` that an index names, and offers
to run a folder's code. What it does not do: verify hashes, or follow up a link that lies in the folder.
"""

import contextlib
import copy
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from minarena.config import InferConfig, TrainConfig
from minarena.files.durable import read_record
from minarena.files.fingerprint import fingerprint
from minarena.files.outliers import GUARD_ROWS, LARGEST_ERROR, use_int8_product_
from minarena.files.shards import TEXT_PART, Stored, match_tensors, open_shards, require_numbers
from minarena.files.tokenizer import check_vocabulary, ids_differ_from_transformers, load_tokenizer
from minarena.int8 import use_dequantized_
from minarena.lora import is_projection, require_projections
from minarena.model import DTYPES, PreferenceModel, residual_dtype, soft_cap
from minarena.runtime.console import first_line, say
from minarena.text import encode
from minarena.tiny import write_tiny

# Models that read pictures, too, and whose text part computes what the text model alone computes
MULTIMODAL = ("gemma3", "mistral3")
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
    if isinstance(found, list):
        return found
    return [] if found is None else [found]


def local_folder(name: str) -> str:
    """The checked folder of a base that may be a hub id: then its weights, configuration and tokenizer are
    fetched, without pickles and code."""
    check_folder(name)
    if Path(name).is_dir():
        return name
    from huggingface_hub import snapshot_download

    wanted = ["model*.safetensors", "*.json", "tokenizer.model", "merges.txt", "*.jinja", "README.md"]
    try:
        folder = snapshot_download(name, allow_patterns=wanted)
    except (ValueError, OSError) as error:  # the hub's errors are both
        raise ValueError(f"--model {name}: {first_line(error)}") from error
    check_folder(folder)
    return folder


@contextlib.contextmanager
def base_folder(name: str) -> Iterator[str]:
    """The folder to load for `--model name`: `tiny` is made in a temporary one, others are checked."""
    if name != "tiny":
        yield local_folder(name)
        return
    with tempfile.TemporaryDirectory(prefix="minarena-tiny-") as folder:
        yield write_tiny(folder)


def read_config(folder: str):
    """transformers' configuration of the base in `folder`; nothing in it that names a file or code is obeyed.

    Of a model of several parts (MULTIMODAL) it is the text part's. Raises ValueError where there is none, or
    the model is quantized by another method than bitsandbytes' 8-bit, or has parts that we do not know.
    """
    from transformers import AutoConfig

    try:
        # trust_remote_code: not None, which would ask whether to run a folder's code, and run it on `y`
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for one user's mistake
        raise ValueError(f"--model {folder}: config.json: {first_line(error)}") from error
    if config.model_type in MULTIMODAL:
        whole, config = config, config.text_config
        config.dtype = config.dtype or whole.dtype
        if getattr(whole, "quantization_config", None):
            config.quantization_config = whole.quantization_config
    vars(config).pop("transformers_weights", None)  # a file of any kind, to be taken as the weights
    method = getattr(config, "quantization_config", None) or {}
    if method and not method.get("load_in_8bit"):
        kind = f"{method.get('quant_method')} weights"
        raise ValueError(f"--model {folder}: {kind}: take the float model (or bitsandbytes' 8-bit one)")
    if not hasattr(config, "hidden_size"):
        raise ValueError(f"--model {folder}: no plain text model: it has parts such as a vision tower")
    return config


def empty_model(folder: str, config, auto) -> nn.Module:
    """The model of `config`, built by the class `auto` without memory: its names and shapes.

    Raises ValueError where its layers have other matrices than the seven projections.
    """
    config = copy.deepcopy(config)
    vars(config).pop("quantization_config", None)
    try:
        with torch.device("meta"):
            model = auto.from_config(config, attn_implementation="eager", trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for one user's mistake
        raise ValueError(f"--model {folder}: config.json: {first_line(error)}") from error
    try:
        require_projections(model)
    except ValueError as error:
        raise ValueError(f"--model {folder}: {error}") from error
    return model


def load_backbone(
    name: str, device: torch.device, dtype: torch.dtype, quantize: bool = True, matmul: str = "dequant"
) -> nn.Module:
    """The base in the folder `name` without its LM head, frozen, on `device`.

    quantize: quantize a float base to int8 while it loads (an 8-bit base stays as it is); False keeps a float
    base, in `dtype`. matmul: see int8.py; llm-int8 is bitsandbytes' own product, as in the recipe. Raises
    ValueError where the folder is no usable base, naming the reason.
    """
    from transformers import AutoModel, BitsAndBytesConfig, logging

    config = read_config(name)
    empty = empty_model(name, config, AutoModel).state_dict()
    shapes = {f"model.{key}": tuple(tensor.shape) for key, tensor in empty.items()}
    tensors = match_tensors(name, open_shards(name), shapes)
    require_numbers(name, tensors, quantize)
    # only transformers' eager attention applies Gemma-2's soft-cap; bases without one take SDPA
    keywords = {"attn_implementation": "eager" if soft_cap(config) else "sdpa"}
    # Pass our config: otherwise config.json's own attention setting wins, which may name a kernel to download
    keywords |= {"config": config, "trust_remote_code": False, "use_safetensors": True}
    keywords |= {"ignore_mismatched_sizes": True, "output_loading_info": True}  # each is refused by name
    keywords["key_mapping"] = {f"^{re.escape(prefix)}": "" for prefix in TEXT_PART}
    config.quantization_config = eight_bit_settings(config, tensors)
    if config.quantization_config is None:
        del config.quantization_config
        in_int8 = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
        keywords |= in_int8 if quantize else {"dtype": dtype}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report lists the unused LM head; match_tensors has checked the names
    try:
        backbone, report = AutoModel.from_pretrained(name, device_map={"": device}, **keywords)
    except Exception as error:  # transformers raises many kinds for one user's mistake
        raise ValueError(f"--model {name}: {first_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
    lost = sorted(report["missing_keys"] | {key for key, *_ in report["mismatched_keys"]})
    if lost:  # transformers would leave it at random values
        raise ValueError(f"--model {name}: transformers did not load {lost[0]}")
    for module in backbone.modules():
        if type(module) is nn.Linear:  # a projection that an 8-bit folder keeps in floats
            module.to(dtype)
    if matmul != "llm-int8":
        use_dequantized_(backbone)
    return backbone.requires_grad_(False)


def eight_bit_settings(config, tensors: dict[str, Stored]) -> dict | None:
    """transformers' quantization_config for what lies in the files; None where nothing is 8-bit.

    The files decide, not config.json: its modules to skip bear the names of another model class, and another
    tool may call weights 8-bit that it has kept in floats.
    """
    from transformers import BitsAndBytesConfig

    if all(tensor.dtype != "I8" for tensor in tensors.values()):
        return None
    floats = [name for name, tensor in tensors.items() if is_projection(name) and tensor.dtype != "I8"]
    skip = [name.removeprefix("model.").removesuffix(".weight") for name in floats]
    stated = getattr(config, "quantization_config", None) or {}
    threshold = stated.get("llm_int8_threshold", 6.0)
    settings = {"llm_int8_threshold": threshold, "llm_int8_skip_modules": skip or None}
    return BitsAndBytesConfig(load_in_8bit=True, **settings).to_dict()


def base_fingerprint(name: str) -> dict[str, str]:
    """What `--model name` is, by its contents (fingerprint.py)."""
    with base_folder(name) as folder:
        return fingerprint(folder, load_tokenizer(folder))


def ids_changed(name: str) -> bool:
    """Whether a run without a recorded fingerprint, so from before this code read tokenizer.json itself, had
    other token ids of this base."""
    with base_folder(name) as folder:
        return ids_differ_from_transformers(folder)


def load_base(options: TrainConfig | InferConfig, device: torch.device, rows: pd.DataFrame) -> tuple:
    """(PreferenceModel without a head, tokenizer) of --model, with the product of --matmul.

    rows: of the run, on which --matmul int8 is compared before it is used.
    """
    dtype = DTYPES[options.dtype]
    with base_folder(options.model) as folder:
        config, tokenizer = read_config(folder), load_tokenizer(folder)
        check_vocabulary(tokenizer, config.vocab_size)
        check_length(config, options.max_length)
        backbone = load_backbone(folder, device, dtype, matmul=options.matmul)
    model = PreferenceModel(backbone, nn.Identity(), residual_dtype(device, dtype))
    if options.matmul == "int8":
        round_activations_(model, tokenizer, rows, options.max_length, options.truncation)
    return model, tokenizer


def check_length(config, max_length: int) -> None:
    """ValueError where a row's numbers would depend on its neighbours; a printed line for a length above the
    base's own.

    Some kinds of rotary embeddings (RoPE) take other frequencies when the longest row of a batch passes the
    original length (transformers, modeling_rope_utils.py, dynamic_rope_update). Up to it they are fixed.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    # Gemma-3: one for each kind of layer
    by_layer = [value for value in rope.values() if isinstance(value, dict)]
    for settings in by_layer or [rope]:
        kind, limit = settings.get("rope_type", "default"), config.max_position_embeddings
        if kind == "longrope":
            limit = settings.get("original_max_position_embeddings") or limit
        if kind in ("dynamic", "longrope") and max_length > limit:
            reason = (
                f"beyond {limit} tokens this base's rope type {kind!r} depends on the longest row of a batch"
            )
            raise ValueError(f"--max-length {max_length}: {reason}: --max-length {limit} is fine")
    limit = getattr(config, "max_position_embeddings", max_length)
    if max_length > limit:
        say(f"--max-length {max_length} is above the base's {limit} positions (max_position_embeddings)")


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

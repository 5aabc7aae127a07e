"""A base's folder: found, or fetched from the hub, and checked before anything in it is loaded.

Other people's folders are read and never obeyed: their code does not run, only safetensors weights are read,
and a file that another file names lies in the same folder, or the folder is refused. transformers alone
follows `../../x` in an index and in tokenizer_config.json, unpickles a `.bin` that an index names, and offers
to run a folder's code. What it does not do: verify hashes, or follow up a link that lies in the folder.
"""

from pathlib import Path

from minarena.files.durable import read_record
from minarena.runtime.console import first_line

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
# Files that name others, under which key, and what those must end in
NAMING = [
    ("model.safetensors.index.json", "weight_map", ".safetensors"),
    ("tokenizer_config.json", "fast_tokenizer_files", ".json"),
]


def check_folder(name: str) -> None:
    """ValueError where a local folder lacks what is needed or names files outside of it, or where a name that
    looks like a path is none."""
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

"""What --data may name -> files: a file, a folder or quoted glob of shards, a data set of the hub.

    data_files("shards/")                     its files in order; a folder that `datasets` saved, too
    data_files("hub:ORG/NAME:CONFIG:SPLIT")   fetched into the hub's cache: data, never code or pickles
    data_files("-")                           stdin, as lines of JSON

Files or folders named train, test or validation are splits, which are never joined: one is named, or the
command ends with their list.
"""

import glob
import re
from collections import Counter
from functools import cache
from pathlib import Path

from fsspec.utils import glob_translate  # huggingface_hub needs it, too

from minarena.files.durable import file_record
from minarena.files.formats import KINDS, STDIN, endings
from minarena.runtime.console import first_line, say

SPLIT = re.compile(r"(^|[^a-z])(train|training|test|testing|valid|validation|val|dev|eval|heldout)([^a-z]|$)")
SHARD = re.compile(r"([-_.]?\d+)?([-_]of[-_]\d+(-[0-9a-f]{16})?)?$")
COUNTED = re.compile(r"(.*?)\d+[-_]of[-_](\d+)")  # of train-00000-of-00003.parquet the name and 3
INTERNAL = re.compile(r"cache-|indices-|dataset_infos?\.json|dataset_dict\.json|state\.json|\.")


def data_files(argument: str) -> list[str]:
    """The files of an argument of --data. Raises ValueError, with what to do, where there are none, or
    several splits."""
    if argument == "-":
        return [STDIN]
    if argument.startswith("hub:"):
        return hub_files(argument)
    if "://" in argument:
        hub = argument.partition("huggingface.co/datasets/")[2].strip("/")
        way = f"--data hub:{hub}" if hub else "download it, and name the file"
        raise ValueError(f"{argument}: is not fetched: {way}")
    if Path(argument).is_dir():
        found = [str(path) for path in sorted(Path(argument).rglob("*")) if path.is_file()]
        return whole(argument, of_one_split(argument, found, argument))
    if not Path(argument).exists() and glob.has_magic(argument):
        return of_one_split(argument, sorted(glob.glob(argument, recursive=True)))
    return [argument]


def of_one_split(argument: str, files: list[str], folder: str = "") -> list[str]:
    """Keep the files that are data; ValueError if they belong to several splits, folders or kinds."""
    files = [file for file in files if endings(file)[0] in KINDS and not INTERNAL.match(Path(file).name)]
    groups = {f"{split_of(file.removeprefix(folder))} ({''.join(endings(file))})": file for file in files}
    if not files:
        raise ValueError(f"{argument}: no data files there ({', '.join(KINDS)})")
    if len(groups) > 1:
        how = "a file, a quoted glob" if argument[:4] != "hub:" else "hub:NAME:SPLIT, hub:NAME:CONFIG:SPLIT"
        why = "splits and folders are not joined: name one"
        raise ValueError(f"{argument}: holds {', '.join(sorted(groups))}; {why} ({how})")
    return files


def whole(argument: str, files: list[str]) -> list[str]:
    """The files; ValueError where one named train-00000-of-00003 stands there without the others."""
    for (name, count), there in Counter(each.groups() for each in map(COUNTED.match, files) if each).items():
        if there < int(count):
            why = f"{there} of {int(count)} files {name}* are there: fetch the others, or name a quoted glob"
            raise ValueError(f"{argument}: {why}")
    return files


def stem(file: str) -> str:
    """The name without endings and number: train of train-00000-of-00002.jsonl.gz."""
    return SHARD.sub("", Path(file).name.lower().split(".")[0])


def split_of(file: str) -> str:
    """The split that a file belongs to, with its folders; files without one are shards of their folder."""
    parts = [*Path(file).parts[:-1], *([stem(file)] if SPLIT.search(stem(file)) else [])]
    return "/".join(parts).lstrip("/") or "."


@cache  # one answer a process: what is read is what was recorded
def hub_files(argument: str) -> list[str]:
    from huggingface_hub import HfApi, metadata_load, snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE

    name, *which = argument.removeprefix("hub:").split(":")
    kept = Path(HF_HUB_CACHE, f"datasets--{name.replace('/', '--')}")
    try:
        try:
            info, folder = HfApi().dataset_info(name, files_metadata=True), ""
            sizes, revision = {file.rfilename: file.size or 0 for file in info.siblings}, info.sha
            card = info.card_data.to_dict() if info.card_data else {}
        except Exception:  # no network, or offline mode: what was fetched before will do
            if not (kept / "refs/main").exists():
                raise
            revision = (kept / "refs/main").read_text(encoding="utf-8")
            folder = str(kept / "snapshots" / revision)
            sizes = {str(path.relative_to(folder)): 0 for path in Path(folder).rglob("*") if path.is_file()}
            card = metadata_load(f"{folder}/README.md") if "README.md" in sizes else {}
        files = of_hub_split(argument, sorted(sizes), which, card := card or {})
        files = whole(argument, files) if folder else files
        size = "from the cache" if folder else f"{sum(map(sizes.get, files)) / 2**20:,.1f} MiB"
        say(f"{argument}: {len(files)} files, {size}, revision {revision}")
        patterns = [*map(glob.escape, files), *(["README.md"] if "configs" in card else [])]
        folder = folder or snapshot_download(name, repo_type="dataset", allow_patterns=patterns)
    except Exception as error:  # huggingface_hub's own, its network library's and ours
        raise ValueError(f"--data {argument}: {first_line(error)}") from error
    return [f"{folder}/{file}" for file in files]


def card_parts(card: dict, files: list[str]) -> tuple[dict[tuple[str, str], list[str]], str]:
    """((configuration, split) -> patterns of its files; the configuration where none is named), as the head
    of a data set's README.md says: https://huggingface.co/docs/hub/datasets-manual-configuration."""
    parts, main = {}, "default"
    for config in card.get("configs") or []:
        name, folder = config.get("config_name", "default"), (config.get("data_dir") or "").strip("./")
        main = name if config.get("default") else main
        inside = [file.removeprefix(f"{folder}/") for file in files if file.startswith(f"{folder}/")]
        named = [{"split": split_of(x).replace(".", "train"), "path": glob.escape(x)} for x in inside]
        for file in as_list(config.get("data_files") or named):
            split, paths = (file["split"], file["path"]) if isinstance(file, dict) else ("train", file)
            parts.setdefault((name, split), []).extend(Path(folder, x).as_posix() for x in as_list(paths))
    return parts, main


def as_list(value) -> list:
    return value if isinstance(value, list) else [value]


def of_hub_split(argument: str, files: list[str], which: list[str], card: dict) -> list[str]:
    """which: [], [SPLIT] or [CONFIG, SPLIT]. What belongs together the card says (card_parts); where it does
    not, folders of a file, or its name without number and endings."""
    files = [file for file in files if endings(file)[0] in KINDS]
    parts, main = card_parts(card, files)
    named = [part for part in parts if {*which} <= {*part}]
    named = [part for part in named if part[0] == main] or named
    if parts and len(named) != 1:
        raise ValueError(f"its card has {', '.join(map(':'.join, parts))}: name one (hub:NAME:CONFIG:SPLIT)")
    if parts:
        ways = [re.compile(glob_translate(pattern)) for pattern in parts[named[0]]]
        found = [file for file in files if any(way.match(file) for way in ways)]
    else:
        found = [file for file in files if {*which} <= {*Path(file).parts[:-1], stem(file)}]
    if not found and (which or parts):
        there = ", ".join(sorted(set(map(split_of, files)))) or "no data files"
        raise ValueError(f"no file of {':'.join(which)}; there are {there}")
    return found if parts else of_one_split(argument, found)


def records(arguments: list[str]) -> list[dict]:
    """What train_config.json keeps of the data: path (of a hub data set with its revision), bytes, sha256."""
    if "-" in arguments:
        raise ValueError("--data -: stdin leaves no file that could be compared later: save it as one")
    return [file_record(file) for argument in arguments for file in data_files(argument)]

"""What --data may name -> files: a file, a folder or quoted glob of shards, a data set of the hub.

    data_files("shards/")                     its files in order; a folder that `datasets` saved, too
    data_files("hub:ORG/NAME:CONFIG:SPLIT")   fetched into the hub's cache: data, never code or pickles
    data_files("-")                           stdin, as lines of JSON

Files or folders named train, test or validation are splits, which are never joined: one is named, or the
command ends with their list.
"""

import glob
import re
from functools import cache
from pathlib import Path

from minarena.files.durable import file_record
from minarena.files.formats import KINDS, STDIN, endings
from minarena.runtime.console import first_line, say

SPLIT = re.compile(r"(^|[^a-z])(train|training|test|testing|valid|validation|val|dev|eval|heldout)([^a-z]|$)")
SHARD = re.compile(r"([-_.]?\d+)?([-_]of[-_]\d+)?$")
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
        raise ValueError(
            f"{argument}: is not fetched: "
            + (f"--data hub:{hub}" if hub else "download it, and name the file")
        )
    if Path(argument).is_dir():
        found = [str(path) for path in sorted(Path(argument).rglob("*")) if path.is_file()]
        return of_one_split(argument, found, argument)
    if not Path(argument).exists() and glob.has_magic(argument):
        return of_one_split(argument, sorted(glob.glob(argument, recursive=True)))
    return [argument]


def of_one_split(argument: str, files: list[str], folder: str = "") -> list[str]:
    """Those that are data; ValueError where they are of several splits, folders or kinds."""
    files = [file for file in files if endings(file)[0] in KINDS and not INTERNAL.match(Path(file).name)]
    groups = {f"{split_of(file.removeprefix(folder))} ({''.join(endings(file))})": file for file in files}
    if not files:
        raise ValueError(f"{argument}: no data files there ({', '.join(KINDS)})")
    if len(groups) > 1:
        how = (
            "hub:NAME:SPLIT, hub:NAME:CONFIG:SPLIT"
            if argument.startswith("hub:")
            else "a file, a quoted glob"
        )
        why = "splits and folders are not joined: name one"
        raise ValueError(f"{argument}: holds {', '.join(sorted(groups))}; {why} ({how})")
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
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE

    name, *which = argument.removeprefix("hub:").split(":")
    cache = Path(HF_HUB_CACHE, f"datasets--{name.replace('/', '--')}")
    try:
        try:
            info, folder = HfApi().dataset_info(name, files_metadata=True), ""
            sizes, revision = {file.rfilename: file.size or 0 for file in info.siblings}, info.sha
        except Exception:  # no network, or offline mode: what was fetched before will do
            revision = (
                (cache / "refs/main").read_text(encoding="utf-8") if (cache / "refs/main").exists() else ""
            )
            folder = str(cache / "snapshots" / revision)
            sizes = {str(path.relative_to(folder)): 0 for path in Path(folder).rglob("*") if path.is_file()}
            if not (revision and sizes):
                raise
        files = of_hub_split(argument, sorted(sizes), which)
        size = "from the cache" if folder else f"{sum(map(sizes.get, files)) / 2**20:,.1f} MiB"
        say(f"{argument}: {len(files)} files, {size}, revision {revision}")
        patterns = [glob.escape(file) for file in files]
        folder = folder or snapshot_download(name, repo_type="dataset", allow_patterns=patterns)
    except Exception as error:  # huggingface_hub's own, its network library's and ours
        raise ValueError(f"--data {argument}: {first_line(error)}") from error
    return [f"{folder}/{file}" for file in files]


def of_hub_split(argument: str, files: list[str], which: list[str]) -> list[str]:
    """which: [], [SPLIT] or [CONFIG, SPLIT]: folders of a file, or its name without number and endings."""
    named = [file for file in files if {*which} <= {*Path(file).parts[:-1], stem(file)}]
    data = sorted({split_of(file) for file in files if endings(file)[0] in KINDS})
    if which and not named:
        raise ValueError(f"no file of {':'.join(which)}; there are {', '.join(data) or 'no data files'}")
    return of_one_split(argument, named)


def records(arguments: list[str]) -> list[dict]:
    """What train_config.json keeps of the data: path (of a hub data set with its revision), bytes, sha256."""
    if "-" in arguments:
        raise ValueError("--data -: stdin leaves no file that could be compared later: save it as one")
    return [file_record(file) for argument in arguments for file in data_files(argument)]

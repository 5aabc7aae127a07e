"""What --data may name besides a file: folders, globs, saved data sets, and data sets of the hub.

data_files("shards/")             the files in order; train and test are never joined
data_files("hub:org/name:train")  from the hub's cache, fetched if need be

The hub is a small server on this machine that answers as the hub does; a child process asks it, because
huggingface_hub reads its settings when it is imported. Compared with: the files that were written.
"""

import hashlib
import io
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import children
import pyarrow as pa
import pytest
from bad_input import ROW, jsonl

from minarena.files import formats
from minarena.files.pairs import read_pairs
from minarena.files.sources import data_files, of_hub_split, records


def write(path: Path, *ids: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jsonl(*({**ROW, "id": i, "prompt": f"q{i}"} for i in ids)))
    return path


def refusal(argument) -> str:
    with pytest.raises(ValueError) as error:
        data_files(str(argument))
    assert str(argument) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_and_a_glob_of_shards_are_read_in_order(tmp_path):
    for number in (1, 0, 2):
        write(tmp_path / f"train-0000{number}-of-00003.jsonl", f"x{number}")
    (tmp_path / "README.md").write_text("no data")
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert list(read_pairs([str(tmp_path)])["id"]) == ["x0", "x1", "x2"]
    assert list(read_pairs([f"{tmp_path}/train-0000[12]*"])["id"]) == ["x1", "x2"]
    assert [Path(record["file"]).name[6:11] for record in records([str(tmp_path)])] == [
        "00000",
        "00001",
        "00002",
    ]


@pytest.mark.parametrize(
    "names",
    [
        ["train.jsonl", "test.jsonl"],
        ["train/data.jsonl", "test/data.jsonl"],
        ["data/train_prefs-00000-of-00001.jsonl", "data/train_sft-00000-of-00001.jsonl"],
        ["validation.jsonl", "rows.jsonl"],
        ["one/rows.jsonl", "two/rows.jsonl"],
        ["rows.jsonl", "rows.jsonl.gz"],
    ],
)
def test_splits_folders_and_kinds_are_never_joined(names, tmp_path):
    for name in names:
        write(tmp_path / name, name)
    said = refusal(tmp_path)
    for name in names:
        assert (
            name.partition("-")[0].partition(".")[0].removesuffix("/data").removesuffix("/rows") in said
            or "(" in said
        )
        assert data_files(str(tmp_path / name)) == [str(tmp_path / name)]
    assert "name one" in said


def test_a_saved_data_set_is_read_and_its_own_files_are_not(tmp_path):
    table = pa.table({key: [value] for key, value in ROW.items()})
    with pa.ipc.new_stream(tmp_path / "data-00000-of-00001.arrow", table.schema) as writer:
        writer.write_table(table)
    with pa.ipc.new_stream(tmp_path / "cache-0123.arrow", table.schema) as writer:
        writer.write_table(table)
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / name).write_text("{}")
    assert list(read_pairs([str(tmp_path)])["id"]) == ["r1"]


def test_what_cannot_be_read_says_what_to_do(tmp_path):
    assert "download it" in refusal("https://example.org/rows.csv")
    assert refusal("https://huggingface.co/datasets/org/name").endswith("--data hub:org/name")
    assert "no data files" in refusal(tmp_path)
    for name, words in [
        ("a.zip", "unpack it"),
        ("a.xlsx", "save the sheet as .csv"),
        ("a.pkl", "never loaded"),
    ]:
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(ValueError, match=words):
            read_pairs([str(tmp_path / name)])


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet", ".arrow"])
def test_a_cell_that_is_too_large_ends_in_one_line(ending, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "LIMIT", 10_000)
    monkeypatch.setattr(formats, "BLOCK", 1000)
    lengths = [9, 9, 20_000, 9]  # of the prompts, characters
    rows = [{**ROW, "id": str(i), "prompt": "x" * length} for i, length in enumerate(lengths)]
    path, table = tmp_path / f"rows{ending}", pa.Table.from_pylist(rows)
    if ending == ".csv":
        lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
        path.write_text("\n".join(lines))
    elif ending == ".parquet":
        pa.parquet.write_table(table, path)
    elif ending == ".arrow":
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    else:
        path.write_text(json.dumps(rows) if ending == ".json" else "\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=f"rows{ending}: .*row 3.*(10,000|10000)"):
        read_pairs([str(path)])


@pytest.mark.parametrize("between", [",", " ,", "\n, ", ",\n", " \r\n,\t"])
def test_an_array_is_read_wherever_a_block_ends_and_whatever_space_it_has(between, tmp_path, monkeypatch):
    rows = [{"id": i, "prompt": "é" * i} for i in range(9)]
    text = f" [\n{between.join(json.dumps(row, ensure_ascii=False) for row in rows)}\n]\n"
    for block in range(1, len(text) + 2):
        monkeypatch.setattr(formats, "BLOCK", block)
        stream = io.BufferedReader(io.BytesIO(text.encode()))
        assert list(formats.json_rows(stream)[1]) == rows == json.loads(text)


def test_an_empty_object_in_the_first_line_is_a_row_without_cells(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b"{}\n" + jsonl(ROW))
    [(frame, _)] = formats.read_frames(str(tmp_path / "rows.jsonl"))
    assert frame["prompt"].isna().tolist() == [True, False]
    with pytest.raises(ValueError, match="row 1, column response_a: null is not text"):
        read_pairs([str(tmp_path / "rows.jsonl")])


def test_a_folder_that_lacks_some_of_its_numbered_files_is_refused(tmp_path):
    for number in (0, 2):
        write(tmp_path / f"data/train-0000{number}-of-00003.jsonl", f"x{number}")
    said = refusal(tmp_path)
    assert "2 of 3 files" in said and "data/train-* are there" in said and "quoted glob" in said
    assert len(data_files(f"{tmp_path}/data/*")) == 2  # as the refusal advises
    write(tmp_path / "data/train-00001-of-00003.jsonl", "x1")
    assert len(data_files(str(tmp_path))) == 3


def test_numbers_that_are_followed_by_a_hash_are_shards_too(tmp_path):
    for number in (0, 1):  # as `datasets` named them until 2023
        write(
            tmp_path / f"train-0000{number}-of-00002-{'0123456789abcdef'[:: 1 - 2 * number]}.jsonl",
            f"x{number}",
        )
    assert list(read_pairs([str(tmp_path)])["id"]) == ["x0", "x1"]


def test_an_array_is_held_element_by_element(tmp_path):
    """Of 40 MB in 20,000 elements, a few blocks are Python objects at a time."""
    import tracemalloc

    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{**ROW, "prompt": "x" * 2000}] * 20_000))
    tracemalloc.start()
    with open(path, "rb") as stream:
        assert sum(1 for _ in formats.json_rows(stream)[1]) == 20_000
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2_000_000


# ---------------------------------------------------------------------------------------------- the hub

CARD = {  # the head of a README.md: what belongs together, whatever files and folders are named
    "configs": [
        {"config_name": "main", "data_files": [{"split": "train", "path": "train-*"}]},
        {"config_name": "hard", "data_files": [{"split": "train", "path": ["other/*"]}]},
        {"config_name": "small", "data_files": "te*.jsonl"},
    ]
}
CARD["configs"][1]["data_files"].append({"split": "test", "path": "nowhere/*.jsonl"})
REVISION = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "README.md": b"---\n---\n",
    "name.py": b"raise SystemExit('code was run')",
    "weights.pkl": b"never",
    "train-00000-of-00002.jsonl": jsonl({**ROW, "id": "t0"}),
    "train-00001-of-00002.jsonl": jsonl({**ROW, "id": "t1", "prompt": "p"}),
    "test.jsonl": jsonl({**ROW, "id": "e0"}),
    "other/train.jsonl": jsonl({**ROW, "id": "o0"}),
}


class Hub(BaseHTTPRequestHandler):
    """The three requests that huggingface_hub makes: what there is, a file's header, a file."""

    def do_GET(self):
        self.answer(send=True)

    def do_HEAD(self):
        self.answer(send=False)

    def answer(self, send: bool):
        self.server.asked.append(self.path)
        path, headers = self.path.partition("?")[0], {}
        if path.startswith("/api/datasets/org/name/tree/"):
            found = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in FILES.items()
            ]
            content = json.dumps(found).encode()
        elif path.startswith("/api/datasets/org/name"):
            siblings = [{"rfilename": name, "size": len(content)} for name, content in FILES.items()]
            info = {"id": "org/name", "sha": REVISION, "siblings": siblings, "private": False, "tags": []}
            card = {"cardData": self.server.card} if self.server.card else {}
            content = json.dumps(info | card | {"downloads": 0, "likes": 0}).encode()
        elif path.startswith(f"/datasets/org/name/resolve/{REVISION}/"):
            content = FILES[path.partition(f"{REVISION}/")[2]]
            if self.server.card and path.endswith("README.md"):
                content = f"---\n{json.dumps(self.server.card)}\n---\n".encode()
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": REVISION}
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        for name, value in {
            "Content-Length": len(content),
            "Content-Type": "application/json",
            **headers,
        }.items():
            self.send_header(name, str(value))
        self.end_headers()
        if send:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.card = [], None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


SCRIPT = """
import sys
from minarena.files.pairs import read_pairs
from minarena.files.sources import records
for argument in sys.argv[1:]:
    try:
        found = list(read_pairs([argument])["id"]), [record["file"] for record in records([argument])]
    except ValueError as error:
        found = f"REFUSED {error}"
    print(f"{argument} gives {found}", flush=True)
"""


def asked(folder: Path, port: int, *arguments: str, offline: str = "0") -> tuple[list[str], str]:
    """What each argument gives, and all that was said, in a child that asks a hub at that port."""
    own = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(folder), "HF_HUB_OFFLINE": offline}
    own |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    own |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    (folder / "read.py").write_text(SCRIPT, encoding="utf-8")
    code, said = children.run(str(folder / "read"), [*arguments], children.imported_anew, own)
    found = re.findall(f"^({'|'.join(map(re.escape, arguments))}) gives (.*)$", said, re.MULTILINE)
    assert code == 0 and [argument for argument, _ in found] == [*arguments], said
    return [gives for _, gives in found], said


def test_a_data_set_of_the_hub_is_fetched_data_files_only(hub, tmp_path):
    train, other, test, none = ("hub:org/name" + end for end in (":train", ":other:train", ":test", ""))
    (a, b, c, d), said = asked(tmp_path, hub.server_port, train, other, test, none)
    assert a.startswith("REFUSED") and "other/train" in a and "name one" in a  # two folders have a train
    assert b.startswith("(['o0']") and f"/snapshots/{REVISION}/other/train.jsonl" in b
    assert f"hub:org/name:other:train: 1 files, 0.0 MiB, revision {REVISION}" in said
    assert c.startswith("(['e0']")
    assert d.startswith(f"REFUSED --data {none}: ") and "name one" in d
    fetched = [path for path in hub.asked if "/resolve/" in path]
    assert fetched and not [path for path in fetched if path.endswith((".py", ".pkl", ".md"))]
    one, *_ = (tmp_path / "hub").rglob("test.jsonl")
    one.with_name("val-00000-of-00002.jsonl").write_bytes(jsonl(ROW))  # a fetch that was cut off
    (again, cut), _ = asked(
        tmp_path, hub.server_port, test, "hub:org/name:val", offline="1"
    )  # from the cache
    assert again == c and cut.startswith("REFUSED") and "1 of 2 files val-* are there" in cut


def test_configurations_of_the_card_say_what_belongs_together(hub, tmp_path):
    hub.card = CARD
    ids = {"main:train": "['t0', 't1']", "hard:train": "['o0']", "small": "['e0']"}
    names = [f"hub:org/name:{each}" for each in ids]
    refused = {"train": "main:train, hard:train, hard:test, small:train", "hard:test": "no file of hard:test"}
    for offline in ("0", "1"):  # offline, README.md in the cache says it
        more = [f"hub:org/name:{each}" for each in refused if offline == "0"]
        found, _ = asked(tmp_path, hub.server_port, *names, *more, offline=offline)
        for gives, expected in zip(found, ids.values(), strict=False):
            assert gives.startswith(f"({expected}")
        for gives, words in zip(found[3:], list(refused.values())[: len(more)], strict=True):
            assert gives.startswith("REFUSED --data hub:org/name") and words in gives


def test_a_card_may_name_folders_and_the_configuration_that_counts_where_none_is_named():
    files = [
        "README.md",
        "train.jsonl",
        "more/train-0-of-2.jsonl",
        "more/train-1-of-2.jsonl",
        "more/test.jsonl",
    ]
    files += ["one/rows.jsonl", "two/a/x.jsonl", "two/b/x.jsonl"]
    configs = [
        {"config_name": "plain", "data_files": "train.jsonl"},
        {"config_name": "more", "data_dir": "more", "default": True},
        {"config_name": "one", "data_dir": "./one/"},
        {"config_name": "two", "data_dir": "two", "data_files": [{"split": "train", "path": "./a/*"}]},
    ]

    def found(*which, configs=configs):
        return of_hub_split("hub:x", files, list(which), {"configs": configs})

    assert found("plain") == ["train.jsonl"] and found("one") == ["one/rows.jsonl"]
    assert found("train") == found("more", "train") == files[2:4] and found("test") == ["more/test.jsonl"]
    assert found("two") == ["two/a/x.jsonl"]
    for which, there in (([], "more:test"), (["more"], "more:train")):
        with pytest.raises(ValueError, match=f"its card has .*{there}.*: name one"):
            found(*which)
    without = [{**config, "default": False} for config in configs]
    with pytest.raises(ValueError, match="name one"):
        found("train", configs=without)
    without[0]["config_name"] = "default"
    assert found("train", configs=without) == found(configs=without) == ["train.jsonl"]


def test_without_a_network_or_a_data_set_it_is_one_line(hub, tmp_path):
    arguments = ["hub:org/none", "hub:org/name:nowhere"]
    found, said = asked(tmp_path, hub.server_port, *arguments)
    assert "other/train" in found[1]
    alone, said_alone = asked(tmp_path, 9, "hub:org/name:test")  # nobody answers there
    for argument, gives in zip([*arguments, "hub:org/name:test"], found + alone, strict=True):
        assert gives.startswith(f"REFUSED --data {argument}: ")
    assert len((said + said_alone).splitlines()) == 3  # nothing else is said

"""Files that somebody could pass to --data: what must be refused, by which words, and what must be read.

REFUSED: (name of the file, its bytes, what the message must name beside the file)
ACCEPTED: (name of the file, its bytes, what the table must hold in its first row)

Data only; test_bad_input.py gives them to the readers and to the commands.
"""

import bz2
import gzip
import io
import json
import lzma

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

ROW = {"id": "r1", "prompt": "q", "response_a": "a", "response_b": "b", "winner": "model_a"}
HEAD = b"id,prompt,response_a,response_b,winner\n"
GOOD = b"g1,q,a,b,model_a\n"
TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
CHOSEN = {"chosen": TALK, "rejected": TALK}
TWO_TEXTS = {"response_a": "a", "response_b": "b"}
LMSYS = {"id": 1, "prompt": '["q"]', "response_a": '["a"]', "response_b": '["b"]'}
LMSYS |= {"winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0}
ARENA = {"question_id": "x", "conversation_a": TALK, "conversation_b": TALK, "winner": "tie"}
DEEP = b"[" * 900 + b"]" * 900


def jsonl(*rows: dict) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def second(**cells) -> bytes:
    """A good row and one with these cells, as jsonl."""
    return jsonl({**ROW, "id": "g1"}, {**ROW, **cells})


def raw(cell: bytes, column: str = "prompt") -> bytes:
    """The same with a cell that is JSON as it stands."""
    return second(**{column: "CELL"}).replace(b'"CELL"', cell)


def without(column: str) -> bytes:
    return jsonl({name: cell for name, cell in ROW.items() if name != column})


def zstd(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


def parquet(table, **more) -> bytes:
    file = io.BytesIO()
    pq.write_table(table if isinstance(table, pa.Table) else pa.table(table), file, **more)
    return file.getvalue()


def columns(**changes) -> dict:
    """The columns of two good rows, some of them changed."""
    return {name: [cell, cell] for name, cell in ROW.items()} | {"id": ["r1", "r2"]} | changes


def damaged(table: dict, old: bytes, new: bytes) -> bytes:
    whole = parquet(table, compression="none", use_dictionary=False, write_statistics=False)
    assert old in whole
    return whole.replace(old, new)


def arrow(kind) -> bytes:
    table, file = pa.table(columns()), io.BytesIO()
    with kind(file, table.schema) as writer:
        writer.write_table(table)
    return file.getvalue()


WHOLE = parquet(columns())
PANDAS = pa.table(columns()).replace_schema_metadata({b"pandas": b"{}"})  # metadata that pandas cannot use
ONCE = pa.array(["model_a", "model_a"]).dictionary_encode()
NO_ROWS = parquet({name: pa.array([], pa.string()) for name in ROW})
UTF8 = "id,prompt,response_a,response_b,winner\n1,é,b,c,model_a\n"
TWO = ("row 2", "column prompt")

REFUSED = [
    # ------------------------------------------------------------ truncated, empty
    ("empty.csv", b"", ["empty file"]),
    ("empty.jsonl", b"", ["empty file"]),
    ("empty.parquet", b"", ["empty file"]),
    ("empty.csv.gz", b"", ["empty file"]),
    ("zipped-nothing.csv.gz", gzip.compress(b""), ["no rows"]),
    ("header.csv", HEAD, ["no rows"]),
    ("blank.csv", b"\n\n\n", ["no rows"]),
    ("blank.jsonl", b"\n \n\n", ["no rows"]),
    ("no-rows.parquet", NO_ROWS, ["no rows"]),
    ("cut.csv", HEAD + GOOD + b"g2,q,a", ["row 2", "3 cells, the header has 5"]),
    ("cut-in-quotes.csv", HEAD + GOOD + b'g2,q,a,"b', ["row 2", "unexpected end of data"]),
    ("cut.jsonl", jsonl(ROW) + b'{"id": "2", "pro', ["row 2", "Unterminated string"]),
    ("cut.parquet", WHOLE[: len(WHOLE) // 2], ["parquet"]),
    ("cut-end.parquet", WHOLE[:-4], ["parquet"]),
    ("only-magic.parquet", b"PAR1", ["parquet"]),
    ("cut.jsonl.gz", gzip.compress(jsonl(ROW))[:-9], ["jsonl", "end-of-stream"]),
    ("cut.csv.gz", gzip.compress(HEAD + GOOD)[:20], ["csv", "end-of-stream"]),
    # ------------------------------------------------------------ encodings
    ("utf-16.csv", UTF8.encode("utf-16"), ["line 1 is not UTF-8", "save the file as UTF-8"]),
    ("utf-16.jsonl", jsonl(ROW).decode().encode("utf-16"), ["line 1 is not UTF-8"]),
    ("utf-16-no-mark.csv", UTF8.replace("é", "e").encode("utf-16-le"), ["row 2", "the header has 5"]),
    ("latin-1.csv", UTF8.encode("latin-1"), ["row 1", "line 2 is not UTF-8"]),
    ("latin-1-header.csv", "idé,prompt\n".encode("latin-1"), ["line 1 is not UTF-8"]),
    ("latin-1.jsonl", jsonl(ROW) + b'{"id": "\xe9"}\n', ["row 2", "line 2 is not UTF-8"]),
    ("shift-jis.csv", UTF8.replace("é", "日本").encode("shift-jis"), ["row 1", "line 2 is not UTF-8"]),
    ("not-utf-8.parquet", damaged(columns(prompt=["q", "MARK"]), b"MARK", b"M\xffRK"), ["row 2", "decode"]),
    # ------------------------------------------------------------ endings
    ("really-csv.parquet", HEAD + GOOD, ["not readable as parquet"]),
    ("really-parquet.csv", WHOLE, ["csv"]),
    ("really-parquet.jsonl", WHOLE, ["jsonl"]),
    ("really-csv.jsonl", HEAD + GOOD, ["row 1", "jsonl"]),
    ("really-jsonl.csv", jsonl(ROW), ["csv"]),
    ("really-gz.jsonl", gzip.compress(jsonl(ROW)), ["line 1 is not UTF-8"]),
    ("not-gz.jsonl.gz", jsonl(ROW), ["Not a gzipped file"]),
    ("pairs.txt", HEAD + GOOD, ["unknown ending '.txt'", ".parquet, .csv, .jsonl, .json", ".zst"]),
    ("pairs.zip", b"PK", ["unknown ending '.zip'", "unpack it"]),
    ("pairs.pkl", b"x", ["pickles are never loaded"]),
    (
        "table.json",
        json.dumps({name: {"0": cell} for name, cell in ROW.items()}).encode(),
        ["row 1", "{role, content}"],
    ),
    ("numbers.json", b"[1, 2]", ["row 1", "not an object with the columns as keys"]),
    ("cut-array.json", json.dumps([ROW, ROW]).encode()[:-1], ["row 3", "does not end where its array does"]),
    ("cut-element.json", json.dumps([ROW, ROW]).encode()[:-9], ["row 2", "json"]),
    ("two-arrays.json", json.dumps([ROW]).encode() * 2, ["row 2", "does not end where its array does"]),
    ("cut.json.zst", zstd(json.dumps([ROW]).encode())[:-9], ["json", "Truncated"]),
    ("cut.jsonl.xz", lzma.compress(jsonl(ROW))[:-9], ["jsonl", "end-of-stream"]),
    ("cut.csv.bz2", bz2.compress(HEAD + GOOD)[:-9], ["csv", "end-of-stream"]),
    ("pairs", HEAD + GOOD, ["unknown ending ''"]),
    ("bars.csv", (HEAD + GOOD).replace(b",", b"|"), ["missing: a, b", "it has id|prompt"]),
    # ------------------------------------------------------------ columns
    (
        "no-prompt.jsonl",
        without("prompt"),
        ["missing: prompt", "it has id, response_a", "--columns prompt=NAME"],
    ),
    (
        "renamed.csv",
        HEAD.replace(b"response_a", b"answer_a") + GOOD,
        ["missing: a, b", "--columns a=answer_a b=response_b"],
    ),
    (
        "one-answer.jsonl",
        jsonl({"prompt": "q", "response": "a", "rating": 3}),
        ["one answer, response", "missing: a, b"],
    ),
    (
        "twice.csv",
        b"id,prompt,prompt,response_a,response_b\n1,a,b,c,d\n",
        ["column prompt: stands there twice"],
    ),
    (
        "twice.jsonl",
        second().replace(b'"r1",', b'"r1", "prompt": "z",'),
        ["row 2", "a key stands there twice"],
    ),
    ("two-winners.jsonl", second()[:-2] + b', "winner": "model_b"}', ["row 2", "twice", "winner"]),
    (
        "twice.parquet",
        parquet(pa.Table.from_arrays([pa.array(["1"])] * 5, names=[*list(ROW)[:4], "prompt"])),
        ["column prompt: stands there twice"],
    ),
    ("control.csv", b"id\x1b[31m,x\n1,2\n", ["missing: a, b", r"'id\x1b[31m'"]),
    ("short-row.csv", HEAD + GOOD + b"g2,q,a,b\n" + GOOD, ["row 2", "4 cells, the header has 5"]),
    ("long-row.csv", HEAD + GOOD + GOOD + b"g3,q,a,b,model_a,more\n", ["row 3", "6 cells"]),
    ("open-quote.csv", HEAD + GOOD + b'g2,"q,a,b,model_a\n' + GOOD * 9, ["row 2", "unexpected end"]),
    ("stray-quote.csv", HEAD + GOOD + b'g2,"q"x,a,b,model_a\n', ["row 2", "',' expected after '\"'"]),
    # ------------------------------------------------------------ texts that are none
    ("null.jsonl", raw(b"null"), [*TWO, "null is not text"]),
    ("null.parquet", parquet(columns(prompt=["q", None])), [*TWO, "null is not text"]),
    ("all-null.parquet", parquet(columns(prompt=[None, None])), ["row 1", "column prompt", "null"]),
    ("number.jsonl", raw(b"7"), [*TWO, "7 is not text"]),
    ("number.parquet", parquet(columns(prompt=[1, 2])), ["row 1", "column prompt", "1 is not text"]),
    ("huge.jsonl", raw(b"9" * 4000), [*TWO, "999"]),
    ("too-huge.jsonl", raw(b"9" * 5000), ["row 2", "4300 digits"]),
    ("nan.jsonl", raw(b"NaN"), [*TWO, "null is not text"]),
    ("infinity.jsonl", raw(b"-Infinity"), [*TWO, "-inf is not text"]),
    ("true.jsonl", raw(b"true"), [*TWO, "True is not text"]),
    ("list.jsonl", raw(b'["q"]'), [*TWO, "['q'] is not text"]),
    ("object.jsonl", raw(b'{"a": 1}'), [*TWO, "{'a': 1} is not text"]),
    ("deep.jsonl", raw(DEEP), ["row 2", "column prompt"]),
    ("too-deep.jsonl", raw(DEEP * 9), ["row 2"]),
    (
        "bytes.parquet",
        parquet(columns(prompt=[b"q", b"\xff"])),
        ["row 1", "column prompt", "b'q' is not text"],
    ),
    (
        "numbers.parquet",
        parquet(columns(prompt=[[1], [2]])),
        ["row 1", "column prompt", "[1] is not a list of texts"],
    ),
    # ------------------------------------------------------------ winners
    (
        "winner.csv",
        HEAD + GOOD + b"g2,q,a,b,model_c\n",
        ["row 2", "column winner", "'model_c' is neither", "--winner-words"],
    ),
    ("winner-empty.csv", HEAD + b"g2,q,a,b,\n", ["row 1", "column winner", "''"]),
    ("winner-null.jsonl", raw(b"null", "winner"), ["row 2", "column winner", "null"]),
    ("winner-number.jsonl", raw(b"1", "winner"), ["row 2", "column winner", "1 is neither"]),
    ("winner-late.csv", HEAD + GOOD + b'g2,q,a,b,"[0.5, 0.6]"\n', ["row 2", "column winner", "[0.5, 0.6]"]),
    ("sum.jsonl", jsonl({**ROW, "winner": [0.9, 0.9]}), ["row 1", "column winner", "probabilities"]),
    ("overflow.jsonl", jsonl({**ROW, "winner": [10**400, 0]}), ["row 1", "column winner", "[1000"]),
    (
        "both-win.jsonl",
        jsonl({**LMSYS, "winner_tie": 1}),
        ["row 1", "column winner_model_a", "not, with the other votes, one winner"],
    ),
    ("none-wins.jsonl", jsonl({**LMSYS, "winner_model_a": 0}), ["row 1", "column winner_model_a"]),
    ("vote.jsonl", jsonl(LMSYS | {"winner_tie": 10**400}), ["row 1", "column winner_model_a", "one winner"]),
    # ------------------------------------------------------------ ids
    ("id-null.jsonl", raw(b"null", "id"), ["row 2", "column id", "null is no id"]),
    ("id-half.jsonl", raw(b"1.5", "id"), ["row 2", "column id", "1.5 is no id"]),
    ("id-list.jsonl", raw(b"[1]", "id"), ["row 2", "column id", "[1] is no id"]),
    ("id-empty.csv", HEAD + b",q,a,b,model_a\n", ["row 1", "column id", "'' is no id"]),
    # ------------------------------------------------------------ conversations, cells of JSON
    ("turns.jsonl", jsonl(LMSYS, LMSYS | {"prompt": "q"}), [*TWO, "'q' is not a JSON list of turns"]),
    ("turns-deep.jsonl", jsonl(LMSYS, LMSYS | {"prompt": (DEEP * 9).decode()}), [*TWO, "not a JSON list"]),
    ("turns-number.jsonl", jsonl(LMSYS, LMSYS | {"prompt": "[1]"}), [*TWO, "'[1]'"]),
    ("turns-nan.jsonl", jsonl(LMSYS, LMSYS | {"prompt": "[NaN]"}), [*TWO, "'[NaN]'"]),
    ("role.jsonl", jsonl(CHOSEN, CHOSEN | {"chosen": [{"content": "q"}]}), ["row 2", "column chosen"]),
    (
        "turn.jsonl",
        jsonl(CHOSEN, CHOSEN | {"rejected": ["q"]}),
        ["row 2", "column rejected", "one answer has roles"],
    ),
    ("dialogue.jsonl", jsonl(CHOSEN | {"chosen": "no marks"}), ["columns chosen (text) and rejected (list)"]),
    (
        "no-start.jsonl",
        jsonl({"chosen": "yes", "rejected": "no"}),
        ["missing: prompt", "--columns prompt=NAME"],
    ),
    (
        "role-unknown.jsonl",
        jsonl(*[{"chosen": [{"role": "narrator", "content": "q"}], "rejected": TALK, "prompt": "q"}]),
        ["row 1", "column chosen", "narrator"],
    ),
    ("name.jsonl", jsonl({"prompt\n": None, **TWO_TEXTS}), ["row 1, column prompt?: null"]),
    ("inner-name.jsonl", jsonl({"prompt": {"\x1f": ""}, **TWO_TEXTS}), ["--columns prompt=prompt.? would"]),
    ("halves.jsonl", jsonl(ROW | {"winner": [30, 70]}), ["row 1", "column winner", "probabilities"]),
    ("talk-deep.jsonl", jsonl(ARENA).replace(b'"q"', DEEP, 1), ["row 1", "column conversation_a"]),
    (
        "scores.jsonl",
        jsonl(CHOSEN | {"score_chosen": [1, 2], "score_rejected": [1, 2]}),
        ["row 1", "column score_chosen", "[1, 2] is no number"],
    ),
]

SCORED = [  # what is wrong with a cell of such a row is told by these words
    ({"score_a": 1, "score_b": 2}, ["column score_b", "no number"]),
    ({"preference_strength": 1}, ["column preference_strength", "no number"]),
    ({"winner_model_b": 1, "winner_model_a": 0}, ["column winner_model_a", "one winner"]),
    ({"winner": [0.5, 0.5]}, ["column winner", "probabilities"]),
    ({"responses": ["a", "b"], "scores": [1, 2]}, ["column responses", "score or rank each"]),
    ({"answers": [{"text": "a", "score": 1}] * 2}, ["column answers", "score or rank each"]),
]
for good, words in SCORED:
    for bad in (float("nan"), "nan", None):
        key, cell = list(good.items())[-1]
        cell = {"text": "b", "score": bad} if key == "answers" else bad
        bad_row = good | {key: [good[key][0], cell] if isinstance(good[key], list) else cell}
        rows = [
            {"prompt": "q"} | ({} if key in ("scores", "answers") else TWO_TEXTS) | row
            for row in (good, bad_row)
        ]
        REFUSED.append((f"{key}-{bad!r}.jsonl", jsonl(*rows), ["row 2", *words]))


def csv_of(prompt: str, encoding: str = "utf-8", end: str = "\n") -> bytes:
    quoted = prompt.replace('"', '""')
    return f'id,prompt,response_a,response_b,winner{end}r1,"{quoted}",a,b,model_a{end}'.encode(encoding)


ODD = {  # texts that people and programs do write: all are taken as they are
    "one": "x",
    "million": "long text " * 100_000,
    "million-without-a-space": "x" * 1_000_000,
    "white": " \t \n ",
    "empty": "",
    "nul": "a\0b",
    "control": "\x01\x1b[31m\x7f\x85",
    "right-to-left": "\u202eabc\u202c שלום\u200f",
    "emoji": "👩‍👩‍👧‍👦🏳️‍🌈🫠",
    "combining": "Z" + "\u0301" * 500,
    "not-a-character": "\uffff\ufdd0\U0010ffff",
    "separators": "a\u2028b\u2029c\x0b\x0c\x1cd",
    "carriage": "a\r\nb\rc",
    "null-words": "None",
    "marks": "<prompt>: x\n\n<response_a>: y\n\n<response_b>: z",
    "special": "<eos><bos><pad></s><|endoftext|>",
}
ACCEPTED = [(f"{name}.jsonl", jsonl({**ROW, "prompt": text}), {"prompt": text}) for name, text in ODD.items()]
ACCEPTED += [(f"{name}.csv", csv_of(text), {"prompt": text}) for name, text in ODD.items()]
ACCEPTED += [
    (
        f"{name}.parquet",
        parquet({key: [cell] for key, cell in {**ROW, "prompt": text}.items()}),
        {"prompt": text},
    )
    for name, text in ODD.items()
]
ACCEPTED += [
    ("half-a-pair.jsonl", raw(b'"\\ud83d"'), {"id": "g1"}),
    ("byte-order-mark.csv", csv_of("q", "utf-8-sig"), {"id": "r1", "prompt": "q"}),
    ("byte-order-mark.jsonl", b"\xef\xbb\xbf" + jsonl(ROW), {"id": "r1"}),
    ("windows.csv", csv_of("q", end="\r\n"), {"prompt": "q", "label": 1.0}),
    ("old-mac.csv", csv_of("q", end="\r"), {"prompt": "q", "label": 1.0}),
    ("no-last-line-end.csv", csv_of("q")[:-1], {"prompt": "q"}),
    ("blank-lines.csv", csv_of("q").replace(b"\n", b"\n\n\n"), {"prompt": "q"}),
    ("CAPITALS.CSV", csv_of("q"), {"prompt": "q"}),
    ("spaces.csv", HEAD.replace(b",prompt", b", prompt") + GOOD, {"prompt": "q", "label": 1.0}),
    ("capitals.csv", HEAD.replace(b"prompt", b"Prompt") + GOOD, {"prompt": "q", "label": 1.0}),
    ("no-id.jsonl", without("id"), {"prompt": "q", "label": 1.0}),
    ("semicolons.csv", (HEAD + GOOD).replace(b",", b";"), {"prompt": "q", "label": 1.0}),
    ("pairs.tsv", (HEAD + GOOD).replace(b",", b"\t"), {"prompt": "q", "label": 1.0}),
    ("pairs.json", jsonl(ROW), {"prompt": "q", "label": 1.0}),
    ("pairs.ndjson", jsonl(ROW), {"prompt": "q", "label": 1.0}),
    ("array.json", json.dumps([ROW], indent=1).encode(), {"prompt": "q", "label": 1.0}),
    ("array.jsonl", json.dumps([ROW]).encode(), {"prompt": "q", "label": 1.0}),
    ("array-mark.json", b"\xef\xbb\xbf\n [" + json.dumps(ROW).encode() + b"\n]\n", {"prompt": "q"}),
    ("indented.jsonl", json.dumps(ROW, indent=1).encode() * 2, {"prompt": "q", "label": 1.0}),
    ("pairs.jsonl.bz2", bz2.compress(jsonl(ROW)), {"prompt": "q", "label": 1.0}),
    ("pairs.csv.xz", lzma.compress(HEAD + GOOD), {"prompt": "q", "label": 1.0}),
    ("pairs.json.zst", zstd(json.dumps([ROW]).encode()), {"prompt": "q", "label": 1.0}),
    ("pairs.parquet.gz", gzip.compress(WHOLE), {"prompt": "q", "label": 1.0}),
    ("file.arrow", arrow(pa.ipc.new_file), {"prompt": "q", "label": 1.0}),
    ("stream.arrow", arrow(pa.ipc.new_stream), {"prompt": "q", "label": 1.0}),
    ("two-winners-soft.csv", HEAD + GOOD + b'g2,q,a,b,"[0.5, 0.5]"\n', {"label": 1.0}),
    ("lists.parquet", parquet(columns(prompt=[["q"], ["q"]])), {"prompt": "q"}),
    ("id-huge.jsonl", jsonl({**ROW, "id": 10**30}), {"id": str(10**30)}),
    ("id-negative.jsonl", jsonl({**ROW, "id": -1}), {"id": "-1"}),
    ("more-columns.jsonl", jsonl({**ROW, "label": [], "row": 3, "file": {}, "pseudo": 1}), {"label": 1.0}),
    (
        "one-of-three-winners.jsonl",
        jsonl({k: LMSYS[k] for k in [*LMSYS][:4]} | {"winner_tie": 0}),
        {"prompt": "q"},
    ),
    ("metadata.parquet", parquet(PANDAS), {"id": "r1"}),
    ("id-is-the-index.parquet", (pd.DataFrame(columns()).set_index("id").to_parquet()), {"id": "r1"}),
    ("words-once.parquet", parquet(columns(winner=ONCE)), {"label": 1.0}),
    ("large.parquet", parquet(columns(prompt=pa.array(["q", "q"], pa.large_string()))), {"prompt": "q"}),
    ("view.parquet", parquet(columns(prompt=pa.array(["q", "q"], pa.string_view()))), {"prompt": "q"}),
]

"""How fast files become token ids, where the time goes, and in how much memory.

    python benchmarks/read_speed.py --data train.parquet --repeat 25 --tokenizer SmolLM2-135M

Reads, repairs and tokenises the rows of --data, repeated, with ids of their own, to the size of interest.
Each stage says rows/s, CPU seconds of this process (all threads; the pool's are not in it), and the most
anonymous memory of this process and its children up to its end. Then, for comparison, on --sample rows: ftfy
in one process, ftfy on every text (no shortcut for plain ASCII), the other order, the middle cut, and the
three texts tokenised apart. The last line is one JSON object. Linux.
"""

import argparse
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import ftfy
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.random_base import print_result
from minarena.data import TEXTS, swapped
from minarena.files.pairs import read_pairs
from minarena.files.repair import repaired
from minarena.files.tokenizer import load_tokenizer
from minarena.text import encode


def anonymous_bytes() -> int:
    """RssAnon of this process and all below it: mapped file pages do not count."""
    children, total = {}, 0
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        except (OSError, ValueError):
            continue  # it has just ended
        children.setdefault(int(fields["PPid"]), []).append((int(status.parent.name), fields))
        if int(status.parent.name) == os.getpid():
            total = int(fields["RssAnon"].split()[0])
    below = [os.getpid()]
    while below:
        for pid, fields in children.get(below.pop(), []):
            below.append(pid)
            total += int(fields.get("RssAnon", "0").split()[0])
    return total * 1024


def watch(peak: list[int]) -> None:
    while True:
        peak[0] = max(peak[0], anonymous_bytes())
        time.sleep(0.2)


def write_repeated(source: str, repeat: int, path: str) -> int:
    """`repeat` copies of a file's rows in the competition's columns, copy by copy; returns the bytes."""
    frame = pd.read_parquet(source, columns=["id", *TEXTS, "winner"])
    writer = None
    for copy in range(repeat):
        batch = pa.Table.from_pandas(frame.assign(id=[f"{copy}-{i}" for i in frame["id"]]))
        writer = writer or pq.ParquetWriter(path, batch.schema, use_dictionary=False)  # as if all differed
        writer.write_table(batch)
    writer.close()
    return Path(path).stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="parquet file in the competition's columns")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--tokenizer", required=True, help="model folder")
    parser.add_argument("--max-length", type=int, default=2200)
    parser.add_argument("--sample", type=int, default=4000, help="rows of the comparisons")
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.tokenizer)
    peak = [anonymous_bytes()]
    threading.Thread(target=watch, args=(peak,), daemon=True).start()
    result = {"cores": os.cpu_count(), "before_gib": round(peak[0] / 2**30, 2), "stages": {}}

    def timed(name: str, rows: int, work):
        start, cpu = time.perf_counter(), time.process_time()
        done = work()
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        stage = {"seconds": round(seconds, 1), "rows_per_second": round(rows / seconds)}
        stage["cpu_seconds"] = round(cpu, 1)
        result["stages"][name] = stage | {"peak_gib": round(peak[0] / 2**30, 2)}
        print(f"{name:32} {result['stages'][name]}", file=sys.stderr)
        return done

    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/pairs.parquet"
        size = write_repeated(options.data, options.repeat, path)
        rows = pq.ParquetFile(path).metadata.num_rows
        table = timed("read", rows, lambda: read_pairs([path], ties="drop", bar=tqdm))
    table = timed("repair, all cores", rows, lambda: repaired(table, os.cpu_count()))
    ids = timed("tokenise, order ab", rows, lambda: encode(tokenizer, table, options.max_length))
    result |= {"rows": rows, "file_gib": round(size / 2**30, 3), "peak_by_file": round(peak[0] / size, 1)}
    result["tokens_a_row"] = round(sum(map(len, ids)) / len(ids))
    del ids

    some = table.head(options.sample)
    n, mirrored = len(some), swapped(some)
    texts = [text for column in TEXTS for text in some[column]]
    timed("repair, one process", n, lambda: repaired(some, 1))
    timed("repair, ftfy on every text", n, lambda: [ftfy.fix_text(text) for text in texts])
    timed("tokenise, order ba", n, lambda: encode(tokenizer, mirrored, options.max_length))
    timed("tokenise, --truncation middle", n, lambda: encode(tokenizer, some, options.max_length, "middle"))
    apart = [texts[i : i + 1024] for i in range(0, len(texts), 1024)]
    timed("tokenise, three texts apart", n, lambda: [tokenizer(batch, verbose=False) for batch in apart])
    print_result(vars(options), result)


if __name__ == "__main__":
    main()

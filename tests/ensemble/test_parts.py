"""A long inference can be stopped at any moment; the same command goes on, the output is whole or not there.

infer.py --adapter DIR... --data FILE --pseudo pseudo.parquet    parts of PART rows in pseudo.parquet.parts/
open_parts(folder, run), stored_part(...), store_part(...), write_whole(table, path)

Compared with: the labels of uninterrupted runs, and a count of the rows that the model was given. Interrupted
by SIGKILL, by an error at each flush and each rename, by damaged and by foreign parts.
"""

import os
import random
import signal
from pathlib import Path

import children
import numpy as np
import pandas as pd
import pytest
from helpers import counted, label_file, rows_of_all_lengths, write_pairs

import infer
from minarena.ensemble.parts import store_part, stored_part
from minarena.files import durable


def labelling(runs, tmp_path, out="pseudo.parquet") -> list[str]:
    data = write_pairs(tmp_path / "rows.parquet", rows_of_all_lengths())
    return ["--adapter", *runs, "--tta", "all", "--data", data, "--pseudo", str(tmp_path / out)]


# in the midst of the fourth part; instead of a later one's rename; between another's rename and its flush
KILLS = [(children.signal_in_part, 4, signal.SIGKILL)]
KILLS += [(children.kill_in_small_parts, number) for number in (8, 9)]


def test_after_kill_9_the_same_command_goes_on_and_gives_the_same_labels(
    runs, tmp_path, small_parts, monkeypatch
):
    infer.main(labelling(runs, tmp_path, "straight.parquet"))
    words, out = labelling(runs, tmp_path), tmp_path / "pseudo.parquet"
    folder, before = Path(f"{out}.parts"), 0
    for fault, *arguments in KILLS:
        code, said = children.run("infer", words, fault, *arguments)
        assert code == -signal.SIGKILL, said
        done = len([*folder.glob("?-??-*.parquet")])
        assert before < done < 20 and not out.exists()
        before = done
    calls = counted(monkeypatch)
    infer.main(words)
    assert len(calls) == 20 - done  # 23 rows in parts of 5 are 5 parts, in four passes
    assert label_file(out) == label_file(tmp_path / "straight.parquet")
    assert not folder.exists()


def test_a_crash_at_any_write_loses_only_the_part_at_work(runs, tmp_path, small_parts, monkeypatch, capsys):
    """Each flush and each rename fails once; the label file is whole or not there, and the last run ends."""
    infer.main(labelling(runs, tmp_path, "straight.parquet"))
    words, out = labelling(runs, tmp_path), tmp_path / "pseudo.parquet"
    calls = counted(monkeypatch)
    crashes = 0
    for name in ("flush_to_disk", "replace"):
        owner = durable if name == "flush_to_disk" else os
        real = getattr(owner, name)
        for survived in range(0, 60, 3):
            left = [survived]

            def failing(*arguments, real=real, left=left):
                left[0] -= 1
                if left[0] < 0:
                    raise OSError(28, "No space left on device")
                return real(*arguments)

            monkeypatch.setattr(owner, name, failing)
            try:
                infer.main(words)
            except OSError:
                crashes += 1
                assert not out.exists() or label_file(out)
            finally:
                monkeypatch.setattr(owner, name, real)
            if out.exists():
                break
        assert label_file(out) == label_file(tmp_path / "straight.parquet")
        out.unlink()
        for path in Path(f"{out}.parts").glob("*") if Path(f"{out}.parts").exists() else []:
            path.unlink()
    assert crashes >= 6 and len(calls) <= 2 * 20 + crashes


def test_a_damaged_part_is_computed_again_and_one_of_other_rows_is_not_taken(
    runs, tmp_path, small_parts, monkeypatch, capsys
):
    infer.main(labelling(runs, tmp_path, "straight.parquet"))
    words, out = labelling(runs, tmp_path), tmp_path / "pseudo.parquet"
    with monkeypatch.context() as patch:
        patch.setattr(infer, "write_labels", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            infer.main(words)
    folder = Path(f"{out}.parts")
    damaged, strange = folder / "0-ab-00001.parquet", folder / "1-ba-00002.parquet"
    damaged.write_bytes(damaged.read_bytes()[:100])
    strange.write_bytes((folder / "1-ba-00003.parquet").read_bytes())
    calls = counted(monkeypatch)
    infer.main(words)
    assert calls == [5, 5] and "0-ab-00001.parquet is damaged" in capsys.readouterr().err
    assert label_file(out) == label_file(tmp_path / "straight.parquet")


def test_parts_of_another_run_are_refused_by_name(runs, tmp_path, small_parts, monkeypatch):
    words = labelling(runs, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(infer, "write_labels", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            infer.main(words)
    with pytest.raises(ValueError, match="holds parts of a run with another max_length"):
        infer.main([*words, "--max-length", "100"])
    with pytest.raises(ValueError, match="with another truncation"):
        infer.main([*words, "--truncation", "middle"])
    other = [word if word != runs[1] else f"{runs[1]}:ab" for word in words]
    with pytest.raises(ValueError, match="with another adapter"):
        infer.main(other)
    write_pairs(tmp_path / "rows.parquet", rows_of_all_lengths().head(20))
    with pytest.raises(ValueError, match="with another data"):
        infer.main(words)


def test_a_long_submission_is_resumed_too(runs, tmp_path, small_parts, monkeypatch):
    data = write_pairs(tmp_path / "rows.csv", rows_of_all_lengths())
    words = ["--adapter", runs[0], "--data", data, "--out", str(tmp_path / "s.csv")]
    with monkeypatch.context() as patch:
        patch.setattr(infer, "write_whole", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            infer.main(words)
    calls = counted(monkeypatch)
    infer.main(words)
    assert calls == [] and list(pd.read_csv(tmp_path / "s.csv")["id"]) == list(rows_of_all_lengths()["id"])


def test_a_disk_that_fills_while_the_labels_are_written_leaves_no_half_of_them(runs, tmp_path, monkeypatch):
    words, out = labelling(runs, tmp_path), tmp_path / "pseudo.parquet"

    def half(table, path, **_):
        Path(path).write_bytes(b"PAR1")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pd.DataFrame, "to_parquet", half)
        with pytest.raises(OSError, match="No space left"):
            infer.main(words)
    assert not out.exists()
    infer.main(words)
    assert len(label_file(out)) == 23


def test_ctrl_c_says_how_to_go_on_and_the_same_command_does(runs, tmp_path, small_parts, monkeypatch):
    infer.main(labelling(runs, tmp_path, "straight.parquet"))
    words, out = labelling(runs, tmp_path), tmp_path / "pseudo.parquet"
    code, said = children.run("infer", words, children.signal_in_part, 4, signal.SIGINT)
    assert code == 130 and "Traceback" not in said and not out.exists()
    assert said.splitlines()[-1].startswith("infer.py: stopped; the same command goes on")
    calls = counted(monkeypatch)
    infer.main(words)
    assert len(calls) == 20 - 3
    assert label_file(out) == label_file(tmp_path / "straight.parquet")


def test_sigterm_loses_only_the_part_at_work(runs, tmp_path, small_parts, monkeypatch):
    words, out = labelling(runs, tmp_path), tmp_path / "pseudo.parquet"
    code, said = children.run("infer", words, children.signal_in_part, 4, signal.SIGTERM)
    assert code == -signal.SIGTERM and "Traceback" not in said and not out.exists()  # a shell calls it 143
    calls = counted(monkeypatch)
    infer.main(words)
    assert len(calls) == 20 - 3 and len(label_file(out)) == 23


def test_a_full_disk_is_said_in_one_line_and_what_is_done_stays(runs, tmp_path):
    """Parts have room, the label file, which holds the texts, has none."""
    words, out = labelling(runs, tmp_path), tmp_path / "pseudo.parquet"
    code, said = children.run("infer", words, children.small_files, 4000)
    assert code == 1 and "Traceback" not in said
    assert said.splitlines()[-1].startswith(f"infer.py: {out}: not written: [Errno 27]")
    assert not list(tmp_path.glob("pseudo*"))


def test_one_flipped_bit_in_a_part_never_passes_for_its_numbers(tmp_path, capsys):
    """Every third byte: what it leaves is refused, or what it holds is what was stored."""
    ids, p = pd.Series([f"row-{i}" for i in range(50)]), np.random.default_rng(0).random(50)
    store_part(tmp_path, "0-ab-00000", ids, p)
    path, draw, refused = tmp_path / "0-ab-00000.parquet", random.Random(0), 0
    whole = path.read_bytes()
    for at in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        stored = stored_part(tmp_path, "0-ab-00000", ids)
        refused += stored is None
        assert stored is None or np.array_equal(stored, p), at
    path.write_bytes(whole)
    assert np.array_equal(stored_part(tmp_path, "0-ab-00000", ids), p)
    assert refused > len(whole) / 3 / 4  # the rest is a header that describes, and decides nothing


def test_parts_without_their_record_are_not_taken(runs, tmp_path, small_parts, monkeypatch):
    """A finished run's folder that was half deleted, then another run under the same name."""
    infer.main(labelling(runs[::-1], tmp_path, "straight.parquet"))
    with monkeypatch.context() as patch:
        patch.setattr(infer, "write_labels", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            infer.main(labelling(runs, tmp_path))
    (tmp_path / "pseudo.parquet.parts" / "run.json").unlink()
    infer.main(labelling(runs[::-1], tmp_path))
    assert label_file(tmp_path / "pseudo.parquet") == label_file(tmp_path / "straight.parquet")


def test_a_damaged_record_is_named_with_the_remedy(runs, tmp_path, small_parts, monkeypatch):
    words = labelling(runs, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(infer, "write_labels", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            infer.main(words)
    for text in ("{", "[1]", ""):
        (tmp_path / "pseudo.parquet.parts" / "run.json").write_text(text)
        with pytest.raises(ValueError, match=r"pseudo\.parquet\.parts/run\.json is damaged: .*delete"):
            infer.main(words)

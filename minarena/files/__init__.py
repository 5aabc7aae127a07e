"""Disk, other people's files and ours: everything that is read or written.

    pairs.py, layouts.py     data files -> the table of pairs, by
      sources.py formats.py    what --data names -> files -> rows with the file's own columns
      columns.py cells.py      what a column is by its name; what a cell says
      verdicts.py              which answer won
    repair.py                mojibake and control characters in their texts
    base.py, shards.py       a base's folder: checked, fetched, loaded; its safetensors files
    tokenizer.py             a base's tokenizer, with tokenizer.json's own ids
    fingerprint.py           what a base is, by contents and not by name
    adapter.py               LoRA and head in PEFT's format
    outliers.py              --matmul int8: the columns of a base that are not rounded
    durable.py, lock.py      a file is whole under its name, or it is not there; one command a folder
    checkpoint.py, resume.py what a run saves, and going on with it
    run.py                   a run's folder: claim, log, checkpoints, result

Imports the method and runtime, never fast: what is on a disk does not depend on how fast it is computed.
"""

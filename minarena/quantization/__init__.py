"""A base -> an 8-bit folder, a matrix at a time.

    stream.py    read, merge, quantize, write; memory does not grow with the model
    merge.py     an earlier LoRA adapter as a merge needs it: PEFT's settings, all of them or a refusal

Imports the method, runtime and files; never fast, ensemble or report.
"""

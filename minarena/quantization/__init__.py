"""A base -> an 8-bit folder, or a judge's, a matrix at a time.

    stream.py        read, merge, quantize, write; memory does not grow with the model
    merge.py         an earlier LoRA adapter as a merge needs it: PEFT's settings, all of them or a refusal
    classifier.py    a run with a linear head as one folder to serve: labels, tokenizer, model card

Imports the method, runtime and files; never fast, ensemble or report.
"""

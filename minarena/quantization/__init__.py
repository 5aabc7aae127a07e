"""A base -> an 8-bit folder, or a judge's, a matrix at a time.

    stream.py    read, merge, quantize, write; memory does not grow with the model
    classifier.py   a run with a linear head as one folder to serve: labels, tokenizer, model card
    merge.py     an earlier LoRA adapter as a merge needs it: PEFT's settings, all of them or a refusal

Imports the method, runtime and files; never fast, ensemble or report.
"""

"""K adapters over one base: their probabilities, averaged and joined by id.

    judge.py            load_judge: a judge from Python, of one pair, lists or n answers
    adapters.py         their folders, and the options and base that all of them agree on
    predict.py          every adapter in the order it was trained in, or in both
    parts.py            a long inference in parts, each saved when it is done
    pseudo_labels.py    probabilities as soft labels, for new rows or for the training rows

Imports the method, runtime, files and fast; never quantization or report.
"""

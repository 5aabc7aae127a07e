"""K adapters over one base: their probabilities, averaged and joined by id.

    predict.py          every adapter in the order it was trained in, or in both
    parts.py            a long inference in parts, each saved when it is done
    pseudo_labels.py    probabilities as soft labels, for new rows or for the training rows

Imports the method, runtime, files and fast; never quantization or report.
"""

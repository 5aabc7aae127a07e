"""What runs learnt, on one page: `python -m minarena.report runs/ab runs/ba`.

    __main__.py       the command: options, and the page's sections in order
    runs.py           runs as train.py left them, joined to what the data files say
    predictors.py     what predicts the labels: runs in each order, their ensemble, --probs files
    words.py          estimates with standard errors, and verdicts on differences
    reliability.py    calibration, position, length, as plain functions
    figures.py        what is computed for each question
    summary.py        the page's beginning: one answer, five figures, where they come from
    sections.py       training, quality, calibration, position, length: drawings and captions
    groups.py         weak groups, and the rows that went most wrong
    page.py           figures, tables and texts as HTML; report.html is the template

A leaf: deleting it breaks nothing. Imports the method, runtime and files; never fast, ensemble or
quantization.
"""

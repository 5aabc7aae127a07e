"""What runs learnt, on one page: `python -m minarena.report runs/ab runs/ba`.

    __main__.py       the questions, in page order: a figure and a sentence each
    runs.py           what runs left behind, joined to what the data files know
    reliability.py    calibration, position, length, as plain functions
    page.py           figures and tables as HTML; report.html is its template

A leaf: deleting it breaks nothing. Imports the method, runtime and files; never fast, ensemble or
quantization.
"""

"""
The report of a training run: what ran, with which settings, how long, and with what result.

    sessions.py    records each start of a stage and how it ended; rewrites the report then
    reader.py      reads everything that a run has logged into one plain data structure
    page.html      draws this data structure: embedded in report.html, or fetched again and again from server.py
    files.py       writes report.html and report.md
    plots.py       draws the curves of report.md with matplotlib
    server.py      serves the page on this machine while a run trains

A run is what led to one model: a tag in a base folder, with the earlier stages that its model started from.
"""

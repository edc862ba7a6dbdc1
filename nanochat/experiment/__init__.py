"""
Experiments: many training runs, and what may be concluded from them. `python -m scripts.experiment` uses these modules.

    statistics.py    tests of differences, compute multipliers, scaling laws; pure functions
    trials.py        starts the runs, in turns or over the GPUs of a node, and keeps their results
    page.py          the results as one HTML page with charts
"""

"""How far an engine is from the checkpoint it was compiled from, and what either costs.

    compare.py      the whole comparison on one screen
    worker.py       a process of its own for each side, so that time and memory are its own
    reference.py, engine.py    what the two processes run
    metrics.py      cosine, maximum error, SQNR, jerk
    joints.py       the same for each joint, in its units and as a share of its range
    thresholds.py   the verdict: pass, look or fail
    provenance.py   date, versions, machine
    charts.py, report.py, report.html    the HTML report

Nothing is imported here: the engine's process must come up without PyTorch.
"""

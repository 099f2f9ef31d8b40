"""Speed, bytes and memory, each as a ratio to plain code on the same work in the same run.

    python -m tests.benchmarks                          what there is
    python -m tests.benchmarks label store --json       whole groups, one JSON object a line for each figure
    python -m tests.benchmarks label.cold --pairs 3     one figure

A benchmark is a function of :class:`common.Settings` that gives a :class:`common.Figure`, registered with
``@benchmark(name)``; every module of this package is imported, so a new file is found by being there.
"""

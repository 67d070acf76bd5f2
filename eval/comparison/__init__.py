"""Runs side by side, from what they left on disk. Nothing is measured here and torch is not loaded.

runs.py          run directories and studies → runs, and runs that differ in their seed alone → configurations
comparable.py    refuses what cannot be compared, with the reasons
measures.py      what is compared, and which way it is good
columns.py       a run's measures, item by item, from its files
curves.py        the held-out check over a run's steps
flips.py         sign-flip tests and bootstrap intervals of differences, item by item
paired.py        statistics of two configurations on the same items
differences.py   measures → estimates, differences against the baseline, a ranking
cost.py          what each configuration took, and the Pareto front
verdict.py       the answer in words
result.py        comparison.json
tables.py        comparison.md
"""

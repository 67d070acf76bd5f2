"""Many runs under one budget: a grid of recipes, resumable.

    definition.py   the study file: what it may say, and what is wrong with it
    grid.py         study → runs, each with a checked recipe and a hash
    progress.py     what has been done: the folders of the runs and their logs
    timing.py       how long it will take
    record.py       study.json
    commands.py     what a user would type to train, to evaluate and to compare
    execution.py    starts the runs, side by side, and stops them
    plan.py         memory of every run, in a process of its own
    tables.py       what the user sees
    __main__.py     the command

The study's own process loads no torch: every run is a command, as a user would type it.
"""

"""The four datasets, one module each: which files, which splits, and how a row becomes a Record.

A new dataset is one module with a `SOURCE`, and its name in `NAMES`.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.schema import Record

# In the order in which they claim a question that several of them ask; append new ones at the end.
NAMES = ("medqa", "medmcqa", "pubmedqa", "pubhealth")

# What the rows of a split are for.
POOL = "pool"  # become long-form questions to train on
BENCHMARK = "benchmark"  # held out, multiple choice
RESERVE = "reserve"  # neither: few-shot examples, FidelityBench-Med
PASSAGES = "passages"  # unlabelled text, for MedPPL-10k
UNLABELLED = "unlabelled"  # of no use: the right answers were never published


@dataclass(frozen=True)
class Hub:
    """Files of a dataset on the hub, at a revision that does not move.

    Args:
        files: Glob patterns of the files needed.
    """

    repository: str
    revision: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class DataFile:
    """A file of rows, and the split it holds."""

    path: Path
    split: str


@dataclass(frozen=True)
class Source:
    """A dataset.

    Args:
        splits: `(pattern, split)`: the first pattern found in a file's name, or else in that of its
            nearest folder, names the split it holds; None marks files without rows, by path.
        roles: What each split's rows are for. A split may also be told row by row: `normalise` has
            the last word on `Record.split`.
        normalise: `(row, split, facts) -> Record`; raises `BadRow` or `Dropped`.
        survey: `(folder, files) -> facts`: what `normalise` must know that no single row tells.
    """

    name: str
    hub: Hub
    splits: tuple[tuple[str, str | None], ...]
    roles: dict[str, str]
    normalise: Callable[[dict, str, Any], Record]
    survey: Callable[[Path, list[DataFile]], Any] = lambda folder, files: None


def load(name: str) -> Source:
    return importlib.import_module(f"data_prep.sources.{name}").SOURCE

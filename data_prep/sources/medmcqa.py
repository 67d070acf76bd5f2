"""MedMCQA (Pal et al. 2022, arXiv 2203.14371).

The release counts the right option `cop` from 1, the hub from 0 (and writes -1 in its test split,
whose answers were never published, as were the release's). No single row tells which; all rows do.
"""

import re
from pathlib import Path

from data_prep.reading import read_rows
from data_prep.schema import Record
from data_prep.sources import BENCHMARK, POOL, UNLABELLED, DataFile, Hub, Source
from data_prep.sources.rows import (
    BadRow,
    Dropped,
    clean,
    content_id,
    identity,
    index,
    optional_text,
    text,
)
from medistill_trl.errors import UserError

OPTIONS = ("opa", "opb", "opc", "opd")
_COP = re.compile(r'"cop"\s*:\s*(-?\d+)')


def first_option_number(folder: Path, files: list[DataFile]) -> int:
    """What `cop` counts from: 1 if more rows say 4 than 0, else 0.

    Raises:
        UserError: if no labelled row says either, so that nobody can tell.
    """
    zeros = fours = labelled = 0
    for file in files:
        if file.split == "test":
            continue
        for row in read_rows(file.path):
            found = _COP.search(row["text"])
            labelled += found is not None
            zeros += found is not None and found[1] == "0"
            fours += found is not None and found[1] == "4"
    if labelled and zeros == fours:
        raise UserError(
            f"{folder}: cannot tell whether cop counts from 0 (the hub) or 1 (the release): it is 0 in "
            f"{zeros} rows and 4 in {fours}. Give the whole file, or one of a single schema."
        )
    return 1 if fours > zeros else 0


def normalise(row: dict, split: str, first: int) -> Record:
    question = text(row, "question")
    options = tuple(_option(row, key) for key in OPTIONS)
    if split == "test":
        raise Dropped("the test split's answers were never published")
    if row.get("cop") is None:
        raise BadRow("has no cop")
    return Record(
        source="medmcqa",
        split=split,
        native_id=identity(row, "id") or content_id(question, *options),
        question=question,
        options=options,
        answer=index(row["cop"], "cop", len(OPTIONS), first),
        explanation=optional_text(row, "exp"),
        subject=optional_text(row, "subject_name") or None,
    )


def _option(row: dict, key: str) -> str:
    """An option's text; a number that lost its quotation marks stays what it was."""
    value = row.get(key)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    option = clean(value, key)
    if not option:
        raise Dropped("has an empty option")
    return option


SOURCE = Source(
    name="medmcqa",
    hub=Hub(
        "openlifescienceai/medmcqa",
        "91c6572c454088bf71b679ad90aa8dffcd0d5868",
        ("data/*.parquet",),
    ),
    splits=(("train", "train"), ("dev|valid", "validation"), ("test", "test")),
    roles={"train": POOL, "validation": BENCHMARK, "test": UNLABELLED},
    normalise=normalise,
    survey=first_option_number,
)

"""MedMCQA (Pal et al. 2022, arXiv 2203.14371).

The release counts the right option `cop` from 1, the hub from 0 (and writes -1 in its test split,
whose answers were never published, as were the release's). No single row tells which; a whole split does.
"""

import re
from collections import Counter
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
FEWEST_ROWS = 12  # in which it would be odd (3 %) to find no first, or no last, option right
MOST_STRAY = 0.05  # of the rows that say 0 or 4, those that contradict the others
_COP = re.compile(r'"cop"\s*:\s*(-?\d+)')


def first_option_numbers(folder: Path, files: list[DataFile]) -> dict[str, int]:
    """What `cop` counts from in each split: 1 where rows say 4, 0 where rows say 0.

    A small split that says neither counts as the other one does.

    Raises:
        UserError: if a split says both or neither, so that nobody can tell.
    """
    seen = {split: _cops(files, split) for split in sorted({f.split for f in files} - {"test"})}
    told = {split: _counts_from(cops) for split, cops in seen.items()}
    others = {first for first in told.values() if first is not None}
    for split, cops in seen.items():
        if told[split] is None and cops.total() < FEWEST_ROWS and len(others) == 1:
            told[split] = others.copy().pop()
        if told[split] is None and cops:
            raise UserError(
                f"{folder}, {split}: cannot tell whether cop counts from 0 (the hub) or 1 (the release): it "
                f"is 0 in {cops['0']} rows and 4 in {cops['4']} of {cops.total()}. Give a whole file of one "
                "schema."
            )
    return told


def _cops(files: list[DataFile], split: str) -> Counter[str]:
    rows = (row for file in files if file.split == split for row in read_rows(file.path))
    return Counter(found[1] for row in rows if (found := _COP.search(row["text"])))


def _counts_from(cops: Counter[str]) -> int | None:
    """0, 1 or, where the rows do not tell, None; a few stray numbers among many are bad rows."""
    few, many = sorted((cops["0"], cops["4"]))
    if not many or few > MOST_STRAY * many:
        return None
    return 1 if cops["4"] == many else 0


def normalise(row: dict, split: str, first: dict[str, int]) -> Record:
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
        answer=index(row["cop"], "cop", len(OPTIONS), first[split]),
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
    survey=first_option_numbers,
)

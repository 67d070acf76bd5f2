"""The benchmark files of the data build, as lm-eval's tasks read them (`custom_dataset`)."""

from pathlib import Path

from datasets import Dataset

from eval.data_files import ADVICE, benchmark_files, read_rows
from medistill_trl.errors import UserError

REQUIRED = ("id", "question", "options", "answer")
OPTIONAL = ("context", "subject")
COLUMNS = {
    "question": str,
    "options": [str],
    "answer": int,
    **{f"{name}?": str for name in OPTIONAL},
}
FEWEST_OPTIONS = 2
LETTERS = {"medqa": 4, "medmcqa": 4}  # options that the task has a letter for


def load(data: str, benchmark: str, **metadata) -> dict[str, Dataset]:
    """The splits `test` and `few_shot` of one benchmark.

    Args:
        data: Folder of `python -m data_prep.build`.
        benchmark: Name of the file.
        metadata: What else lm-eval knows of the task; not used.
    """
    test, few_shot = benchmark_files(data, benchmark)
    letters = LETTERS.get(benchmark)
    return {"test": _table(test, letters), "few_shot": _table(few_shot, letters)}


def _table(path: Path, letters: int | None) -> Dataset:
    rows = read_rows(path, columns=COLUMNS)
    counts = sorted({len(row["options"]) for row in rows})
    if len(counts) > 1 or counts[0] < FEWEST_OPTIONS or letters not in (None, counts[0]):
        raise UserError(
            f"{path}: its rows have {' or '.join(map(str, counts))} options, and all must have "
            f"{letters or 'as many, at least two'}; {ADVICE}"
        )
    return Dataset.from_list([_columns(path, row) for row in rows])


def _columns(path: Path, row: dict) -> dict:
    """The same columns for every row: a table would fill in those that only some rows have."""
    if row["answer"] not in range(len(row["options"])):
        raise UserError(f"{path}: row {row['id']} has no option {row['answer']}; {ADVICE}")
    return {column: row[column] for column in REQUIRED} | {
        column: row.get(column, "") for column in OPTIONAL
    }

"""The benchmark files of the data build, as lm-eval's tasks read them (`custom_dataset`)."""

from pathlib import Path

from datasets import Dataset

from eval.data_files import ADVICE, benchmark_files, read_rows
from medistill_trl.errors import UserError

REQUIRED = ("id", "question", "options", "answer")
OPTIONAL = ("context", "subject")


def load(data: str, benchmark: str, **metadata) -> dict[str, Dataset]:
    """The splits `test` and `few_shot` of one benchmark.

    Args:
        data: Folder of `python -m data_prep.build`.
        benchmark: Name of the file.
        metadata: What else lm-eval knows of the task; not used.
    """
    test, few_shot = benchmark_files(data, benchmark)
    return {"test": _table(test), "few_shot": _table(few_shot)}


def _table(path: Path) -> Dataset:
    return Dataset.from_list([_columns(path, row) for row in read_rows(path)])


def _columns(path: Path, row: dict) -> dict:
    """The same columns for every row: a table would fill in those that only some rows have."""
    missing = [column for column in REQUIRED if column not in row]
    if missing or row["answer"] not in range(len(row["options"])):
        problem = f"no {', '.join(missing)}" if missing else f"no option {row['answer']}"
        raise UserError(f"{path}: row {row['id']} has {problem}; {ADVICE}")
    return {column: row[column] for column in REQUIRED} | {
        column: row.get(column, "") for column in OPTIONAL
    }

"""The files the data build wrote, as an evaluation reads them."""

import hashlib
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from medistill_trl.errors import UserError

WORDS = {str: "a text", int: "a whole number"}
ADVICE = "make the data with: python -m data_prep.build --out DIR (--sample: a small one), then --data DIR"


def read_rows(
    path: Path, limit: int | None = None, columns: dict[str, Any] | None = None
) -> list[dict]:
    """The first `limit` rows of a JSONL file; None for all. Blank lines are none.

    Args:
        columns: What every row has besides an `id`: name → type, a list of one such, or a mapping of these; a name
            that ends in `?` may be missing.

    Raises:
        UserError: the file is missing or empty, has a line that is no such row, or two rows with one id.
    """
    require(path.parent, [path.name])
    rows, seen = [], {}
    try:
        with path.open("rb") as lines:
            filled = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
            for number, line in islice(filled, limit):
                row = _row(path, number, line, {"id": str, **(columns or {})})
                first = seen.setdefault(row["id"], number)
                if first != number:
                    raise UserError(
                        f"{path}:{number}: its id already stands in line {first}; {ADVICE}"
                    )
                rows.append(row)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {ADVICE}") from error
    if not rows:
        raise UserError(f"{path}: the file is empty; {ADVICE}")
    return rows


def _row(path: Path, number: int, line: bytes, columns: dict[str, Any]) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}:{number}: not JSON ({error}); {ADVICE}") from error
    problem = _problem(row, columns, "the row")
    if problem:
        raise UserError(f"{path}:{number}: {problem}; {ADVICE}")
    return row


def _problem(value: Any, wanted: Any, name: str) -> str | None:
    """Why a value is not what is wanted of it, or None if it is."""
    match wanted:
        case dict():
            if not isinstance(value, dict):
                return f"{name} must be an object, got {type(value).__name__}"
            for key, inner in wanted.items():
                known = key.removesuffix("?")
                if known in value:
                    problem = _problem(value[known], inner, known)
                    if problem:
                        return problem
                elif known == key:
                    return f"{name} has no {key}"
        case [inner]:
            if not isinstance(value, list):
                return f"{name} must be a list, got {type(value).__name__}"
            found = (_problem(item, inner, f"an item of {name}") for item in value)
            return next(filter(None, found), None)
        case _:
            if type(value) is not wanted:
                return f"{name} must be {WORDS[wanted]}, got {type(value).__name__}"
            if wanted is str and any("\ud800" <= character <= "\udfff" for character in value):
                return f"{name} contains half a surrogate pair, which no text can hold"
    return None


def absent(data: Path, patterns: Sequence[str]) -> str | None:
    """What is not there: the first pattern below `data` that nothing matches, and what to do; None if all match."""
    for pattern in patterns:
        if not any(data.glob(pattern)):
            return f"{data / pattern}: no such file; {ADVICE}"
    return None


def require(data: Path, patterns: Sequence[str]) -> list[Path]:
    """The files below `data` that match, sorted.

    Raises:
        UserError: nothing matches one of the patterns.
    """
    problem = absent(data, patterns)
    if problem is not None:
        raise UserError(problem)
    return sorted({path for pattern in patterns for path in data.glob(pattern)})


def digests(data: Path, files: list[Path]) -> dict[str, str]:
    """sha256 of each file, by its path below `data`."""
    found = {}
    for path in files:
        with path.open("rb") as file:
            found[str(path.relative_to(data))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def benchmark_files(data: str | Path, benchmark: str) -> tuple[Path, Path]:
    """A benchmark's file and that of its few-shot examples."""
    folder = Path(data) / "benchmarks"
    return folder / f"{benchmark}.jsonl", folder / "few_shot" / f"{benchmark}.jsonl"

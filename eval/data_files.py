"""The files the data build wrote, as an evaluation reads them."""

import hashlib
import json
from itertools import islice
from pathlib import Path

from medistill_trl.errors import UserError

ADVICE = "make the data with: python -m data_prep.build --out DIR (--sample: a small one), then --data DIR"


def read_rows(path: Path, limit: int | None = None) -> list[dict]:
    """The first `limit` rows of a JSONL file; None for all.

    Raises:
        UserError: the file is missing, empty or has a line that is no row with an `id`.
    """
    require(path.parent, [path.name])
    rows = []
    with path.open("rb") as lines:
        for number, line in islice(enumerate(lines, start=1), limit):
            rows.append(_row(path, number, line))
    if not rows:
        raise UserError(f"{path}: the file is empty; {ADVICE}")
    return rows


def _row(path: Path, number: int, line: bytes) -> dict:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{path}:{number}: not JSON ({error}); {ADVICE}") from error
    if not isinstance(row, dict) or "id" not in row:
        raise UserError(f"{path}:{number}: must be an object with an id; {ADVICE}")
    return row


def require(data: Path, patterns: list[str]) -> list[Path]:
    """The files below `data` that match, sorted.

    Raises:
        UserError: nothing matches one of the patterns.
    """
    found: set[Path] = set()
    for pattern in patterns:
        matching = sorted(data.glob(pattern))
        if not matching:
            raise UserError(f"{data / pattern}: no such file; {ADVICE}")
        found.update(matching)
    return sorted(found)


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

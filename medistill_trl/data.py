"""Prepared prompt files → checked prompts.

The column contract, one JSON object per line:

    {"id": str, "source": str, "question": str, "reference": str, "answer": str | null (optional)}

A row that breaks it is never lost silently: it stops the run or is skipped and counted, by line.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from medistill_trl.errors import UserError

REQUIRED_COLUMNS = ("id", "source", "question", "reference")
SHOWN_PROBLEMS = 20


@dataclass(frozen=True)
class Prompt:
    """A long-form question with the answer its dataset holds for right.

    Args:
        reference: Gold answer and explanation, free text.
        answer: The short answer where there is one (a letter's text, yes/no/maybe, a claim's label).
    """

    id: str
    source: str
    question: str
    reference: str
    answer: str | None = None


@dataclass
class DataReport:
    """What reading a file came to; saved in results/run.json.

    Args:
        read: Non-empty lines.
        kept: Prompts returned.
        skipped: `line N: reason` for each row left out.
        sha256: Of the whole file.
    """

    path: str
    read: int = 0
    kept: int = 0
    skipped: list[str] = field(default_factory=list)
    sha256: str = ""


def read_prompts(
    path: str,
    on_bad_row: str,
    limit: int | None = None,
    too_long: Callable[[Prompt], str | None] = lambda prompt: None,
) -> tuple[list[Prompt], DataReport]:
    """Read a prompt file.

    Args:
        path: JSONL file, UTF-8.
        on_bad_row: `fail` raises after reading the whole file, `skip` leaves bad rows out.
        limit: Keep at most this many prompts; lines after the last one kept are not read.
        too_long: Says why a prompt is over the token limit, or None.

    Raises:
        UserError: naming file, lines and reasons; also for a file without any usable row.
    """
    prompts: list[Prompt] = []
    report = DataReport(path)
    seen: dict[str, int] = {}
    try:
        with Path(path).open("rb") as lines:
            report.sha256 = hashlib.file_digest(lines, "sha256").hexdigest()
            lines.seek(0)
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                if limit is not None and len(prompts) == limit:
                    break
                report.read += 1
                row = _parse(line)
                problem = row if isinstance(row, str) else _duplicate(row, seen) or too_long(row)
                if problem:
                    report.skipped.append(f"line {number}: {problem}")
                    continue
                seen[row.id] = number
                prompts.append(row)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    report.kept = len(prompts)
    _judge(report, on_bad_row)
    return prompts, report


def _parse(line: bytes) -> Prompt | str:
    """The prompt of a line, or what is wrong with it."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte {error.start} of the line)"
    except json.JSONDecodeError as error:
        return f"not JSON ({error.msg} at column {error.colno})"
    except ValueError as error:  # a number too long to read
        return f"not JSON that can be read ({error})"
    except RecursionError:
        return "not JSON that can be read (nested too deeply)"
    if not isinstance(row, dict):
        return f"must be an object with {', '.join(REQUIRED_COLUMNS)}, got {type(row).__name__}"
    missing = [column for column in REQUIRED_COLUMNS if column not in row]
    if missing:
        return f"missing column {', '.join(missing)} (found {', '.join(sorted(row)) or 'none'})"
    for column in (*REQUIRED_COLUMNS, "answer"):
        value = row.get(column)
        if not isinstance(value, str) and not (column == "answer" and value is None):
            return f"{column} must be a text, got {type(value).__name__}"
        if value and "\0" in value:
            return f"{column} contains a NUL byte"
        if value and any("\ud800" <= character <= "\udfff" for character in value):
            return f"{column} contains half a surrogate pair, which no text can hold"
    for column in ("id", "question"):
        if not row[column].strip():
            return f"{column} is empty"
    return Prompt(**{column: row.get(column) for column in (*REQUIRED_COLUMNS, "answer")})


def _duplicate(prompt: Prompt, seen: dict[str, int]) -> str | None:
    first = seen.get(prompt.id)
    return f"id {prompt.id!r} already stands in line {first}" if first else None


def _judge(report: DataReport, on_bad_row: str) -> None:
    shown = "\n".join(f"  {text}" for text in report.skipped[:SHOWN_PROBLEMS])
    if len(report.skipped) > SHOWN_PROBLEMS:
        shown += f"\n  ... and {len(report.skipped) - SHOWN_PROBLEMS} more"
    if report.skipped and on_bad_row == "fail":
        raise UserError(
            f"{report.path}: {len(report.skipped)} of {report.read} rows cannot be used:\n{shown}\n"
            "Mend them, or set on_bad_row: skip to leave them out."
        )
    if report.read == 0:
        raise UserError(f"{report.path}: the file is empty; it needs one JSON object per line")
    if report.kept == 0:
        raise UserError(f"{report.path}: no usable row is left of {report.read}:\n{shown}")


def leave_out_heldout(
    train: list[Prompt], heldout: list[Prompt], report: DataReport, on_bad_row: str
) -> list[Prompt]:
    """Training prompts whose question is not asked again in the held-out check.

    Raises:
        UserError: under `fail`, naming the ids that stand in both.
    """
    questions = {_normalised(prompt.question) for prompt in heldout}
    repeated = [prompt.id for prompt in train if _normalised(prompt.question) in questions]
    if not repeated:
        return train
    if on_bad_row == "fail":
        shown = ", ".join(repeated[:SHOWN_PROBLEMS])
        raise UserError(
            f"{report.path}: {len(repeated)} questions also stand in the validation file ({shown}): the "
            "held-out check would measure what was trained on. Use disjoint files, or set on_bad_row: skip "
            "to leave them out of training."
        )
    kept = [prompt for prompt in train if prompt.id not in set(repeated)]
    report.skipped += [f"id {id}: its question is held out" for id in repeated]
    report.kept = len(kept)
    if not kept:
        raise UserError(f"{report.path}: every question is held out; nothing is left to train on")
    return kept


def _normalised(question: str) -> str:
    return " ".join(question.casefold().split())

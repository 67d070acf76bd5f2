"""Reading a row's fields: what is there, of the right type, and sane; or what is wrong with it."""

import hashlib
import json
import re

# A question longer than this is a broken row; the longest vignette of MedQA has 4,000 characters.
LONGEST_QUESTION = 20_000
LONGEST_TEXT = 500_000
_PMID = re.compile(r"(?:PMID:?)?\s*0*(\d+)", re.IGNORECASE)
_SURROGATE = re.compile("[\ud800-\udfff]")


class BadRow(ValueError):
    """A row that should not look like this: stops the build, or is skipped and named."""


class Dropped(ValueError):
    """A row the dataset is known to have and nobody can use; counted under this reason."""


def parse(text: str) -> dict:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRow(f"not JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise BadRow(f"not JSON that can be read ({type(error).__name__})") from error
    if not isinstance(row, dict):
        raise BadRow(f"must be an object, got {type(row).__name__}")
    return row


def text(row: dict, *keys: str) -> str:
    """The text under the first of `keys` that the row has, without blanks around it.

    Raises:
        BadRow: if none is there, or it is empty, too long, no text, or holds what no text can.
    """
    value = optional_text(row, *keys, longest=LONGEST_QUESTION)
    if not value:
        key = next((key for key in keys if key in row), None)
        raise BadRow(f"{key} is empty" if key else f"has no {' or '.join(keys)}")
    return value


def optional_text(row: dict, *keys: str, longest: int = LONGEST_TEXT) -> str:
    """As `text`, but "" where the row has nothing (a missing key, null, blanks)."""
    key = next((key for key in keys if row.get(key) is not None), None)
    return "" if key is None else clean(row[key], key, longest)


def clean(value: object, name: str, longest: int = LONGEST_TEXT) -> str:
    """A field's text; `name` is how a message calls it."""
    if not isinstance(value, str):
        raise BadRow(f"{name} must be a text, got {type(value).__name__}")
    if len(value) > longest:
        raise BadRow(f"{name} has {len(value):,} characters (at most {longest:,})")
    if "\0" in value:
        raise BadRow(f"{name} contains a NUL byte")
    if _SURROGATE.search(value):
        raise BadRow(f"{name} contains half a surrogate pair, which no text can hold")
    return value.strip()


def identity(row: dict, *keys: str) -> str | None:
    """The dataset's own id, a text or a number, or None."""
    for key in keys:
        value = row.get(key)
        if isinstance(value, bool) or not isinstance(value, str | int | None):
            raise BadRow(f"{key} must be a text or a number, got {type(value).__name__}")
        if value is not None and str(value).strip():
            return clean(str(value), key, longest=200)
    return None


def pubmed_id(row: dict) -> str | None:
    """The PubMed id under any of its usual names, as PubMed writes it: digits without leading zeros."""
    written = identity(row, "pubid", "pmid", "PMID")
    number = _PMID.fullmatch(written or "")
    return number[1] if number else written


def content_id(*parts: str) -> str:
    """An id for a row that has none: of its text, so that it does not move with the row."""
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:16]


def index(value: object, name: str, size: int, first: int = 0) -> int:
    """A position counted from `first`, as one counted from 0.

    Raises:
        BadRow: for a position outside the `size` there are.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadRow(f"{name} must be a whole number, got {value!r}")
    if not first <= value < first + size:
        raise BadRow(f"{name} is {value}, outside {first} to {first + size - 1}")
    return value - first

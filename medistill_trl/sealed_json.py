"""JSON that a later command rests on, written so that damage is seen: cut off, edited, or a bit flipped.

A record holds a digest of its other keys. The records of single items, one JSON object a line, have theirs in the
record of the result they belong to, so a result is never read beside the items of another one.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from medistill_trl.errors import UserError
from medistill_trl.files import write_text

DIGEST = "digest"


def write_record(path: Path, content: dict[str, Any], finite: bool = False) -> None:
    """Write a JSON object with its digest, in one step. Values JSON does not know are written as text.

    Args:
        finite: Refuse NaN and infinity, with a ValueError.
    """
    plain = json.loads(json.dumps(content, default=str, allow_nan=not finite))
    sealed = plain | {DIGEST: _digest_of(plain)}
    write_text(path, json.dumps(sealed, indent=2, ensure_ascii=False) + "\n")


def read_record(path: Path, remedy: str) -> dict[str, Any]:
    """What `write_record` wrote, without the digest.

    Args:
        remedy: What to do about a file that is not whole, for the message.

    Raises:
        UserError: the file cannot be read, or is not as it was written.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged, it is no JSON any more ({error}); {remedy}") from error
    if not isinstance(content, dict) or DIGEST not in content:
        raise UserError(f"{path}: damaged, or not written by medistill_trl: no {DIGEST}; {remedy}")
    if content.pop(DIGEST) != _digest_of(content):
        raise UserError(f"{path}: has changed since it was written; {remedy}")
    return content


def write_items(path: Path, rows: list[dict]) -> str:
    """Write a line for each item, in one step; returns the digest, for the record they belong to."""
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    write_text(path, text)
    return _digest(text.encode())


def read_items(path: Path, digest: str | None, remedy: str) -> list[dict]:
    """What `write_items` wrote.

    Args:
        digest: From the record; None if it has none for these items.
        remedy: As of `read_record`.

    Raises:
        UserError: the file cannot be read, or is not the one that was written with the record.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
    if _digest(content) != digest:
        raise UserError(
            f"{path}: damaged, or not written with the result it stands beside; {remedy}"
        )
    # Of bytes: a text's splitlines also splits at separators that stand within an answer.
    return [json.loads(line) for line in content.splitlines()]


def _digest_of(content: dict[str, Any]) -> str:
    """Of the values, however they are laid out."""
    return _digest(json.dumps(content, sort_keys=True).encode())


def _digest(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()

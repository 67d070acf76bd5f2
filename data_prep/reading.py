"""Files of any of the releases' formats → rows as JSON text, one at a time, each with its place.

JSON lines, one JSON array, one JSON object keyed by id (PubMedQA's release), tab-separated lines
(PubHealth's release) and parquet (the hub) are streamed: none is ever held in memory. A plain text
file is one row.
"""

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path

import ijson
import pyarrow
import pyarrow.parquet as parquet

from medistill_trl.errors import UserError

SUFFIXES = (".jsonl", ".json", ".tsv", ".parquet")
LONGEST_ROW = 4 * 1024 * 1024  # bytes looked at to tell a row from a document on one line
PARQUET_ROWS = 1000
ROWS_TO_COUNT = 50  # of a table, to tell how many fields its rows have
# PubHealth's release has a few rows with line breaks or tabs inside a field.
SLIPPED = "has more or fewer fields than the header"
BROKEN = (ijson.JSONError, UnicodeDecodeError)


def read_rows(path: Path) -> Iterator[dict]:
    """Yield `{"place", "text", "problem", "defect"}` for each row of a file.

    `place` says where in the file a row stands ("line 12", "entry 10808977"), `text` is its JSON;
    `problem` is None, or why there is no text; `defect` likewise, for what a release is known to have.

    Raises:
        UserError: if the file cannot be read at all.
    """
    readers = {".tsv": _tab_separated, ".parquet": _parquet, ".txt": _plain}
    reader = readers.get(path.suffix.lower(), _json)
    try:
        yield from reader(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def _row(place: str, text: str = "", problem: str | None = None) -> dict:
    return {"place": place, "text": text, "problem": problem, "defect": None}


def _json(path: Path) -> Iterator[dict]:
    """A .json file's rows: it is one document, or lines as in MedMCQA's and PubHealth's releases."""
    if path.suffix.lower() == ".jsonl":
        return _lines(path)
    with path.open("rb") as file:
        start = file.readline(LONGEST_ROW).removeprefix(codecs.BOM_UTF8).strip()
    if re.match(rb"\[\s*({|$)", start):
        return _document(path, keyed=False)
    if start == b"{" or (start.startswith(b"{") and _holds_rows(start)):
        return _document(path, keyed=True)
    return _lines(path)


def _holds_rows(start: bytes) -> bool:
    """Whether the values of the object that starts here are rows, not a row's fields.

    It may break off: what can be read of it tells.
    """
    rows = False
    with suppress(*BROKEN):
        for _, value in ijson.kvitems(start, "", use_float=True):
            rows = isinstance(value, dict)
            if not rows:
                break
    return rows


def _lines(path: Path) -> Iterator[dict]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"line {number}"
            try:
                yield _row(place, line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                yield _row(place, problem=f"not UTF-8 (byte {error.start} of the line)")


def _document(path: Path, keyed: bool) -> Iterator[dict]:
    """One JSON object whose values are the rows, its keys their PubMed ids; or one array of rows."""
    place = "its beginning"
    with path.open("rb") as file:
        if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            file.seek(0)
        try:
            if keyed:
                for key, row in ijson.kvitems(file, "", use_float=True):
                    place = f"entry {key}"
                    row = {"pubid": key} | row if isinstance(row, dict) else row
                    yield _row(place, json.dumps(row, ensure_ascii=False))
            else:
                for number, row in enumerate(ijson.items(file, "item", use_float=True), start=1):
                    place = f"item {number}"
                    yield _row(place, json.dumps(row, ensure_ascii=False))
        except BROKEN as error:
            problem = f"the rest of the file is not JSON ({str(error).splitlines()[0]})"
            yield _row(f"after {place}", problem=problem)


def _tab_separated(path: Path) -> Iterator[dict]:
    """Lines split at tabs; a quotation mark is a letter like any other (csv's QUOTE_NONE).

    PubHealth's test.tsv starts with a row number that its header may not name: most rows then have one
    field more.
    """
    lines = _lines(path)
    start = list(islice(lines, ROWS_TO_COUNT))
    header = _fields(start[0]) if start else []
    counts = Counter(len(_fields(row)) for row in start[1:])
    if counts and counts.most_common(1)[0][0] == len(header) + 1:
        header = ["", *header]
    for row in chain(start[1:], lines):
        fields = _fields(row)
        if row["problem"]:
            yield row
        elif len(fields) != len(header):
            yield row | {"text": "", "defect": SLIPPED}
        else:
            text = json.dumps(dict(zip(header, fields, strict=True)), ensure_ascii=False)
            yield row | {"text": text}


def _fields(row: dict) -> list[str]:
    return row["text"].rstrip("\r\n").split("\t")


def _plain(path: Path) -> Iterator[dict]:
    place = "its text"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        yield _row(place, problem=f"not UTF-8 (byte {error.start} of the file)")
    else:
        yield _row(place, json.dumps({"text": text}, ensure_ascii=False))


def _parquet(path: Path) -> Iterator[dict]:
    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: is not a parquet file ({str(error).splitlines()[0]})") from error
    names = label_names(file)
    number = 0
    try:
        for batch in file.iter_batches(PARQUET_ROWS):
            for row in batch.to_pylist():
                number += 1
                for column, labels in names.items():
                    label = row.get(column)
                    if isinstance(label, int) and 0 <= label < len(labels):
                        row[column] = labels[label]
                yield _row(f"row {number}", json.dumps(row, ensure_ascii=False, default=str))
    except (pyarrow.ArrowException, OSError) as error:
        problem = f"the rest of the file is damaged ({str(error).splitlines()[0]})"
        yield _row(f"after row {number}", problem=problem)


def label_names(file: parquet.ParquetFile) -> dict[str, list[str]]:
    """Column → names of its integer labels, where the hub's metadata gives them."""
    metadata = file.schema_arrow.metadata or {}
    described = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    return {
        column: feature["names"]
        for column, feature in described.items()
        if isinstance(feature, dict) and "names" in feature
    }

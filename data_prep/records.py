"""A dataset's files → a table of records, with a reason for each row that did not become one."""

from collections.abc import Iterator

from datasets import Dataset, Features, List, Value

from data_prep.fingerprints import exact_key, words
from data_prep.inputs import Input
from data_prep.reading import read_rows
from data_prep.schema import Record
from data_prep.sources import Source, load
from data_prep.sources.rows import BadRow, Dropped, parse
from data_prep.workspace import Workspace

ROWS = Features(
    {"split": Value("string"), "place": Value("string"), "text": Value("string")}
    | {"problem": Value("string"), "defect": Value("string")}
)
# A Record's fields, and: `bad` and `dropped` say why there is none; `key` stands for its text.
RECORDS = Features(
    {name: Value("string") for name in ("place", "bad", "dropped", "split", "native_id")}
    | {name: Value("string") for name in ("question", "explanation", "subject", "pmid")}
    | {"options": List(Value("string")), "context": List(Value("string"))}
    | {"answer": Value("int8"), "key": Value("uint64")}
)


def read(work: Workspace, data: Input) -> Dataset:
    """The table of `RECORDS` of all rows of a dataset's files, in their order."""
    source = data.source
    facts = source.survey(data.folder, data.files)
    rows = work.table(f"{source.name} read", lambda: _rows(data), ROWS)
    return work.map(
        f"{source.name} check", rows, _normalise, RECORDS, name=source.name, facts=facts
    )


def record_of(source: str, row: dict) -> Record:
    """The record in a row of the table."""
    return Record(
        source,
        row["split"],
        row["native_id"],
        row["question"],
        tuple(row["options"]),
        row["answer"],
        row["explanation"],
        tuple(row["context"]),
        row["subject"],
        row["pmid"],
    )


def records_of(source: str, columns: dict) -> Iterator[Record]:
    """The records in some columns of the table, as `map` gives them."""
    for values in zip(*columns.values(), strict=True):
        yield record_of(source, dict(zip(columns, values, strict=True)))


def _rows(data: Input) -> Iterator[dict]:
    for file in data.files:
        name = file.path.relative_to(data.folder).as_posix()
        for row in read_rows(file.path):
            place = f"{data.source.name}/{name}, {row['place']}"
            yield {"split": file.split, **row, "place": place}


def _normalise(columns: dict, name: str, facts: object) -> dict:
    source = load(name)
    given = zip(*(columns[key] for key in ROWS), strict=True)
    rows = [_row(source, dict(zip(ROWS, values, strict=True)), facts) for values in given]
    return {key: [row[key] for row in rows] for key in RECORDS}


def _row(source: Source, given: dict, facts: object) -> dict:
    empty = {key: None for key in RECORDS} | {"answer": -1, "key": 0}
    empty |= {"place": given["place"], "split": given["split"]}
    if given["problem"] or given["defect"]:
        return empty | {"bad": given["problem"], "dropped": given["defect"]}
    try:
        record = source.normalise(parse(given["text"]), given["split"], facts)
    except BadRow as error:
        return empty | {"bad": str(error)}
    except Dropped as error:
        return empty | {"dropped": str(error)}
    texts = (record.question, *record.options, record.explanation, *record.context)
    return empty | {
        "split": record.split,
        "native_id": record.native_id,
        "question": record.question,
        "options": list(record.options),
        "answer": record.answer,
        "explanation": record.explanation,
        "context": list(record.context),
        "subject": record.subject,
        "pmid": record.pmid,
        "key": exact_key(*map(words, texts), [str(record.answer)]),
    }

"""Every format of the releases is read row by row, and what cannot be read is named by its place."""

import codecs
import json

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from data_prep.reading import read_rows
from medistill_trl.errors import UserError

ROWS = [{"question": "Why?"}, {"question": "How?"}, {"question": "Où?"}]
KEYED = {"101": ROWS[0], "102": ROWS[1], "103": ROWS[2]}
KEYED_ROWS = [{"pubid": pmid} | row for pmid, row in KEYED.items()]
ONE_LINE = json.dumps(KEYED)
PRETTY = json.dumps(KEYED, indent=1)


def lines(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(tmp_path, name, content):
    """The rows that can be read, as JSON gives them, and `place: problem` of the others."""
    rows = list(read_rows(write(tmp_path, name, content)))
    good = [json.loads(row["text"]) for row in rows if not row["problem"] and not row["defect"]]
    wrong = [(row["place"], row["problem"] or row["defect"]) for row in rows]
    return good, [f"{place}: {why}" for place, why in wrong if why]


READABLE = {
    "lines": ("a.jsonl", lines(*ROWS), ROWS),
    "no newline at the end": ("a.jsonl", lines(*ROWS).rstrip("\n"), ROWS),
    "Windows line ends": ("a.jsonl", lines(*ROWS).replace("\n", "\r\n"), ROWS),
    "byte order mark": ("a.jsonl", codecs.BOM_UTF8 + lines(*ROWS).encode(), ROWS),
    "blank lines": ("a.jsonl", "\n" + lines(*ROWS).replace("\n", "\n \n"), ROWS),
    "nothing": ("a.jsonl", "", []),
    "lines that are called .json": ("dev.json", lines(*ROWS), ROWS),
    "one line that is called .json": ("dev.json", lines(ROWS[0]), ROWS[:1]),
    "a line whose first value is an object": (
        "dev.json",
        lines({"context": {"contexts": ["c"]}, "pubid": 1}),
        [{"context": {"contexts": ["c"]}, "pubid": 1}],
    ),
    "array": ("a.json", json.dumps(ROWS), ROWS),
    "array, pretty-printed": ("a.json", json.dumps(ROWS, indent=2), ROWS),
    "array after a byte order mark": (
        "a.json",
        codecs.BOM_UTF8 + json.dumps(ROWS, indent=2).encode(),
        ROWS,
    ),
    "keyed by PMID": ("ori_pqal.json", ONE_LINE, KEYED_ROWS),
    "keyed by PMID, pretty-printed": ("ori_pqal.json", PRETTY, KEYED_ROWS),
    "keyed by PMID after a byte order mark": (
        "ori_pqal.json",
        codecs.BOM_UTF8 + PRETTY.encode(),
        KEYED_ROWS,
    ),
    "a numeral of a value": (
        "a.json",
        '{"101": {"year": 1998.5}}',
        [{"pubid": "101", "year": 1998.5}],
    ),
}


@pytest.mark.parametrize(("name", "content", "expected"), READABLE.values(), ids=list(READABLE))
def test_rows_of_every_json_format(tmp_path, name, content, expected):
    assert read(tmp_path, name, content) == (expected, [])


def test_a_row_that_is_keyed_keeps_its_own_id(tmp_path):
    rows, _ = read(tmp_path, "a.json", '{"101": {"pubid": "7"}}')
    assert rows == [{"pubid": "7"}]


def test_a_document_longer_than_what_is_looked_at_first(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.reading.LONGEST_ROW", 60)
    assert read(tmp_path, "a.json", ONE_LINE) == (KEYED_ROWS, [])
    assert read(tmp_path, "b.json", json.dumps(ROWS)) == (ROWS, [])
    long = {"question": "x" * 100}
    assert read(tmp_path, "c.json", lines(long, long)) == ([long, long], [])


@pytest.mark.parametrize("text", [ONE_LINE, PRETTY], ids=["one line", "pretty-printed"])
@pytest.mark.parametrize(
    ("spoil", "survive", "place"),
    [
        (lambda text: text[: text.index("How")], 1, "after entry 101"),
        # ijson is sure of an entry once the next one begins, so 102 goes with the break.
        (lambda text: text.replace('"103"', "103"), 1, "after entry 101"),
        (lambda text: text.replace("How", "\\x"), 1, "after entry 101"),
        (lambda text: text + "}", 3, "after entry 103"),
    ],
    ids=["cut off", "a key without quotation marks", "a bad escape", "more after the end"],
)
def test_rows_before_the_place_where_a_document_breaks(tmp_path, text, spoil, survive, place):
    rows, problems = read(tmp_path, "ori_pqal.json", spoil(text))
    assert rows == KEYED_ROWS[:survive]
    assert len(problems) == 1
    assert problems[0].startswith(f"{place}: the rest of the file is not JSON (")


@pytest.mark.parametrize("indent", [None, 1])
def test_rows_before_the_place_where_an_array_breaks(tmp_path, indent):
    text = json.dumps(ROWS, indent=indent)
    rows, problems = read(tmp_path, "a.json", text[: text.index("How")])
    assert rows == ROWS[:1]
    assert problems[0].startswith("after item 1: the rest of the file is not JSON (")


def test_a_byte_in_a_document_that_is_no_text(tmp_path):
    rows, problems = read(tmp_path, "a.json", ONE_LINE.encode().replace(b"How", b"\xff"))
    assert rows == KEYED_ROWS[:1]
    assert problems[0].startswith("after entry 101: ")


def test_a_line_that_is_not_utf8_is_one_bad_row(tmp_path):
    content = b"".join(
        [lines(ROWS[0]).encode(), b'{"question": "\xe9"}\n', lines(ROWS[1]).encode()]
    )
    assert read(tmp_path, "a.jsonl", content) == (
        ROWS[:2],
        ["line 2: not UTF-8 (byte 14 of the line)"],
    )


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize("broken", ['{"question": "Wh', "5", "null", "[1, 2]", "[" * 50_000, "{{{"])
def test_a_broken_line_is_passed_on_and_its_neighbours_too(tmp_path, name, broken):
    rows = list(read_rows(write(tmp_path, name, broken + "\n" + lines(ROWS[0]))))
    assert [(row["place"], row["problem"]) for row in rows] == [("line 1", None), ("line 2", None)]
    assert rows[0]["text"].strip() == broken
    assert json.loads(rows[1]["text"]) == ROWS[0]


def test_line_numbers_count_the_blank_lines(tmp_path):
    path = write(tmp_path, "a.jsonl", "\n\n" + lines(ROWS[0]) + "\n" + lines(ROWS[1]))
    assert [row["place"] for row in read_rows(path)] == ["line 3", "line 5"]


HEADER = "claim_id\tclaim\tlabel\n"
CLAIM = {"claim_id": "7", "claim": "Zinc shortens colds.", "label": "unproven"}
TABLES = {
    "plain": (HEADER + "7\tZinc shortens colds.\tunproven\n", [CLAIM]),
    "Windows line ends": (HEADER + "7\tZinc shortens colds.\tunproven\r\n", [CLAIM]),
    "an unmatched quotation mark": (
        HEADER + '7\t"Zinc shortens colds.\tunproven\n' + HEADER.replace("claim_id", "8"),
        [
            CLAIM | {"claim": '"Zinc shortens colds.'},
            {"claim_id": "8", "claim": "claim", "label": "label"},
        ],
    ),
    "quotation marks around and within": (
        HEADER + '7\t"Zinc" is a ""cure"".\tunproven\n',
        [CLAIM | {"claim": '"Zinc" is a ""cure"".'}],
    ),
    "an extra first column": (
        HEADER + "0\t7\tZinc shortens colds.\tunproven\n1\t7\tZinc shortens colds.\tunproven\n",
        [{"": "0"} | CLAIM, {"": "1"} | CLAIM],
    ),
    "an extra first column that the header leaves blank": (
        "\t" + HEADER + "0\t7\tZinc shortens colds.\tunproven\n",
        [{"": "0"} | CLAIM],
    ),
    "an extra first column with a name": (
        "Unnamed: 0\t" + HEADER + "0\t7\tZinc shortens colds.\tunproven\n",
        [{"Unnamed: 0": "0"} | CLAIM],
    ),
    "an empty last field": (
        HEADER + "7\tZinc shortens colds.\t\n",
        [CLAIM | {"label": ""}],
    ),
}


@pytest.mark.parametrize(("content", "expected"), TABLES.values(), ids=list(TABLES))
def test_tab_separated_lines(tmp_path, content, expected):
    assert read(tmp_path, "test.tsv", content) == (expected, [])


@pytest.mark.parametrize(
    "row",
    ["7\tZinc shortens\n", "7\tZinc\tshortens colds.\tunproven\n", "7\n"],
    ids=["too few", "a tab within a field", "one"],
)
def test_a_row_with_another_number_of_fields_is_a_defect_of_the_release(tmp_path, row):
    good = "7\tZinc shortens colds.\tunproven\n"
    assert read(tmp_path, "train.tsv", HEADER + good + row + good) == (
        [CLAIM, CLAIM],
        ["line 3: has more or fewer fields than the header"],
    )
    rows = list(read_rows(tmp_path / "train.tsv"))
    assert [row["problem"] for row in rows] == [None] * 3


def test_a_tab_separated_line_that_is_not_utf8(tmp_path):
    content = HEADER.encode() + b"7\t\xff\ttrue\n7\tZinc shortens colds.\tunproven\n"
    rows, problems = read(tmp_path, "train.tsv", content)
    assert rows == [CLAIM]
    assert problems == ["line 2: not UTF-8 (byte 2 of the line)"]


def to_parquet(path, labels, names):
    features = Features({"claim": Value("string"), "label": ClassLabel(names=names)})
    Dataset.from_dict({"claim": ["c"] * len(labels), "label": labels}, features).to_parquet(path)


@pytest.mark.parametrize(
    "names",
    [["false", "mixture", "true", "unproven"], ["true", "false", "unproven", "mixture"]],
)
def test_labels_of_a_parquet_file_go_by_name(tmp_path, names):
    path = tmp_path / "train.parquet"
    to_parquet(path, [0, 1, 2, 3, -1, None], names)
    rows = list(read_rows(path))
    assert [json.loads(row["text"])["label"] for row in rows] == [*names, -1, None]
    assert [row["place"] for row in rows[:2]] == ["row 1", "row 2"]


def test_a_parquet_file_without_its_label_column_or_metadata(tmp_path):
    path = tmp_path / "train.parquet"
    to_parquet(path, [0, 1], ["false", "true"])
    table = parquet.read_table(path)
    parquet.write_table(table.drop(["label"]), path)
    assert [json.loads(row["text"]) for row in read_rows(path)] == [{"claim": "c"}] * 2
    parquet.write_table(table.replace_schema_metadata(None), path)
    assert [json.loads(row["text"])["label"] for row in read_rows(path)] == [0, 1]


def test_rows_of_several_batches_of_parquet_are_counted_on(tmp_path):
    parquet.write_table(pa.table({"id": range(2500)}), tmp_path / "a.parquet")
    rows = list(read_rows(tmp_path / "a.parquet"))
    assert rows[-1]["place"] == "row 2500"
    assert [json.loads(row["text"])["id"] for row in rows] == list(range(2500))


def test_parquet_that_is_none(tmp_path):
    path = write(tmp_path, "train.parquet", "PAR1 but no more")
    with pytest.raises(UserError, match=r"train\.parquet: is not a parquet file"):
        list(read_rows(path))


def test_a_text_file_is_one_row(tmp_path):
    text = "First line.\n\nLast “line”.\n"
    assert read(tmp_path, "a.txt", codecs.BOM_UTF8 + text.encode()) == ([{"text": text}], [])
    assert read(tmp_path, "b.txt", b"ab\xff") == ([], ["its text: not UTF-8 (byte 2 of the file)"])


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.tsv", "a.parquet", "a.txt"])
def test_a_file_that_cannot_be_opened_is_named(tmp_path, name):
    with pytest.raises(UserError, match=rf"{name}: "):
        list(read_rows(tmp_path / name))

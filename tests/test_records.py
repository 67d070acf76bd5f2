"""What holds for the rows of every dataset: none is lost without a reason, and ids tell them apart."""

import json

import pytest
from dataset_rows import CASES, cops, normalise, read, without
from hypothesis import given
from hypothesis import strategies as st

from data_prep.schema import Record, parse_id
from data_prep.sources import BENCHMARK, POOL, RESERVE, load
from data_prep.sources.rows import BadRow
from medistill_trl.errors import UserError

each_source = pytest.mark.parametrize("name", CASES)


def bad_lines(name):
    """A line that cannot be used → the reason given."""
    row, key = CASES[name].row, CASES[name].question
    good = json.dumps(row())
    return {
        good[:-9]: "not JSON (",
        good.replace('"' + key + '": "', '"' + key + '": "\0'): "not JSON (Invalid control",
        json.dumps(row(**{key: "Is\0it?"})): f"{key} contains a NUL byte",
        json.dumps(row(**{key: "Is it \ud83d?"})): f"{key} contains half a surrogate pair",
        json.dumps(row(**{key: " \n"})): f"{key} is empty",
        json.dumps(row(**{key: None})): f"{key} is empty",
        json.dumps(without(row(), key)): f"has no {key}",
        json.dumps(row(**{key: ["Is it?"]})): f"{key} must be a text, got list",
        json.dumps(row(**{key: 5})): f"{key} must be a text, got int",
        json.dumps(
            row(**{key: "x" * 1_000_000})
        ): f"{key} has 1,000,000 characters (at most 20,000)",
        json.dumps([row()]): "must be an object, got list",
        "null": "must be an object, got NoneType",
        "[" * 20_000: "not JSON that can be read (RecursionError)",
        '{"id": ' + "9" * 5000 + "}": "not JSON that can be read (ValueError)",
    }


@each_source
def test_bad_rows_are_named_by_file_and_line_and_the_others_kept(tmp_path, name):
    case, bad = CASES[name], bad_lines(name)
    file = f"{case.stem}.jsonl"
    last = case.row(cop=4)  # the 4 tells what MedMCQA's cop counts from
    part, ledger = read(tmp_path, name, **{case.stem: [*bad, last]})
    assert len(ledger.bad_rows) == len(bad)
    for line, (named, reason) in enumerate(
        zip(ledger.bad_rows, bad.values(), strict=True), start=1
    ):
        assert named.startswith(f"{name}/{file}, line {line}: {reason}")
    assert part.account.fates[:-1].tolist() == ["invalid"] * len(bad)
    assert part.rows(POOL).tolist() == [len(bad)]
    with pytest.raises(
        UserError, match=rf"^{len(bad)} rows cannot be used:\n  {name}/{file}, line 1: "
    ):
        ledger.judge("fail")
    ledger.judge("skip")


@each_source
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (["a"], "must be a text or a number, got list"),
        (True, "must be a text or a number, got bool"),
        (1.5, "must be a text or a number, got float"),
        ("a\0b", "contains a NUL byte"),
        ("\udc00", "contains half a surrogate pair"),
        ("x" * 201, "has 201 characters"),
    ],
)
def test_bad_ids(name, value, reason):
    with pytest.raises(BadRow, match=f"{CASES[name].id} {reason}"):
        normalise(name, CASES[name].row(**{CASES[name].id: value}))


NATIVE = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=200)


@given(st.sampled_from(sorted(CASES)), NATIVE.filter(str.strip) | st.integers(), st.data())
def test_an_id_tells_source_split_and_native_id(name, native, data):
    splits = [split for split in load(name).roles if split != "test" or name != "medmcqa"]
    record = normalise(
        name, CASES[name].row(**{CASES[name].id: native}), data.draw(st.sampled_from(splits))
    )
    assert parse_id(record.id) == (name, record.split, str(native).strip())


@given(st.lists(st.text(st.characters(exclude_categories=("Cs", "Cc"))), max_size=4).map("-".join))
def test_an_id_with_hyphens_is_taken_apart_again(native):
    record = Record("medqa", "train", native, "Q?", ("a",), 0)
    assert parse_id(record.id) == ("medqa", "train", native)


@pytest.mark.parametrize("name", ["medqa", "medmcqa", "pubhealth"])
def test_a_row_without_an_id_gets_one_of_its_content(tmp_path, name):
    case = CASES[name]
    bare = without(case.row(cop=4), case.id)
    texts = ["Is it iron?", "Is it zinc?", "Is it lead?"]
    rows = [bare | {case.question: text} for text in texts]

    def ids(folder, given):
        part, ledger = read(folder, name, **{case.stem: given})
        assert ledger.bad_rows == []
        records = [part.record(row) for row in part.rows(POOL)]
        return {record.question: record.id for record in records}

    forward = ids(tmp_path / "a", rows)
    backward = ids(tmp_path / "b", [bare, *rows[::-1]])
    assert len(set(backward.values())) == 4
    assert backward.items() > forward.items()


@each_source
def test_an_id_that_comes_again(tmp_path, name):
    case = CASES[name]
    row = case.row(cop=4, **{case.id: "n-1"})
    respelt = row | {case.question: row[case.question].upper()}
    other = row | {case.question: "Another?"}
    part, ledger = read(tmp_path, name, **{case.stem: [row, row, respelt, other]})
    file = f"{name}/{case.stem}.jsonl"
    assert part.account.fates.tolist() == ["", *["dropped: repeats a record"] * 2, "invalid"]
    assert ledger.bad_rows == [
        f"{file}, line 4: id 'n-1' is already that of another record ({file}, line 1)"
    ]
    part.account.decide(part.rows(POOL), "kept")
    counts = {"dropped: repeats a record": 2, "invalid": 1, "kept": 1}
    assert ledger.counts(name) == {case.split: counts}


@pytest.mark.parametrize("name", ["medqa", "pubhealth"])
def test_without_a_test_file_the_reserve_stands_in_and_says_so(tmp_path, name):
    case = CASES[name]
    rows = [case.row(**{case.id: str(i)}) for i in range(5)]
    part, ledger = read(tmp_path, name, dev=rows[1:], train=rows[:1])
    assert [len(part.rows(role)) for role in (BENCHMARK, RESERVE, POOL)] == [2, 2, 1]
    assert ledger.notes == [
        f"{name}: there is no test split; 2 rows held in reserve stand in for the benchmark. Do not "
        "report scores on them."
    ]


def test_without_a_reserve_a_missing_split_is_only_noted(tmp_path):
    part, ledger = read(tmp_path, "medmcqa", train=cops(4, 1))
    assert len(part.rows(POOL)) == 2
    assert ledger.notes == [
        "medmcqa: there is no validation split, so it adds nothing to the benchmark."
    ]


def test_files_that_are_not_read_are_noted(tmp_path):
    _, ledger = read(tmp_path, "medmcqa", train=cops(4), dev=cops(1), everything=cops(1))
    assert ledger.notes == [
        "medmcqa/everything.jsonl: not read; its name tells no split, or its suffix no format"
    ]

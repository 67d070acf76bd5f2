"""What a later command reads is what was written, or it is refused."""

import json
import math

import pytest

from medistill_trl.errors import UserError
from medistill_trl.run_directory import EVALUATION, HELDOUT, RECORD, RunDirectory
from medistill_trl.sealed_json import read_items, read_record, write_items, write_record

CONTENT = {"a": [1, 2.5, None, True, "naïve 🩺"], "b": {"c": 1e-30, "d": {}}, "3": "x"}


@pytest.fixture
def path(tmp_path):
    write_record(tmp_path / "r.json", CONTENT)
    return tmp_path / "r.json"


def test_what_is_written_is_read(path):
    assert read_record(path, "") == CONTENT
    path.write_text(json.dumps(json.loads(path.read_text())))  # laid out otherwise
    assert read_record(path, "") == CONTENT


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda text: text[:-20], "no JSON any more"),
        (lambda text: "", "no JSON any more"),
        (lambda text: "[" * 100_000, "no JSON any more"),
        (lambda text: text.replace("2.5", "2.6"), "has changed since it was written"),
        (lambda text: text.replace('"c"', '"e"'), "has changed since it was written"),
        (lambda text: "[]", "not written by medistill_trl"),
        (lambda text: json.dumps(CONTENT), "not written by medistill_trl"),
    ],
)
def test_what_has_changed_is_refused_with_what_to_do(path, damage, reason):
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match=reason) as caught:
        read_record(path, "make it anew")
    assert str(path) in str(caught.value)
    assert str(caught.value).endswith("make it anew")


def test_every_single_bit_counts(path):
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            assert read_record(path, "") == CONTENT  # of blanks between values
        except UserError:
            continue


def test_not_a_number_is_refused_where_that_is_asked_for(tmp_path):
    write_record(tmp_path / "a.json", {"x": math.nan})
    assert math.isnan(read_record(tmp_path / "a.json", "")["x"])
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_record(tmp_path / "b.json", {"x": math.nan}, finite=True)
    assert not (tmp_path / "b.json").exists()


def test_items_belong_to_one_result(tmp_path):
    first, second = (
        write_items(tmp_path / f"{n}.jsonl", [{"id": "a\u2028b", "n": n}]) for n in (1, 2)
    )
    assert read_items(tmp_path / "1.jsonl", first, "") == [{"id": "a\u2028b", "n": 1}]
    for digest in (second, None, ""):
        with pytest.raises(UserError, match="not written with the result"):
            read_items(tmp_path / "1.jsonl", digest, "")
    with pytest.raises(UserError, match="cannot be read"):
        read_items(tmp_path / "3.jsonl", first, "")


def test_a_run_reads_the_items_of_training_and_of_the_evaluation(tmp_path):
    run = RunDirectory(tmp_path)
    for name, part in ((RECORD, HELDOUT), (EVALUATION, "fidelity")):
        assert run.read_items(part) == []
        digest = run.write_items(part, [{"part": part}])
        with pytest.raises(UserError, match="not written with the result"):
            run.read_items(part)
        run.write_result(name, {"items": {part: digest}})
        assert run.read_items(part) == [{"part": part}]

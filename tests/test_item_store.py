"""Results per item: computed once, in order, and safe from a kill."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass

import pytest
from conftest import ROOT

from eval.item_store import ItemStore
from medistill_trl.errors import RunFailed, UserError

KEY = {"subject": "sha256:1 float32", "measure": "length"}


@dataclass(frozen=True)
class Item:
    id: str
    text: str


ITEMS = [Item(f"i{number}", "x" * number) for number in range(7)]


class Counted:
    """A measure that notes what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, items):
        self.asked.append([item.id for item in items])
        for item in items:
            yield {"length": len(item.text), "half": len(item.text) / 3}


def measure(store, items=ITEMS, key=KEY, chunk=3):
    compute = Counted()
    return store.records(key, items, compute, chunk, "length"), compute.asked


def file_of(store):
    (path,) = store.folder.glob("*.jsonl")
    return path


def test_results_come_in_the_order_of_the_items_a_chunk_at_a_time(tmp_path):
    records, asked = measure(ItemStore(tmp_path), ITEMS[::-1])
    assert [record["id"] for record in records] == [item.id for item in ITEMS[::-1]]
    assert [record["length"] for record in records] == [6, 5, 4, 3, 2, 1, 0]
    assert [len(part) for part in asked] == [3, 3, 1]


def test_what_is_stored_is_not_computed_again_and_is_the_same(tmp_path):
    first, _ = measure(ItemStore(tmp_path))
    store = ItemStore(tmp_path)
    again, asked = measure(store)
    assert asked == []
    assert again == first
    assert (store.computed, store.reused) == (0, 7)


def test_more_items_compute_only_what_is_new(tmp_path):
    measure(ItemStore(tmp_path), ITEMS[2:4])
    records, asked = measure(ItemStore(tmp_path))
    assert asked == [["i0", "i1", "i4"], ["i5", "i6"]]
    assert [record["length"] for record in records] == list(range(7))


def test_another_key_or_another_content_is_another_result(tmp_path):
    measure(ItemStore(tmp_path))
    _, asked = measure(ItemStore(tmp_path), key=KEY | {"subject": "sha256:2 float32"})
    assert sum(map(len, asked)) == 7
    changed = [*ITEMS[:6], Item("i6", "changed")]
    records, asked = measure(ItemStore(tmp_path), changed)
    assert asked == [["i6"]]
    assert records[6]["length"] == 7


def test_mappings_are_items_too_and_equal_items_are_computed_once(tmp_path):
    rows = [{"id": "a", "text": "one"}, {"id": "b", "text": "two"}, {"id": "a", "text": "one"}]
    asked = []

    def compute(items):
        asked.extend(items)
        return [{"text": item["text"]} for item in items]

    records = ItemStore(tmp_path).records(KEY, rows, compute, 10, "x")
    assert [record["text"] for record in records] == ["one", "two", "one"]
    assert len(asked) == 2


@pytest.mark.parametrize("cut", [1, 20, 45])
def test_a_torn_last_line_is_computed_again(tmp_path, cut):
    whole, _ = measure(ItemStore(tmp_path))
    path = file_of(ItemStore(tmp_path))
    content = path.read_bytes()
    os.truncate(path, len(content) - cut)
    records, asked = measure(ItemStore(tmp_path))
    assert asked == [["i6"]]
    assert records == whole
    assert path.read_bytes() == content


def test_a_damaged_file_is_named(tmp_path):
    measure(ItemStore(tmp_path))
    path = file_of(ItemStore(tmp_path))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], lines[2][:-4], *lines[3:]]) + "\n")
    with pytest.raises(UserError, match=f"{path}: damaged .* remove the file"):
        measure(ItemStore(tmp_path))


def test_a_result_that_is_not_finite_stops_it_and_what_was_there_stays(tmp_path):
    def broken(items):
        return [{"nats": float("nan") if item.id == "i4" else 1.0} for item in items]

    store = ItemStore(tmp_path)
    with pytest.raises(RunFailed, match="item i4 is not finite"):
        store.records(KEY, ITEMS, broken, 2, "x")
    stored = [json.loads(line) for line in file_of(store).read_text().splitlines()]
    assert len(stored) == 1 + 4  # the key, and two chunks


def test_a_measure_that_loses_an_item_is_a_bug(tmp_path):
    with pytest.raises(ValueError, match="shorter"):
        ItemStore(tmp_path).records(KEY, ITEMS, lambda items: [{"a": 1}], 3, "x")


PROGRAM = textwrap.dedent("""
    import os, signal, sys
    from pathlib import Path
    from eval.item_store import ItemStore

    def compute(items):
        if any(item["id"] == "i5" for item in items):
            os.kill(os.getpid(), signal.SIGKILL)
        return [{"length": len(item["id"])} for item in items]

    items = [{"id": f"i{number}"} for number in range(7)]
    ItemStore(Path(sys.argv[1])).records({"a": 1}, items, compute, 2, "x")
""")


def test_killed_between_chunks_it_goes_on_where_it_was(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    killed = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    asked = []

    def compute(items):
        asked.extend(item["id"] for item in items)
        return [{"length": 2} for item in items]

    rows = [{"id": f"i{number}"} for number in range(7)]
    records = ItemStore(tmp_path).records({"a": 1}, rows, compute, 2, "x")
    assert asked == ["i4", "i5", "i6"]
    assert len(records) == 7


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="MEDISTILL_CACHE"):
        measure(ItemStore(tmp_path / "file/below"))

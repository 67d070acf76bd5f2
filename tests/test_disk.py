"""A full disk is said in words, whatever library met it. The kernel refuses for real: by /dev/full, and by the limit a
process may have on the size of its files."""

import resource
import sqlite3

import pytest
import torch
from conftest import make_tokenizer
from safetensors.torch import save_file

from eval.item_store import ItemStore
from medistill_trl import disk
from medistill_trl.errors import RunFailed
from medistill_trl.files import write_text

LIMIT = 2**15
WEIGHTS = {"w": torch.zeros(2**16)}


@pytest.fixture
def no_large_files():
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fill_database(path):
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE t (text TEXT)")
        database.executemany("INSERT INTO t VALUES (?)", [("x" * 1000,)] * 200)


WRITERS = {
    "torch": lambda folder: torch.save(WEIGHTS, folder / "a.pt"),
    "safetensors": lambda folder: save_file(WEIGHTS, folder / "a.safetensors"),
    "sqlite": lambda folder: fill_database(folder / "a.sqlite"),
    "tokenizers": lambda folder: make_tokenizer(1200).backend_tokenizer.save(
        str(folder / "a.json")
    ),
    "text": lambda folder: write_text(folder / "a.json", "x" * 2 * LIMIT),
}


@pytest.mark.parametrize("library", WRITERS)
def test_what_every_library_raises_is_explained(library, no_large_files, tmp_path):
    with (
        pytest.raises(RunFailed, match=r"File too large .*free some space, then try again"),
        disk.explained(tmp_path, how_to_go_on="try again"),
    ):
        WRITERS[library](tmp_path)


def test_a_full_device_is_explained_too(tmp_path):
    with (
        pytest.raises(RunFailed, match="No space left on device"),
        disk.explained(tmp_path, how_to_go_on=""),
        open("/dev/full", "w") as file,
    ):
        file.write("x")


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), FileNotFoundError("gone")])
def test_other_errors_pass_as_they_are(error, tmp_path):
    with pytest.raises(type(error), match=str(error)), disk.explained(tmp_path, how_to_go_on=""):
        raise error


def test_a_text_file_is_the_old_one_or_the_new_one(no_large_files, tmp_path):
    path = tmp_path / "a.json"
    write_text(path, "old")
    with pytest.raises(OSError, match="File too large"):
        write_text(path, "x" * 2 * LIMIT)
    assert path.read_text() == "old"


def test_stored_items_survive_a_disk_that_fills_up(tmp_path, request):
    items = [{"id": str(n)} for n in range(8)]
    compute = lambda part: [{"text": "y" * 20_000} for _ in part]  # noqa: E731
    request.getfixturevalue("no_large_files")
    with pytest.raises(OSError, match="File too large"):
        ItemStore(tmp_path).records({"k": 1}, items, compute, 1, "items")
    resource.setrlimit(
        resource.RLIMIT_FSIZE,
        (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]),
    )
    again = ItemStore(tmp_path)
    assert len(again.records({"k": 1}, items, compute, 1, "items")) == 8
    assert (again.reused, again.computed) == (1, 7)

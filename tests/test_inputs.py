"""Where the rows come from: folders of releases, the hub, passages."""

import json

import pytest

from data_prep import inputs
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


def found(raw_dir, name):
    data = inputs.find(name, raw_dir)
    return {f.path.relative_to(data.folder).as_posix(): f.split for f in data.files}, data.ignored


LAYOUTS = {
    "medqa": {
        "US/4_options/phrases_no_exclude_train.jsonl": "train",
        "US/4_options/phrases_no_exclude_dev.jsonl": "validation",
        "US/4_options/phrases_no_exclude_test.jsonl": "test",
        "Mainland/train.jsonl": None,
        "Taiwan/test.jsonl": None,
        "US/US_qbank.jsonl": None,
    },
    "medmcqa": {
        "train.json": "train",
        "dev.json": "validation",
        "test.json": "test",
        "data/validation-00000-of-00001.parquet": "validation",
    },
    "pubmedqa": {
        "ori_pqaa.json": "artificial",
        "ori_pqau.json": "unlabelled",
        "ori_pqal.json": "labelled",
        "test_set.json": "test",
        "pqal_fold0/train_set.json": "labelled",
        "test_ground_truth.json": None,
        "pqa_artificial/train-00000-of-00001.parquet": "artificial",
        "pqa_unlabeled/train-00000-of-00001.parquet": "unlabelled",
        "pqa_labeled/train-00000-of-00001.parquet": "labelled",
    },
    "pubhealth": {
        "train.tsv": "train",
        "dev.tsv": "validation",
        "test.tsv": "test",
        "default/validation/0000.parquet": "validation",
    },
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_file_of_a_release_or_the_hub_tells_its_split(tmp_path, name):
    for path in LAYOUTS[name]:
        write(tmp_path / name, path, "")
    expected = {path: split for path, split in LAYOUTS[name].items() if split}
    assert found(tmp_path, name) == (expected, [])


def test_files_that_are_not_read_are_listed(tmp_path):
    for path in ("train.JSONL", "everything.jsonl", "README.md", "dev.jsonl.gz", ".hidden.jsonl"):
        write(tmp_path / "medqa", path, "")
    unread = ["medqa/dev.jsonl.gz", "medqa/everything.jsonl"]
    assert found(tmp_path, "medqa") == ({"train.JSONL": "train"}, unread)


def test_a_files_own_name_comes_before_its_folders(tmp_path):
    for path in ("usmle_training_2020/test.jsonl", "test_of_2019/part/train.jsonl", "dev/0.jsonl"):
        write(tmp_path / "medqa", path, "")
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "elsewhere", "test.jsonl", "")
    (tmp_path / "medqa/linked").symlink_to(tmp_path / "elsewhere")
    assert found(tmp_path, "medqa")[0] == {
        "usmle_training_2020/test.jsonl": "test",
        "test_of_2019/part/train.jsonl": "train",
        "dev/0.jsonl": "validation",
        "linked/test.jsonl": "test",
    }


def test_a_file_beside_the_rows_counts_for_the_digest(tmp_path):
    write(tmp_path / "pubmedqa", "ori_pqal.json", "")
    write(tmp_path / "pubmedqa", "test_ground_truth.json", "{}")
    before = inputs.find("pubmedqa", tmp_path).digests()
    assert [digest["file"] for digest in before] == ["ori_pqal.json", "test_ground_truth.json"]
    write(tmp_path / "pubmedqa", "test_ground_truth.json", '{"1": "yes"}')
    assert inputs.find("pubmedqa", tmp_path).digests() != before


def test_a_word_above_the_folder_names_no_split(tmp_path):
    write(tmp_path / "test_of_mine/medqa", "train.jsonl", "")
    assert found(tmp_path / "test_of_mine", "medqa") == ({"train.jsonl": "train"}, [])


def test_a_missing_folder_names_the_layout_and_the_way_around(tmp_path):
    with pytest.raises(UserError, match=r"medmcqa: there is no such folder.*DIR/medqa/.*--sources"):
        inputs.find("medmcqa", tmp_path)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["rows.jsonl"], r"train or validation or test\); found medqa/rows\.jsonl"),
        (["train.csv"], r"found medqa/train\.csv"),
        (["README.md"], r"found nothing that ends in \.jsonl, \.json, \.tsv, \.parquet"),
    ],
)
def test_a_folder_without_a_usable_name(tmp_path, files, said):
    for path in files:
        write(tmp_path / "medqa", path, "")
    with pytest.raises(UserError, match=said):
        inputs.find("medqa", tmp_path)


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty cache of a hub that cannot be reached."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("name", LAYOUTS)
def test_without_the_hub_both_other_ways_are_named(hub_cache, name):
    with pytest.raises(UserError) as caught:
        inputs.find(name, None)
    message = str(caught.value)
    assert message.startswith(f"{name}: ")
    for part in ("cannot be loaded from the hub", "--raw_dir DIR", f"DIR/{name}/", "--sample"):
        assert part in message


def test_what_the_hub_gave_once_is_used_without_it(hub_cache):
    snapshot = "datasets--GBaker--MedQA-USMLE-4-options/snapshots"
    revision = "0fb93dd23a7339b6dcd27e241cb9b5eca62d4d18"
    name = "phrases_no_exclude_test.jsonl"
    write(hub_cache, f"{snapshot}/{revision}/{name}", "")
    assert found(None, "medqa") == ({name: "test"}, [])


def test_digests_tell_one_file_from_another(tmp_path):
    write(tmp_path / "medqa", "train.jsonl", "a")
    first = inputs.find("medqa", tmp_path).digests()
    assert first[0] | {"sha256": ""} == {
        "source": "medqa",
        "file": "train.jsonl",
        "split": "train",
        "sha256": "",
    }
    write(tmp_path / "medqa", "train.jsonl", "b")
    assert inputs.find("medqa", tmp_path).digests() != first


def test_passages_are_any_files_of_text(tmp_path):
    for path in ("notes/a.txt", "b.jsonl", "c.pdf"):
        write(tmp_path, path, "")
    assert [f.path.name for f in inputs.passages(tmp_path).files] == ["b.jsonl", "a.txt"]
    assert [f.path.name for f in inputs.passages(tmp_path / "b.jsonl").files] == ["b.jsonl"]
    with pytest.raises(
        UserError, match=r"--medppl_from .*nowhere: there is no file that ends in \.jsonl"
    ):
        inputs.passages(tmp_path / "nowhere")

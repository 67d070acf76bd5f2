"""The packaged sample is what its README says."""

import json

import pytest
from conftest import ROOT

from data_prep.build import main
from data_prep.inputs import sha256
from medistill_trl.data import read_prompts

SAMPLE = ROOT / "data_prep/sample"
SOURCES = ("medqa", "medmcqa", "pubmedqa", "pubhealth")
RAW_SCHEMA = {
    "medqa": "question answer options answer_idx meta_info",
    "medmcqa": "question exp cop opa opb opc opd subject_name topic_name id choice_type",
    "pubmedqa": "pubid QUESTION CONTEXTS LABELS MESHES YEAR final_decision LONG_ANSWER "
    "reasoning_required_pred reasoning_free_pred",
    "pubhealth": "claim_id claim explanation main_text label sources subjects date_published fact_checkers",
}


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def raw(source):
    return [row for path in sorted((SAMPLE / "raw" / source).glob("*.jsonl")) for row in rows(path)]


def test_the_shipped_files_are_what_the_command_makes(tmp_path):
    assert main(["--sample", "--out", str(tmp_path), "--jobs", "1"]) == 0
    report = json.loads((SAMPLE / "build_report.json").read_text())
    assert json.loads((tmp_path / "build_report.json").read_text()) == report
    for name, file in report["files"].items():
        assert sha256(SAMPLE / name) == file["sha256"], name
        assert (tmp_path / name).read_bytes() == (SAMPLE / name).read_bytes(), name


def test_sizes_and_shares():
    prompts = {s: rows(SAMPLE / f"processed/{s}.jsonl") for s in ("train", "validation", "test")}
    for split, each in (("train", 16), ("validation", 1), ("test", 1)):
        found = [row["source"] for row in prompts[split]]
        assert {source: found.count(source) for source in SOURCES} == dict.fromkeys(SOURCES, each)
        _, report = read_prompts(str(SAMPLE / f"processed/{split}.jsonl"), "fail")
        assert report.skipped == []


@pytest.mark.parametrize("source", SOURCES)
def test_raw_records_have_the_schema_of_the_release(source):
    records = raw(source)
    assert len(records) == 44
    for record in records:
        assert set(RAW_SCHEMA[source].split()) <= set(record)


def test_answers_are_the_gold_options():
    prompts = {
        row["id"].split("-", 2)[2]: row
        for split in ("train", "validation", "test")
        for row in rows(SAMPLE / f"processed/{split}.jsonl")
    }
    for record in raw("medqa"):
        assert prompts.get(record["id"], record)["answer"] == record["answer"]
    for record in raw("medmcqa"):
        gold = record["op" + "abcd"[record["cop"] - 1]]
        assert prompts.get(record["id"], {"answer": gold})["answer"] == gold
    assert len(prompts) == 72

"""The packaged sample is what its README says."""

import json

import pytest
from conftest import ROOT

from data_prep.open_ended import SOURCES, benchmark_record, long_form_question
from data_prep.sample.build import build
from medistill_trl.data import read_prompts

SAMPLE = ROOT / "data_prep/sample"


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_shipped_files_are_what_the_command_makes(tmp_path):
    counts = build(tmp_path)
    for name in counts:
        assert (tmp_path / name).read_bytes() == (SAMPLE / name).read_bytes(), name


def test_sizes_and_disjointness():
    splits = {s: rows(SAMPLE / f"processed/{s}.jsonl") for s in ("train", "validation", "test")}
    assert [len(splits[s]) for s in ("train", "validation", "test")] == [64, 4, 4]
    ids = [r["id"] for split in splits.values() for r in split]
    for source in SOURCES:
        records = rows(SAMPLE / f"raw/{source}.jsonl")
        assert len(records) >= 40
        ids += [r["id"] for r in rows(SAMPLE / f"benchmarks/{source}.jsonl")]
    assert len(ids) == len(set(ids)) == 176


@pytest.mark.parametrize("source", SOURCES)
def test_raw_records_have_the_raw_schema(source):
    expected = {
        "medqa": {"question", "answer", "options", "answer_idx", "meta_info"},
        "medmcqa": {
            "question",
            "exp",
            "cop",
            "opa",
            "opb",
            "opc",
            "opd",
            "subject_name",
            "topic_name",
            "id",
            "choice_type",
        },
        "pubmedqa": {
            "pubid",
            "QUESTION",
            "CONTEXTS",
            "LABELS",
            "MESHES",
            "YEAR",
            "final_decision",
            "LONG_ANSWER",
            "reasoning_required_pred",
            "reasoning_free_pred",
        },
        "pubhealth": {
            "claim_id",
            "claim",
            "explanation",
            "main_text",
            "label",
            "sources",
            "subjects",
            "date_published",
            "fact_checkers",
        },
    }
    for record in rows(SAMPLE / f"raw/{source}.jsonl"):
        assert expected[source] <= set(record)


@pytest.mark.parametrize("source", SOURCES)
def test_the_answer_is_the_gold_option_and_no_letter_is_shown(source):
    for record in rows(SAMPLE / f"raw/{source}.jsonl"):
        benchmark, prompt = benchmark_record(source, record), long_form_question(source, record)
        assert benchmark["options"][benchmark["answer"]] == prompt["answer"]
        if source == "medqa":
            assert prompt["answer"] == record["answer"] == record["options"][record["answer_idx"]]
        if source == "medmcqa":
            assert prompt["answer"] == record["op" + "abcd"[record["cop"] - 1]]
        assert (
            "following" not in prompt["question"].split("Claim:")[0].lower()
            or source == "pubhealth"
        )
        assert len(set(benchmark["options"])) == len(benchmark["options"])


def test_the_prompts_keep_the_column_contract():
    for split in ("train", "validation", "test"):
        _, report = read_prompts(str(SAMPLE / f"processed/{split}.jsonl"), "fail")
        assert report.skipped == []

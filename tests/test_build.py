"""The data build as a user runs it: nothing lost, nothing leaked, everything the same again."""

import json
import re

import pytest
from conftest import ROOT
from data_builds import PARTS, SAMPLE, append, build, rows

from data_prep.schema import parse_id
from medistill_trl.data import read_prompts

REAL = ROOT.parent / "shared/data"
LEAKS = "contaminated_by_stage"


def test_every_row_has_exactly_one_fate(sample_build):
    _, report = sample_build
    for source in report["sources"].values():
        columns = ("kept", "contaminated", "duplicate", "not convertible", "left out", "invalid")
        assert source["read"] == sum(source[name] for name in (*columns, "other reasons"))
        assert source["read"] == sum(sum(fates.values()) for fates in source["splits"].values())
    assert {name: s["read"] for name, s in report["sources"].items()} == {
        **dict.fromkeys(("medqa", "medmcqa", "pubmedqa", "pubhealth"), 44),
        **{name: len(rows(path)) for name, path in PASSAGES.items()},
    }


PASSAGES = {p.parent.name: p for p in (SAMPLE / "raw/passages").glob("*.jsonl")}


def test_the_same_build_gives_the_same_bytes(sample_build, tmp_path, monkeypatch):
    """Whatever the processes, and the slices in which the work is done."""
    out, report = sample_build
    monkeypatch.setattr("data_prep.workspace.SLICE", 17)
    code, again = build(tmp_path, "--sample", "--jobs", "2")
    assert code == 0
    assert again == report
    assert (tmp_path / "build_report.md").read_bytes() == (out / "build_report.md").read_bytes()
    for name, file in report["files"].items():
        assert len(rows(tmp_path / name)) == file["rows"]
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()
    left = {p.name for p in tmp_path.iterdir()}
    assert ".build" not in left


def test_another_seed_gives_another_split_of_the_same_rows(sample_build, tmp_path):
    out, _ = sample_build
    build(tmp_path, "--sample", "--seed", "1")
    ids = [
        {s: {r["id"] for r in rows(o / f"processed/{s}.jsonl")} for s in PARTS}
        for o in (out, tmp_path)
    ]
    assert ids[0]["validation"] != ids[1]["validation"]
    assert set().union(*ids[0].values()) == set().union(*ids[1].values())


def test_prompts_keep_the_contract_and_nothing_is_in_two_places(sample_build):
    out, _ = sample_build
    seen = {}
    for part in PARTS:
        prompts, report = read_prompts(str(out / f"processed/{part}.jsonl"), "fail")
        assert report.skipped == []
        for prompt in prompts:
            source, split, native = parse_id(prompt.id)
            assert source == prompt.source
            assert f"{source}-{split}-{native}" == prompt.id
            assert prompt.answer
            assert prompt.answer.lower() in prompt.reference.lower()
            assert seen.setdefault(prompt.id, part) == part
    held_out = [
        *(out / "benchmarks").glob("*.jsonl"),
        out / "fidelitybench_med.jsonl",
    ]
    for path in held_out:
        assert not seen.keys() & {row["id"] for row in rows(path)}, path


def test_no_option_letter_is_in_any_prompt(sample_build):
    out, _ = sample_build
    letter = re.compile(
        r"\b(?:ans(?:wer)?|option|choice)s?\W{0,3}(?:is\W+)?[\"'(]*[A-Ea-e]\b(?!\w)|\([a-eA-E]\)"
    )
    for part in PARTS:
        for row in rows(out / f"processed/{part}.jsonl"):
            for key in ("question", "reference", "answer"):
                assert not letter.search(row[key]), row
            if "following" in row["question"].split("Claim:")[0]:
                assert "\n- " in row["question"], row


def test_benchmarks_are_complete_and_few_shot_examples_are_not_theirs(sample_build):
    out, _ = sample_build
    for name in ("medqa", "medmcqa", "pubmedqa", "pubhealth", "pubhealth_2class"):
        benchmark = rows(out / f"benchmarks/{name}.jsonl")
        examples = rows(out / f"benchmarks/few_shot/{name}.jsonl")
        options = {len(row["options"]) for row in benchmark + examples}
        assert len(options) == 1
        assert examples
        assert all(0 <= row["answer"] < options.copy().pop() for row in benchmark + examples)
        questions = {row["question"] for row in benchmark}
        assert not questions & {row["question"] for row in examples}
        assert not {row["id"] for row in benchmark} & {row["id"] for row in examples}
    gold = {r["id"]: r for r in rows(SAMPLE / "raw/medqa/test.jsonl")}
    for row in rows(out / "benchmarks/medqa.jsonl"):
        assert row["options"][row["answer"]] == gold[parse_id(row["id"])[2]]["answer"]
    two = rows(out / "benchmarks/pubhealth_2class.jsonl")
    four = {r["id"]: r for r in rows(out / "benchmarks/pubhealth.jsonl")}
    assert {r["options"][r["answer"]] for r in two} == {"true", "false"}
    assert all(four[r["id"]]["answer"] == r["answer"] for r in two)


def test_fidelitybench_has_evidence_and_derived_labels(sample_build):
    out, _ = sample_build
    prompts = rows(out / "fidelitybench_med.jsonl")
    labels = set()
    for prompt in prompts:
        assert 1 <= len(prompt["evidence"]) <= 3
        assert all(e["text"] for e in prompt["evidence"])
        assert prompt["reference"]
        assert len({e["id"] for e in prompt["evidence"]}) == len(prompt["evidence"])
        expected = {"mixture": set(), "maybe": set(), "false": {"refuted"}, "unproven": {"unknown"}}
        found = {claim["label"] for claim in prompt["claims"]}
        assert found == expected.get(prompt["answer"], {"supported"})
        labels |= found
    assert {p["source"] for p in prompts} == {"pubmedqa", "pubhealth"}
    assert {"supported", "refuted"} <= labels


def test_planted_leaks_are_all_caught_and_named(raw, tmp_path):
    exact, recased, near = rows(raw / "medqa/test.jsonl")[:3]
    train = raw / "medqa/train.jsonl"
    append(train, {k: v for k, v in exact.items() if k != "id"})
    append(train, recased | {"id": "recased", "question": recased["question"].upper()})
    words = near["question"].split()
    words[3:3] = ["clearly"]
    words[-6:-6] = ["probably"]
    append(train, near | {"id": "near", "question": " ".join(words)})
    abstract = next(
        r
        for r in rows(raw / "pubmedqa/ori_pqal.jsonl")
        if r["pubid"] in json.loads((raw / "pubmedqa/test_ground_truth.json").read_text())
    )
    append(
        raw / "pubmedqa/ori_pqaa.jsonl",
        abstract | {"QUESTION": "Was the programme worth its cost?", "LONG_ANSWER": "It was."},
    )
    code, report = build(tmp_path / "out", "--raw_dir", raw)
    assert code == 0
    medqa = report["sources"]["medqa"][LEAKS]
    assert medqa["same question and options"] == 2
    assert medqa["13-gram coverage"] + medqa["near duplicate (MinHash)"] == 1
    assert report["sources"]["pubmedqa"][LEAKS]["same PubMed id"] == 1
    named = {
        e["id"]
        for reason, found in report["examples"].items()
        if "contaminated" in reason
        for e in found
    }
    assert {
        "medqa-train-recased",
        "medqa-train-near",
        f"pubmedqa-artificial-{abstract['pubid']}",
    } <= named
    trained = json.dumps([rows(tmp_path / f"out/processed/{part}.jsonl") for part in PARTS])
    assert "medqa-train-recased" not in trained
    assert "medqa-train-near" not in trained


def test_passages_with_text_of_the_pool_or_a_benchmark_are_left_out(raw, tmp_path):
    pool = rows(raw / "pubhealth/train.jsonl")[0]
    held_out = next(r for r in rows(raw / "pubhealth/test.jsonl") if r["main_text"])
    pubmed = rows(raw / "pubmedqa/ori_pqaa.jsonl")[0]
    filler = " ".join(
        f"The {n}th ward has beds of its own and nurses who know them well." for n in range(9)
    )
    given = tmp_path / "given"
    given.mkdir()
    append(
        given / "a.jsonl",
        {"id": "pool", "text": f"{filler} {pool['explanation']}"},
        {"id": "held", "text": f"{held_out['main_text']} {filler}"},
        {"id": "pmid", "text": filler.replace("beds", "rooms"), "pmid": pubmed["pubid"]},
        {"id": "short", "text": "Too short to say much."},
        {"id": "clean", "text": filler},
        {"id": "twice", "text": filler.upper()},
    )
    (given / "b.txt").write_text("A spleen filters blood and holds platelets in reserve. " * 9)
    _, report = build(tmp_path / "out", "--raw_dir", raw, "--medppl_from", given)
    kept = {parse_id(row["id"])[2].split("-")[0] for row in rows(tmp_path / "out/medppl_10k.jsonl")}
    fates = report["sources"]["passages"]["splits"]["passages"]
    assert kept & {"pool", "held", "pmid", "short"} == set()
    assert len(kept & {"clean", "twice"}) == 1
    assert fates["kept: medppl"] == 2
    reasons = " ".join(fates)
    for told in (
        "text of the training pool",
        "13-gram",
        "same PubMed id",
        "fewer than",
        "duplicate",
    ):
        assert told in reasons, told


def test_duplicates_in_the_pool_are_dropped_and_alike_rows_share_a_part(raw, tmp_path):
    path = raw / "medqa/train.jsonl"
    first, second = rows(path)[:2]
    append(path, first | {"id": "again", "question": first["question"].lower()})
    words = second["question"].split()
    for n in range(6):
        told = " ".join(f"detail{n}{k}" for k in range(len(words) // 4))
        append(path, second | {"id": f"variant{n}", "question": f"{' '.join(words)} {told}?"})
    _, report = build(tmp_path / "out", "--raw_dir", raw)
    assert report["sources"]["medqa"]["duplicate"] >= 1
    part_of = {
        r["id"]: part for part in PARTS for r in rows(tmp_path / f"out/processed/{part}.jsonl")
    }
    variants = [part for name, part in part_of.items() if "variant" in name]
    assert len(variants) == 6
    assert len(set(variants)) == 1
    assert "medqa-train-again" not in part_of


def test_adding_a_source_moves_nothing(raw, tmp_path):
    """Also where it holds out a row that was kept before: the others stay where they are."""
    before = tmp_path / "before"
    build(before, "--raw_dir", raw, "--sources", "medmcqa", "medqa")
    taken = rows(before / "processed/validation.jsonl")[0]
    article = f"{taken['question']} {taken['reference']}"
    held_out = rows(raw / "pubhealth/test.jsonl")[0]
    append(raw / "pubhealth/test.jsonl", held_out | {"claim_id": "quoting", "main_text": article})
    build(tmp_path / "after", "--raw_dir", raw)
    lost = []
    for part in PARTS:
        after = {r["id"]: r for r in rows(tmp_path / f"after/processed/{part}.jsonl")}
        for row in rows(before / f"processed/{part}.jsonl"):
            lost += [row["id"]] if row["id"] not in after else []
            assert after.get(row["id"], row) == row
    assert lost == [taken["id"]]


def test_text_of_a_benchmarks_explanation_is_not_trained_on(raw, tmp_path):
    held_out = rows(raw / "pubhealth/test.jsonl")[1]
    append(
        raw / "pubhealth/train.jsonl",
        held_out | {"claim_id": "quoting", "claim": "Something quite different was said."},
    )
    _, report = build(tmp_path, "--raw_dir", raw)
    assert report["sources"]["pubhealth"][LEAKS]["13-gram coverage"] == 1


def test_rows_of_one_article_share_a_part(raw, tmp_path):
    path = raw / "pubhealth/train.jsonl"
    first = rows(path)[0]
    for n in range(12):
        told = " ".join(f"fact{n}{k} was found" for k in range(12))
        for k in range(3):
            claim = f"Claim {k} {'abc'[k] * 7} about matter {n}."
            append(path, first | {"claim_id": f"{n}x{k}", "claim": claim, "main_text": told})
    build(tmp_path, "--raw_dir", raw)
    part_of = {r["id"]: part for part in PARTS for r in rows(tmp_path / f"processed/{part}.jsonl")}
    articles = [
        {part_of[f"pubhealth-train-{n}x{k}"] for k in range(3)}
        for n in range(12)
        if f"pubhealth-train-{n}x0" in part_of
    ]
    assert len(articles) == 12
    assert all(len(parts) == 1 for parts in articles)


def test_medppl_is_filled_in_rounds(raw, tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.medppl.SPARE", 1)
    texts = [row["explanation"] for row in rows(raw / "pubhealth/train.jsonl")]
    for n, text in enumerate(texts * 4):
        append(
            raw / "passages/passages.jsonl", {"id": f"pool{n}", "text": f"{text} {text} round {n}"}
        )
    _, report = build(tmp_path, "--raw_dir", raw, "--medppl_size", "20")
    kept = rows(tmp_path / "medppl_10k.jsonl")
    assert len(kept) == 20
    assert not any("-pool" in row["id"] for row in kept)
    assert not any("MedPPL" in note for note in report["notes"])


def test_size_takes_a_subset_in_the_same_order(sample_build, tmp_path):
    out, _ = sample_build
    code, report = build(tmp_path, "--sample", "--size", "20")
    assert code == 0
    sizes = [report["files"][f"processed/{part}.jsonl"]["rows"] for part in PARTS]
    assert sizes == [18, 1, 1]
    for part in PARTS:
        taken = rows(tmp_path / f"processed/{part}.jsonl")
        assert taken == rows(out / f"processed/{part}.jsonl")[: len(taken)]
    assert sum(s["left out"] for s in report["sources"].values()) >= 72 - 20


@pytest.mark.skipif(not REAL.exists(), reason="the real development rows are not here")
def test_real_rows_are_all_accounted_for(tmp_path):
    code, report = build(tmp_path, "--raw_dir", REAL / "raw", "--medppl_from", REAL / "medppl")
    assert code == 0
    read = {name: source["read"] for name, source in report["sources"].items()}
    assert read == {
        "medqa": 2064,
        "medmcqa": 1202,
        "pubmedqa": 500,
        "pubhealth": 273,
        "passages": 1000,
    }
    for source in report["sources"].values():
        assert source["kept"] / source["read"] > 0.6
        assert source["invalid"] == 0
        assert source["contaminated"] <= 2
    pmids = {r["id"] for r in rows(tmp_path / "benchmarks/pubmedqa.jsonl")}
    assert len(pmids) == 250

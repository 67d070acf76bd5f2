"""The data build as a user runs it: nothing lost, nothing leaked, nothing half-written."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from data_prep.build import main
from data_prep.schema import parse_id
from medistill_trl.data import read_prompts

SAMPLE = ROOT / "data_prep/sample"
REAL = ROOT.parent / "shared/data"
LEAKS = "contaminated_by_stage"


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def append(path, *records):
    with path.open("a", encoding="utf-8") as file:
        for record in records:
            line = record if isinstance(record, str) else json.dumps(record)
            file.write(f"{line}\n")


def build(out, *options):
    """Exit code and report."""
    code = main(["--out", str(out), "--jobs", "1", *map(str, options)])
    report = out / "build_report.json"
    return code, json.loads(report.read_text()) if report.exists() else None


@pytest.fixture
def raw(tmp_path):
    return shutil.copytree(SAMPLE / "raw", tmp_path / "raw")


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    out = tmp_path_factory.mktemp("sample")
    code, report = build(out, "--sample")
    assert code == 0
    return out, report


def test_every_row_has_exactly_one_fate(sample):
    _, report = sample
    for source in report["sources"].values():
        columns = ("kept", "contaminated", "duplicate", "not convertible", "left out", "invalid")
        assert source["read"] == sum(source[name] for name in (*columns, "other reasons"))
        assert source["read"] == sum(sum(fates.values()) for fates in source["splits"].values())
    assert {name: s["read"] for name, s in report["sources"].items()} == {
        **dict.fromkeys(("medqa", "medmcqa", "pubmedqa", "pubhealth"), 44),
        **{name: len(rows(path)) for name, path in PASSAGES.items()},
    }


PASSAGES = {p.parent.name: p for p in (SAMPLE / "raw/passages").glob("*.jsonl")}


def test_the_same_build_gives_the_same_bytes(sample, tmp_path):
    out, report = sample
    code, again = build(tmp_path, "--sample", "--jobs", "2")
    assert code == 0
    assert again == report
    assert (tmp_path / "build_report.md").read_bytes() == (out / "build_report.md").read_bytes()
    for name, file in report["files"].items():
        assert len(rows(tmp_path / name)) == file["rows"]
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()
    left = {p.name for p in tmp_path.iterdir()}
    assert ".build" not in left


def test_another_seed_gives_another_split_of_the_same_rows(sample, tmp_path):
    out, _ = sample
    build(tmp_path, "--sample", "--seed", "1")
    ids = [
        {s: {r["id"] for r in rows(o / f"processed/{s}.jsonl")} for s in PARTS}
        for o in (out, tmp_path)
    ]
    assert ids[0]["validation"] != ids[1]["validation"]
    assert set().union(*ids[0].values()) == set().union(*ids[1].values())


PARTS = ("train", "validation", "test")


def test_prompts_keep_the_contract_and_nothing_is_in_two_places(sample):
    out, _ = sample
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


def test_no_option_letter_is_in_any_prompt(sample):
    out, _ = sample
    letter = re.compile(
        r"\b(?:ans(?:wer)?|option|choice)s?\W{0,3}(?:is\W+)?[\"'(]*[A-Ea-e]\b(?!\w)|\([a-eA-E]\)"
    )
    for part in PARTS:
        for row in rows(out / f"processed/{part}.jsonl"):
            for key in ("question", "reference", "answer"):
                assert not letter.search(row[key]), row
            if "following" in row["question"].split("Claim:")[0]:
                assert "\n- " in row["question"], row


def test_benchmarks_are_complete_and_few_shot_examples_are_not_theirs(sample):
    out, _ = sample
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


def test_fidelitybench_has_evidence_and_derived_labels(sample):
    out, _ = sample
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
    assert medqa["same question"] == 2
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


BAD_ROWS = {
    "not JSON": "{broken",
    "must be an object": "[1]",
    "question must be a text": {"question": 5},
    "NUL": {"question": "a\0b"},
    "cop is 9": {"cop": 9},
    "question is empty": {"question": "  "},
    "1,000,000 characters": {"question": "x" * 10**6},
}


def test_bad_rows_stop_the_build_named_by_file_and_line_or_are_skipped(raw, tmp_path, capsys):
    path = raw / "medmcqa/train.jsonl"
    good = rows(path)
    bad = [
        b if isinstance(b, str) else good[0] | {"id": f"bad{n}"} | b
        for n, b in enumerate(BAD_ROWS.values())
    ]
    append(path, *bad)
    out = tmp_path / "out"
    code, report = build(out, "--raw_dir", raw)
    told = capsys.readouterr().err
    assert code == 2
    assert report is None
    assert not (out / "processed").exists()
    for number, reason in enumerate(BAD_ROWS, start=len(good) + 1):
        assert re.search(rf"medmcqa/train.jsonl, line {number}: .*{reason}", told), reason
    assert "--on_bad_row skip" in told
    assert "Traceback" not in told

    code, report = build(out, "--raw_dir", raw, "--on_bad_row", "skip")
    assert code == 0
    assert len(report["bad_rows"]) == len(BAD_ROWS)
    assert report["sources"]["medmcqa"]["invalid"] == len(BAD_ROWS)
    assert report["sources"]["medmcqa"]["read"] == 44 + len(BAD_ROWS)


def test_an_id_that_comes_twice_is_named_or_a_repeat(raw, tmp_path, capsys):
    path = raw / "medmcqa/train.jsonl"
    first = rows(path)[0]
    append(path, first)
    code, report = build(tmp_path / "out", "--raw_dir", raw)
    fates = report["sources"]["medmcqa"]["splits"]["train"]
    assert code == 0
    assert fates["dropped: repeats a record"] == 1
    append(path, first | {"question": "Something else altogether?"})
    code, _ = build(tmp_path / "other", "--raw_dir", raw)
    assert code == 2
    assert "already that of another record" in capsys.readouterr().err


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


def test_adding_a_source_moves_nothing(tmp_path):
    build(tmp_path / "two", "--sample", "--sources", "medqa", "medmcqa")
    build(tmp_path / "four", "--sample")
    for part in PARTS:
        before = rows(tmp_path / f"two/processed/{part}.jsonl")
        after = rows(tmp_path / f"four/processed/{part}.jsonl")
        assert [r for r in after if r["source"] in ("medqa", "medmcqa")] == before


def test_size_takes_a_subset_in_the_same_order(sample, tmp_path):
    out, _ = sample
    code, report = build(tmp_path, "--sample", "--size", "20")
    assert code == 0
    sizes = [report["files"][f"processed/{part}.jsonl"]["rows"] for part in PARTS]
    assert sizes == [18, 1, 1]
    for part in PARTS:
        taken = rows(tmp_path / f"processed/{part}.jsonl")
        assert taken == rows(out / f"processed/{part}.jsonl")[: len(taken)]
    assert sum(s["left out"] for s in report["sources"].values()) >= 72 - 20


def test_a_missing_split_is_stood_in_for_and_said(raw, tmp_path, capsys):
    (raw / "pubhealth/test.jsonl").unlink()
    code, report = build(tmp_path / "out", "--raw_dir", raw)
    assert code == 0
    assert any("pubhealth: there is no test split" in note for note in report["notes"])
    assert "Do not report scores" in capsys.readouterr().out
    assert all(
        r["split"] == "validation" for r in rows(tmp_path / "out/benchmarks/pubhealth.jsonl")
    )


def test_a_file_of_an_earlier_build_does_not_stay(raw, tmp_path):
    out = tmp_path / "out"
    build(out, "--raw_dir", raw)
    assert (out / "medppl_10k.jsonl").exists()
    shutil.rmtree(raw / "passages")
    build(out, "--raw_dir", raw)
    assert not (out / "medppl_10k.jsonl").exists()


def test_a_killed_build_leaves_no_half_file_and_goes_on(tmp_path, sample):
    _out, report = sample
    command = [
        sys.executable,
        "-m",
        "data_prep.build",
        "--sample",
        "--jobs",
        "1",
        "--out",
        str(tmp_path),
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    table = tmp_path / ".build" / "pubmedqa check.arrow"
    deadline = time.monotonic() + 60
    while not table.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [p.name for p in tmp_path.iterdir()] == [".build"]
    stamp = os.stat(table).st_mtime_ns
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "continuing the build that was interrupted" in again.stdout
    assert json.loads((tmp_path / "build_report.json").read_text()) == report
    assert stamp  # the table was there to be used; the same report came of it


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--raw_dir", "nowhere"], "--raw_dir DIR wants"),
        (["--raw_dir", "."], "no such folder"),
    ],
)
def test_what_cannot_be_found_is_said_in_a_sentence(tmp_path, capsys, monkeypatch, options, told):
    monkeypatch.chdir(tmp_path)
    assert main(["--out", "out", *options]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert "Traceback" not in error


@pytest.mark.parametrize("size", ["0", "-5", "12x", "k", "1e3", ""])
def test_a_size_that_is_none_is_refused(size, capsys):
    with pytest.raises(SystemExit):
        main(["--out", "x", "--sample", "--size", size])
    assert "120k" in capsys.readouterr().err


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

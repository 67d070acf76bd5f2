"""The data build when something is wrong: it says so, loses nothing and leaves nothing half-written."""

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
from data_builds import append, build, rows

from data_prep.build import main
from data_prep.workspace import Workspace

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


@pytest.mark.parametrize(
    "emptied", [["medmcqa/train.jsonl"], ["medqa/train.jsonl", "medqa/test.jsonl"]]
)
def test_an_empty_file_is_no_crash(raw, tmp_path, emptied):
    for name in emptied:
        (raw / name).write_text("")
    code, report = build(tmp_path, "--raw_dir", raw)
    assert code == 0
    assert any("there is no" in note for note in report["notes"])


def test_what_is_not_ours_is_left_alone(tmp_path, capsys):
    precious = tmp_path / "out/.build/precious"
    precious.parent.mkdir(parents=True)
    precious.write_text("mine")
    assert build(tmp_path / "out", "--sample")[0] == 2
    assert precious.read_text() == "mine"
    assert "not made by a data build" in capsys.readouterr().err
    other = tmp_path / "other"
    other.mkdir()
    (other / "build_report.json").write_text('{"files": {"../victim": {}}}')
    (tmp_path / "victim").write_text("mine")
    assert build(other, "--sample")[0] == 0
    assert (tmp_path / "victim").read_text() == "mine"


def test_two_builds_do_not_share_a_folder(tmp_path, capsys):
    work = Workspace(tmp_path / ".build", "key", 1)
    assert build(tmp_path, "--sample")[0] == 2
    assert "another build is writing there" in capsys.readouterr().err
    work.close()
    assert build(tmp_path, "--sample")[0] == 0


def test_an_out_that_cannot_be_written_is_said_in_a_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked/processed").write_text("")
    for out in ("file", "file/below", "blocked"):
        assert main(["--sample", "--jobs", "1", "--out", str(tmp_path / out)]) == 2
        told = capsys.readouterr().err
        assert out.split("/")[0] in told
        assert "Traceback" not in told


def test_a_size_larger_than_the_pool_is_noted(tmp_path):
    _, report = build(tmp_path, "--sample", "--size", "120k")
    assert "--size asks for 120000 prompts; the pool has 72." in report["notes"]


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


def test_a_killed_build_leaves_no_half_file_and_goes_on(tmp_path, sample_build):
    _out, report = sample_build
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

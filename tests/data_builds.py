"""Running the data build, and reading what it made."""

import json

from conftest import ROOT

from data_prep.build import main

SAMPLE = ROOT / "data_prep/sample"
PARTS = ("train", "validation", "test")


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

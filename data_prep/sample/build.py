"""Make the packaged sample's prompts and benchmarks from its raw records:

python -m data_prep.sample.build [--out FOLDER]
"""

import argparse
import hashlib
import json
from pathlib import Path

from data_prep.open_ended import SOURCES, benchmark_record, long_form_question

HERE = Path(__file__).parent
# Prompts of each source; the rest are benchmark records. Four sources make the report's 64 / 4 / 4.
SPLIT = {"train": 16, "validation": 1, "test": 1}


def build(out: Path) -> dict[str, int]:
    """Write processed/ and benchmarks/ below `out`; returns the rows of each file."""
    prompts: dict[str, list[dict]] = {split: [] for split in SPLIT}
    counts = {}
    for source in SOURCES:
        records = _shuffled(source, _read(HERE / "raw" / f"{source}.jsonl"))
        for split, size in SPLIT.items():
            taken, records = records[:size], records[size:]
            prompts[split] += [long_form_question(source, record) for record in taken]
        rows = [benchmark_record(source, record) for record in records]
        counts[f"benchmarks/{source}.jsonl"] = _write(out / "benchmarks" / f"{source}.jsonl", rows)
    for split, rows in prompts.items():
        counts[f"processed/{split}.jsonl"] = _write(out / "processed" / f"{split}.jsonl", rows)
    return counts


def _read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _shuffled(source: str, records: list[dict]) -> list[dict]:
    """In an order that follows no order of theirs and stays when a record's text is mended."""

    def key(record: dict) -> str:
        identity = benchmark_record(source, record)["id"]
        return hashlib.sha256(identity.encode()).hexdigest()

    return sorted(records, key=key)


def _write(path: Path, rows: list[dict]) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return len(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to")
    for name, count in build(parser.parse_args().out).items():
        print(f"{count:4d} rows  {name}")

"""The files of a build: written aside, and put in their place together at the end."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from data_prep.inputs import sha256
from data_prep.sources import NAMES
from data_prep.splits import PARTS
from medistill_trl.files import write_text

REPORT, PAGE = "build_report.json", "build_report.md"
_BENCHMARKS = (*NAMES, "pubhealth_2class")
ALL_FILES = {
    *(f"processed/{part}.jsonl" for part in PARTS),
    *(f"benchmarks/{name}.jsonl" for name in _BENCHMARKS),
    *(f"benchmarks/few_shot/{name}.jsonl" for name in _BENCHMARKS),
    "medppl_10k.jsonl",
    "fidelitybench_med.jsonl",
}


class Output:
    """The files of one build.

    Args:
        folder: Where they wait; on the same disk as where they go.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.files: dict[str, dict] = {}

    def write(self, name: str, rows: Iterable[dict]) -> None:
        """One JSON object per line; notes rows and sha256. Without rows there is no file."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            count = 0
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
            file.flush()
            os.fsync(file.fileno())
        assert name in ALL_FILES
        if count:
            self.files[name] = {"rows": count, "sha256": sha256(path)}

    def publish(self, out: Path, report: dict, page: str) -> None:
        """Move the files to `out`, the report last: what it names is there, whole.

        Files of an earlier build that this one does not make are removed, once its own are in place.
        """
        for name in (REPORT, PAGE):
            (out / name).unlink(missing_ok=True)
        for name in self.files:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(self.folder / name, out / name)
        for name in ALL_FILES - self.files.keys():
            (out / name).unlink(missing_ok=True)
        write_text(out / PAGE, page)
        write_text(out / REPORT, json.dumps(report, ensure_ascii=False, indent=2) + "\n")

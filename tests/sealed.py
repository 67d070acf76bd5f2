"""Crafted results with the digests that real ones have."""

import hashlib
import json
from pathlib import Path

from medistill_trl.run_directory import EVALUATION, HELDOUT, RECORD, RunDirectory
from medistill_trl.sealed_json import DIGEST, write_record


def read(path: Path) -> dict:
    content = json.loads(path.read_text())
    content.pop(DIGEST, None)
    return content


def seal(folder: Path) -> None:
    """Give the results of a run, as they are now, their digests and those of the items beside them."""
    run = RunDirectory(folder)
    items = {path.stem: path for path in sorted((run.results / "items").glob("*.jsonl"))}
    for name in (RECORD, EVALUATION):
        path = run.results / name
        if path.is_file():
            content = read(path)
            content["items"] = {
                part: f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"
                for part, file in items.items()
                if (part == HELDOUT) == (name == RECORD)
            }
            write_record(path, content)

"""outputs/<study>/study.json: the study as it was asked for, and what has become of every run."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from medistill_trl.sealed_json import read_record, write_record
from medistill_trl.study.definition import Study
from medistill_trl.study.grid import Run

STUDY = "study.json"
SCHEMA_VERSION = 1
REMEDY = "remove it: it is written anew, and runs that are finished stay so"
STATES = ("waiting", "running", "finished", "short", "failed", "stopped")


class StudyRecord:
    """The record on disk, rewritten in one step at every change.

    Args:
        path: study.json; what an earlier launch has recorded of a run with the same hash is kept.
    """

    def __init__(self, path: Path, study: Study, runs: list[Run]):
        self.path = path
        earlier = self._earlier()
        self.content = {
            "schema_version": SCHEMA_VERSION,
            "name": study.name,
            "description": study.description,
            "budget": asdict(study.budget),
            "shared": study.shared,
            "methods": study.methods,
            "grid": study.axes,
            "overlays": study.overlays,
            "evaluate": study.evaluate,
            "runs": [self._entry(run, earlier.get(run.name, {})) for run in runs],
        }
        self._runs = {entry["name"]: entry for entry in self.content["runs"]}

    def _earlier(self) -> dict[str, dict]:
        if not self.path.exists():
            return {}
        content = read_record(self.path, REMEDY)
        return {entry["name"]: entry for entry in content["runs"]}

    def _entry(self, run: Run, earlier: dict) -> dict[str, Any]:
        known = earlier if earlier.get("hash") == run.hash else {}
        return {
            "state": "waiting",
            "wall_seconds": 0.0,
            "evaluated": None,
            **known,
            "name": run.name,
            "method": run.method,
            "settings": run.settings,
            "hash": run.hash,
            "directory": str(run.directory),
            "log": str(log_of(run)),
            "draws_from_store": run.draws_from_store,
        }

    def __getitem__(self, run: Run) -> dict[str, Any]:
        return self._runs[run.name]

    def update(self, run: Run, **changes: Any) -> None:
        """Change what is known of a run, and write it down."""
        self[run].update(changes)
        self.write()

    def write(self) -> None:
        write_record(self.path, self.content)

    def count(self, *states: str) -> int:
        return sum(entry["state"] in states for entry in self._runs.values())


def log_of(run: Run) -> Path:
    """One log for each run, of all its launches."""
    return run.directory.parent / "logs" / f"{run.name}.log"

"""What has been done: run directories, results and logs, looked at from outside."""

import hashlib
import re
from pathlib import Path
from typing import Any

from medistill_trl.errors import UserError
from medistill_trl.recipe import read_saved
from medistill_trl.run_directory import RECORD, RunDirectory
from medistill_trl.study.definition import Budget
from medistill_trl.study.grid import Run, identity

TAIL_BYTES = 16384
COMMAND = "== "  # begins the line of a command in a log


def is_trained(run: Run) -> bool:
    return RunDirectory(run.directory).is_complete


def is_started(run: Run) -> bool:
    return RunDirectory(run.directory).recipe.exists()


def check_unchanged(runs: list[Run]) -> None:
    """Refuse a folder that holds another run than the study would put there: they are never mixed.

    Raises:
        UserError: naming each run and what differs.
    """
    found = [f"{run.directory}: {'; '.join(c)}" for run in runs if (c := _changes(run))]
    if found:
        raise UserError(
            "these runs were started with other settings or data than the study has now:\n"
            + "\n".join(f"  {line}" for line in found)
            + "\nGive the study another --out (or name) to keep both, or remove these folders."
        )


def _changes(run: Run) -> list[str]:
    if not is_started(run):
        return []
    directory = RunDirectory(run.directory)
    saved = identity(read_saved(directory.recipe))
    now = identity(run.recipe.resolved())
    changes = [
        f"{key}: {saved.get(key)!r} then, {now.get(key)!r} now"
        for key in sorted({*saved, *now})
        if saved.get(key) != now.get(key)
    ]
    inputs = directory.read_inputs()
    for path in (run.recipe.values["train_file"], run.recipe.values["validation_file"]):
        known = inputs.get(f"sha256 of {path}")
        if known is not None and known != _sha256(path):
            changes.append(f"{path} has changed since")
    return changes


def _sha256(path: str) -> str:
    with Path(path).open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def results(run: Run) -> dict[str, Any]:
    """Of a finished run: the part of its record a study shows."""
    record = RunDirectory(run.directory).read_result(RECORD)
    return {
        "steps": record["steps"],
        "ended_by": record["ended_by"],
        "training_seconds": record["seconds"],
        "peak_memory_gb": record["peak_memory_gb"],
        "tokens": record["tokens"],
        "heldout": record["heldout"],
    }


def shortfall(budget: Budget, result: dict[str, Any]) -> str | None:
    """Why a finished run did not use the study's budget, and so compares with no other; None if it did."""
    if budget.kind == "optimizer_steps":
        wanted, enough = f"{budget.amount} optimizer steps", result["steps"] == budget.amount
        mend = "its method has an end of its own: let that come later, or lower the budget"
    else:
        wanted, enough = str(budget), result["ended_by"] != "schedule"
        mend = "raise budget.max_steps, so that the budget ends every run"
    if enough:
        return None
    return f"ended after {result['steps']} steps, before the budget of {wanted}: {mend}"


def tail(log: Path, lines: int) -> list[str]:
    """The last lines of a log that say something, without what progress bars have drawn over; of its newest
    command only."""
    if not log.exists():
        return []
    with log.open("rb") as content:
        content.seek(max(0, log.stat().st_size - TAIL_BYTES))
        text = content.read().decode("utf-8", errors="replace").rpartition(f"\n{COMMAND}")[2]
    shown = [line.rstrip().rpartition("\r")[2] for line in text.splitlines(keepends=False)]
    return [line for line in shown if line.strip()][-lines:]


def failure(log: Path, lines: int) -> list[str]:
    """The last lines of a run that failed, without the traceback accelerate launch puts below them."""
    shown = tail(log, 1000)
    if shown and shown[-1].startswith("subprocess.CalledProcessError"):
        starts = [n for n, line in enumerate(shown) if line.startswith("Traceback ")]
        shown = shown[: starts[-1]] if len(starts) > 1 else shown
    return shown[-lines:]


def current_step(log: Path) -> str | None:
    """What the newest progress bar of a log counts, such as 12/48."""
    found = re.findall(r"(\d+/\d+) \[", "\n".join(tail(log, 1000)))
    return found[-1] if found else None

"""What has been done: run directories, results and logs, looked at from outside."""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from medistill_trl.errors import UserError
from medistill_trl.recipe import read_saved
from medistill_trl.run_directory import RECORD, RunDirectory
from medistill_trl.study.definition import Budget
from medistill_trl.study.grid import Run, identity

TAIL_BYTES = 16384
COMMAND = "== "  # begins the line of a command in a log
# What a step's time depends on, besides the machine.
COST_KEYS = (
    "method", "teacher_model", "student_model", "student_keep_layers", "use_lora", "student_load_in_4bit",
    "per_device_train_batch_size", "gradient_accumulation_steps", "teacher_max_new_tokens",
)  # fmt: skip


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


def seconds_per_step(folder: Path) -> dict[str, float]:
    """Time of an optimizer step, by `cost_key`, in the finished runs in a folder and its folders.

    The newest run of a kind counts. Records of other versions, which do not say so, are passed over.
    """
    paths = [*folder.glob("*/results/run.json"), *folder.glob("*/*/results/run.json")]
    records = [_readable(path) for path in sorted(paths, key=lambda path: path.stat().st_mtime)]
    return {
        cost_key(record["recipe"]): (record["seconds"] - record["seconds_drawing"])
        / record["steps"]
        for record in records
        if record is not None and record.get("steps")
    }


def _readable(path: Path) -> dict | None:
    try:
        return RunDirectory(path.parents[1]).read_result(path.name)
    except UserError:  # it is refused where its run is wanted
        return None


def cost_key(values: dict[str, Any]) -> str:
    return json.dumps([values.get(key) for key in COST_KEYS])


def expected_seconds(run: Run, budget: Budget, known: dict[str, float]) -> float | None:
    """Of training, from runs that were like this one; None if there are none."""
    step = known.get(cost_key(run.recipe.values))
    if budget.kind == "seconds":
        return budget.amount
    return None if step is None else step * budget.max_steps


def time_left(
    expected: Iterable[float | None], working: Iterable[tuple[float | None, float]], jobs: int
) -> str:
    """Until the last run ends, in words; `at least` where nothing is known of some runs.

    Args:
        expected: Seconds of every run that waits.
        working: Of every run at work the seconds it is expected to take, and those it has run.
        jobs: Runs side by side.
    """
    working = list(working)
    rest = [None if total is None else max(0.0, total - spent) for total, spent in working]
    every = [*expected, *rest]
    known = [seconds for seconds in every if seconds is not None]
    if every and not known:
        return "unknown"
    longest = max([seconds for seconds in rest if seconds is not None], default=0.0)
    about = "about" if len(known) == len(every) else "at least"
    return f"{about} {duration(max(sum(known) / jobs, longest))}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

"""results/run.json: what was run, on what, what it cost and what came out. Units stand in the keys."""

import importlib.metadata
import platform
import resource
import subprocess
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from medistill_trl.budget import ended_by
from medistill_trl.checkpoints import Totals
from medistill_trl.teacher import Completion

SCHEMA_VERSION = 1
PACKAGES = (
    "medistill_trl",
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "tokenizers",
)


def environment() -> dict:
    """Versions, commit and device: what a number depends on besides the recipe."""
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "git_commit": git_commit(),
        "device": device_name(),
        "num_processes": PartialState().num_processes,
        "num_threads": torch.get_num_threads(),
    }


def git_commit() -> str | None:
    """Commit of this checkout, with `-dirty` if tracked files were changed; None outside git."""
    root = Path(__file__).resolve().parent.parent
    try:
        commit = _git(root, "rev-parse", "HEAD")
        dirty = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("-dirty" if dirty else "")


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def device_name() -> str:
    device = PartialState().device
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} (CUDA {torch.version.cuda})"
    model = next(
        (
            line.partition(":")[2].strip()
            for line in _cpu_info().splitlines()
            if line.startswith("model name")
        ),
        platform.processor() or platform.machine(),
    )
    return f"CPU, {model}, {torch.get_num_threads()} threads a process"


def _cpu_info() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def peak_memory_gb() -> dict[str, float]:
    """Largest use of any process so far, in GB (10⁹ bytes).

    Returns:
        `peak_memory_gb`: of the accelerator, or of the process where training runs on CPU;
        `peak_host_memory_gb`: of the process.
    """
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    device = host
    if PartialState().device.type == "cuda":
        device = torch.cuda.max_memory_reserved() / 1e9
    peaks = gather_object([(device, host)])
    return {
        "peak_memory_gb": round(max(p[0] for p in peaks), 3),
        "peak_host_memory_gb": round(max(p[1] for p in peaks), 3),
    }


def teacher_use(totals: Totals, stored: Collection[Completion]) -> dict[str, int | float | None]:
    """What the run has used of the teacher's writing, whoever drew it.

    Returns:
        `tokens`: stored and written online; `stored_seconds`: what drawing the stored ones took, by this run or an
        earlier one, None where that was not recorded. Writing online is in the seconds of training.
    """
    seconds = [completion.seconds for completion in stored]
    online = totals.generated_teacher - totals.drawn_teacher
    return {
        "tokens": online + sum(completion.num_tokens for completion in stored),
        "stored_seconds": None if None in seconds else round(sum(seconds), 3),
    }


def build(
    recipe: dict,
    steps: int,
    totals: Totals,
    stored: Collection[Completion],
    heldout: dict,
    data: dict,
    models: dict,
    log_history: list[dict],
    out_of_memory: list[dict],
) -> dict:
    """The record of a finished run.

    Args:
        recipe: Resolved recipe.
        steps: Optimizer steps taken.
        totals: Summed over processes.
        stored: The stored completions of the teacher that it used.
        heldout: `{"before": ..., "after": ...}` of the held-out check.
        data: Reports of the prompt files.
        models: Which exact weights teacher and student are.
        log_history: The trainer's log.
        out_of_memory: What running out of memory has changed, see `out_of_memory.Changes`.
    """
    counts = asdict(totals)
    seconds, drawing = counts.pop("seconds"), counts.pop("seconds_drawing")
    return {
        "schema_version": SCHEMA_VERSION,
        "method": recipe["method"],
        "recipe": recipe,
        **environment(),
        "seed": recipe.get("seed", 42),
        "steps": steps,
        "ended_by": ended_by(log_history),
        "seconds": round(seconds, 1),
        "seconds_drawing": round(drawing, 1),
        **peak_memory_gb(),
        "tokens": counts,
        "teacher_use": teacher_use(totals, stored),
        "models": models,
        "data": data,
        "heldout": heldout,
        "out_of_memory": out_of_memory,
        "log_history": log_history,
    }

"""How long a user waits before anything happens: imports, --help, and the way to the first optimizer step."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import psutil

from benchmarks.training_step import ROOT, say

COMMANDS = {
    "python -c 'import medistill_trl'": ["-c", "import medistill_trl"],
    "recipes/run.py --help": ["recipes/run.py", "--help"],
    "medistill --help": ["-m", "medistill_trl.cli", "--help"],
    "python -m medistill_trl.study --help": ["-m", "medistill_trl.study", "--help"],
    "python -m eval.run --help": ["-m", "eval.run", "--help"],
    "python -m eval.compare --help": ["-m", "eval.compare", "--help"],
    "python -m data_prep.build --help": ["-m", "data_prep.build", "--help"],
}
# What the log of a run says first after each stage of the way; the last is the first optimizer step.
STAGES = {
    "recipe checked": "warning: --save_strategy",
    "libraries imported, data read": "loading teacher",
    "models loaded": "loading student",
    "held-out check before training": "held out, before training",
    "first optimizer step": "{'loss'",
}


def commands(repetitions: int) -> list[dict]:
    """Median seconds of each command, of the clock and of the processor."""
    found = []
    for name, words in COMMANDS.items():
        taken = [of_command([sys.executable, *words]) for _ in range(repetitions + 1)][1:]
        clock, processor = (median(column) for column in zip(*taken, strict=True))
        say(f"  {name}: {clock:.2f} s, {processor:.2f} s of the processor")
        found.append({"command": name, "seconds": clock, "processor_seconds": processor})
    return found


def of_command(words: list[str], env: dict[str, str] | None = None) -> tuple[float, float]:
    """Seconds of a command that must succeed: of the clock, and of the processor."""
    before, start = psutil.Process().cpu_times(), time.perf_counter()
    subprocess.run(words, cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL)
    seconds, after = time.perf_counter() - start, psutil.Process().cpu_times()
    user = after.children_user - before.children_user
    return seconds, user + after.children_system - before.children_system


def first_step(work: Path) -> list[dict]:
    """Seconds from the command line to each stage of an SFT run of one step, with its models and completions cached."""
    _stages(work)  # fills the caches
    found = _stages(work)
    for entry in found:
        say(f"  {entry['stage']}: {entry['seconds']:.1f} s, {entry['processor_seconds']:.1f} s")
    return found


def _stages(work: Path) -> list[dict]:
    """When one run said what `STAGES` waits for.

    Raises:
        RuntimeError: it failed.
    """
    words = [
        *("-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu.yaml"),
        *("recipes/run.py", "recipes/sft.yaml", "recipes/overlays/embedded.yaml"),
        *("--max_steps", "1", "--max_train_samples", "16", "--teacher_completions", "stored"),
        *("--completion_store", str(work / "completions.sqlite")),
        *("--output_dir", tempfile.mkdtemp(dir=work), "--save_strategy", "no"),
        *("--eval_strategy", "no", "--disable_tqdm", "true"),
    ]
    start, found = time.perf_counter(), []
    with subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    ) as process:
        tree = psutil.Process(process.pid)
        waiting = dict(STAGES)
        for line in process.stdout:
            for stage in [stage for stage, sign in waiting.items() if sign in line]:
                del waiting[stage]
                entry = {"stage": stage, "seconds": time.perf_counter() - start}
                found.append(entry | {"processor_seconds": _processor_seconds(tree)})
    if process.returncode or waiting:
        raise RuntimeError(f"the run ended with {process.returncode} before: {list(waiting)}")
    return found


def _processor_seconds(tree: psutil.Process) -> float:
    """Of a process and all it has started."""
    times = [process.cpu_times() for process in (tree, *tree.children(recursive=True))]
    return sum(
        sum(one[:4]) for one in times
    )  # user and system, own and of children that have ended

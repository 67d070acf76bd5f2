"""The commands of a study, as a user would type them."""

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from medistill_trl.errors import RunFailed
from medistill_trl.run_directory import RunDirectory
from medistill_trl.study import progress
from medistill_trl.study.definition import Study
from medistill_trl.study.grid import Run
from medistill_trl.study.record import StudyRecord

EVALUATE = ("python", "-m", "eval.run")


def train_command(run: Run, config_file: str | None) -> list[str]:
    """As a user would type it; continues a run that was started."""
    launcher = ["accelerate", "launch", *(["--config_file", config_file] if config_file else [])]
    launcher += ["--main_process_port", "0"]  # any that is free: runs may work side by side
    resume = ["--resume"] if progress.is_started(run) else []
    return [*launcher, "recipes/run.py", *run.words, *resume]


def evaluate_command(run: Run, study: Study) -> list[str]:
    flags = []
    for key, value in study.evaluate.items():
        values = value if isinstance(value, list) else [value]
        flags += [f"--{key}", *(str(item) for item in values if item is not True)]
    return [*EVALUATE, str(run.directory), *flags]


def commands(run: Run, study: Study, record: StudyRecord, config_file: str | None) -> list[list]:
    """What is still to be done for a run, in order; nothing for a finished one."""
    left = [] if progress.is_trained(run) else [train_command(run, config_file)]
    if study.evaluate is not None:
        command = evaluate_command(run, study)
        done = (
            record[run]["evaluated"] == command and RunDirectory(run.directory).evaluation.exists()
        )
        left += [] if done and not left else [command]
    return left


def recognise(runs: Sequence[Run], study: Study, record: StudyRecord) -> list[Run]:
    """Take evaluations for the study's own that somebody else has made just as the study would; returns their runs.

    The evaluation knows what it depends on, so it is asked, in a process of its own: it loads torch.

    Raises:
        RunFailed: it ended early.
    """
    if study.evaluate is None:
        return []
    evaluated = [
        run
        for run in runs
        if progress.is_trained(run) and RunDirectory(run.directory).evaluation.exists()
    ]
    wanted = {run.name: evaluate_command(run, study) for run in evaluated}
    open_ = {
        run.name: wanted[run.name]
        for run in evaluated
        if record[run]["evaluated"] != wanted[run.name]
    }
    if not open_:
        return []
    ended = subprocess.run(
        [sys.executable, "-m", "eval.made"],
        input=json.dumps({name: command[len(EVALUATE) :] for name, command in open_.items()}),
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode != 0:
        raise RunFailed(f"the evaluations that are there could not be looked at:\n{ended.stderr}")
    made = json.loads(ended.stdout)
    found = [run for run in runs if run.name in made]
    for run in found:
        record[run]["evaluated"] = open_[run.name]
    return found


def compare_command(out: Path, partial: bool) -> list[str]:
    """Of the finished runs in the study's folder.

    Args:
        partial: Whether runs are missing, which a comparison must be told.
    """
    return ["python", "-m", "eval.compare", str(out), *(["--allow_partial"] if partial else [])]


def as_typed(command: list[str]) -> str:
    return shlex.join(command)


def executable(command: list[str]) -> list[str]:
    """The same, with the programs of this environment, whether or not it is activated."""
    program = {
        "python": sys.executable,
        "accelerate": str(Path(sys.executable).with_name("accelerate")),
    }
    return [program[command[0]], *command[1:]]

"""Run a study: many recipes under one budget, each through accelerate launch.

    python -m medistill_trl.study recipes/studies/X.yaml [overlay.yaml ...] [--jobs N] [--set place=value ...]

Overlays are laid over those the study names. What is finished is skipped and what is not is resumed, so
the same command goes on after an interruption. In the end the runs are compared, and the folder has a report.
docs/study.md describes the file.
"""

import argparse
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from medistill_trl import disk
from medistill_trl.console import CommandParser
from medistill_trl.errors import UserError
from medistill_trl.study import definition, grid, plan, progress, tables, timing
from medistill_trl.study.commands import as_typed, commands, compare_command, executable, recognise
from medistill_trl.study.execution import Executor, make_slots, only_study
from medistill_trl.study.record import STUDY, StudyRecord


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m medistill_trl.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", help="YAML file of the study")
    parser.add_argument("overlays", nargs="*", help="recipe files laid over every run's recipe")
    parser.add_argument("--out", type=Path, help="folder of the study; default outputs/<name>")
    parser.add_argument(
        "--config_file", help="of accelerate launch, such as accelerate_configs/cpu.yaml"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, each on its share")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        action="extend",
        metavar="PLACE=VALUE",
        help="change the study file's content: budget.optimizer_steps=8 shared.lora_r=4 seeds=[42]",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="list runs, memory and time; start none"
    )
    parser.add_argument(
        "--commands", action="store_true", help="print the commands still to be given; start none"
    )
    given = parser.parse_intermixed_args(arguments)
    if given.jobs < 1:
        parser.error(f"--jobs: must be at least 1, got {given.jobs}")
    for name in ("recipes/run.py", given.config_file):
        if name is not None and not Path(name).is_file():
            parser.error(f"{name}: no such file below {Path.cwd()}; run from the repository's root")
    return given


def main(arguments: list[str]) -> int:
    """The command; returns its exit status: 1 if a run failed or fell short of the budget, or the runs could not
    be compared."""
    given = parse(arguments)
    study = definition.read(given.study, given.overlays, given.set)
    out = given.out or Path("outputs") / study.name
    runs = grid.expand(study, out)
    progress.check_unchanged(runs)
    record = StudyRecord(out / STUDY, study, runs)
    if given.commands:
        with only_study(out):
            recognise(runs, study, record)
            _print_commands(study, runs, record, out, given.config_file)
        return 0
    print(tables.header(study, runs, out))
    known = timing.read_known(out.parent, study)
    if given.dry_run:
        launcher = ["--config_file", given.config_file] if given.config_file else []
        memory = plan.measure(runs, launcher)
        print(tables.plan(study, runs, memory, known, given.jobs))
        return 1 if any("problem" in line for line in memory.values()) else 0
    _show_warnings(runs)
    with only_study(out), disk.explained(out, how_to_go_on="give the same command again"):
        slots = make_slots(given.jobs, given.config_file)
        for run in recognise(runs, study, record):
            print(f"{run.name}: is evaluated already, as the study would")
        Executor(study, runs, record, slots, given.config_file, known).work()
        print(tables.results(record))
        finished = record.count("finished")
        print(f"\n{finished} of {len(runs)} runs finished; {out / STUDY}\n", flush=True)
        compared = _compare(out, partial=finished < len(runs)) if finished else True
    return 0 if compared and finished == len(runs) else 1


def _print_commands(
    study: definition.Study,
    runs: list[grid.Run],
    record: StudyRecord,
    out: Path,
    config_file: str | None,
) -> None:
    """What is still to be done, and study.json, by which the last command finds the runs."""
    for run in runs:
        left = commands(run, study, record, config_file)
        record[run]["state"] = "waiting" if left else record[run]["state"]
        if left:
            print(" && ".join(map(as_typed, left)))
    record.write()
    print(f"# when all of them have ended:\n{as_typed(compare_command(out, partial=False))}")


def _compare(out: Path, partial: bool) -> bool:
    """Compare the finished runs; whether that could be done."""
    command = compare_command(out, partial)
    print(f"comparing: {as_typed(command)}", flush=True)
    return subprocess.run(executable(command), check=False).returncode == 0


def _show_warnings(runs: list[grid.Run]) -> None:
    for warning, count in Counter(w for run in runs for w in run.recipe.warnings).items():
        print(f"warning: {warning} ({count} runs)", file=sys.stderr)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:  # before a run was started; the executor has a handler of its own
        sys.exit(130)
    except UserError as error:
        print(f"\nmedistill_trl: {error}\n", file=sys.stderr)
        sys.exit(error.exit_code)
